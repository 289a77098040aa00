"""Makes tests/goldens/peft: adapters that PEFT wrote, one that memjax wrote, and what PEFT computes with each.

    python tests/goldens/make_peft.py        # needs torch, transformers, peft and ml_dtypes

Contents: `theirs` and `rslora` are folders written by `PeftModel.save_pretrained` over a tiny random
LlamaForCausalLM; `ours` and `upper` (which leaves the first layer alone) were written by
`memjax.memory.files.write_artefact` and loaded by PEFT unchanged. golden.npz
holds the base's weights (`base/<HF name>`), input ids, the logits of the base and of the base with each adapter, and
PEFT's own delta W [F,I] of each adapted module (`delta/<folder>/<layer>.<module>`). golden.json holds the model's
config, the seed and the versions.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from memjax.memory.files import Meta, write_artefact  # noqa: E402
from memjax.memory.peft import Factors  # noqa: E402

SEED = 7
OUT = Path(__file__).parent / "peft"
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
SHAPES = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "o": (16, 16), "gate": (16, 24), "up": (16, 24), "down": (24, 16)}


def make_base() -> transformers.LlamaForCausalLM:
    """A tiny Llama with random float32 weights, the same at every call."""
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits_of(model: torch.nn.Module, input_ids: torch.Tensor) -> np.ndarray:
    """Logits [B,T,V], float32."""
    with torch.no_grad():
        return model(input_ids).logits.numpy()


def deltas_of(model: peft.PeftModel, folder: str) -> dict[str, np.ndarray]:
    """PEFT's delta W [F,I] of each adapted module."""
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            short = name.split(".layers.")[1]
            deltas[f"delta/{folder}/{short}"] = module.get_delta_weight("default").detach().numpy()
    return deltas


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    base = make_base()
    input_ids = torch.randint(0, CONFIG["vocab_size"], (2, 9))
    arrays = {f"base/{name}": value.numpy() for name, value in base.state_dict().items()}
    arrays |= {"input_ids": input_ids.numpy().astype(np.int32), "logits/base": logits_of(base, input_ids)}

    leaves = [module.split(".")[1] for module in MODULES.values()]
    configs = {
        "theirs": peft.LoraConfig(r=3, lora_alpha=7, target_modules=leaves, task_type="CAUSAL_LM"),
        "rslora": peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True, layers_to_transform=[1]
        ),
    }
    for folder, config in configs.items():
        model = peft.get_peft_model(make_base(), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(OUT / folder)
        (OUT / folder / "README.md").unlink(missing_ok=True)
        arrays[f"logits/{folder}"] = logits_of(model, input_ids)
        arrays |= deltas_of(model, folder)

    rng = np.random.default_rng(SEED)
    draw = lambda *shape: rng.normal(0, 0.2, shape).astype(np.float32)
    a = {site: draw(2, 5, size_in) for site, (size_in, _) in SHAPES.items()}
    b = {site: draw(2, 5, size_out) for site, (_, size_out) in SHAPES.items()}
    meta = Meta("0" * 64, "1" * 64, "", {"writer": "golden", "seed": SEED}, licence="none: random numbers")
    upper = lambda tree: {site: np.concatenate([np.zeros_like(x[:1]), x[1:]]) for site, x in tree.items()}
    for folder, factors in (("ours", Factors(a, b, 0.3)), ("upper", Factors(upper(a), upper(b), 0.3))):
        write_artefact(OUT / folder, factors, MODULES, meta)
        model = peft.PeftModel.from_pretrained(make_base(), OUT / folder).eval()
        arrays[f"logits/{folder}"] = logits_of(model, input_ids)
        arrays |= deltas_of(model, folder)
    assert {name.split("/")[2][0] for name in arrays if name.startswith("delta/upper/")} == {"1"}
    for site, module in MODULES.items():
        for layer in range(2):
            expected = 0.3 * b[site][layer].T @ a[site][layer]
            np.testing.assert_allclose(arrays[f"delta/ours/{layer}.{module}"], expected, atol=1e-6)

    np.savez_compressed(OUT / "golden.npz", **arrays)
    versions = {m.__name__: m.__version__ for m in (peft, torch, transformers, np)}
    golden = {"config": CONFIG, "seed": SEED, "modules": MODULES, "site_shapes": SHAPES, "versions": versions}
    (OUT / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
