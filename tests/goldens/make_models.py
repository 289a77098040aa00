"""Makes the golden files that say what `transformers` computes: tiny random models of every family.

Run once where torch and transformers are installed; torch is not needed to run the tests:

    python tests/goldens/make_models.py

Each models/NAME.npz holds config.json and the weights as `save_pretrained` writes them (float32), ids [B, T] without
padding, logits [B, T, V] and 32 greedy tokens per prompt, found by recomputing the whole sequence at each step and
checked against `generate` with its cache.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

HERE = Path(__file__).parent
BATCH, LENGTH, PROMPT, NEW = 2, 28, 12, 32
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA3_ROPES: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name: (class, what differs from SHAPE); windows are shorter than the sequences, head sizes are not all D / N
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_grouped_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_untied": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3_rope": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama_linear_rope": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": 8, "head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24,
         "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    ),
    "gemma3": ("Gemma3", {"num_hidden_layers": 6, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}),
    "gemma3_linear_rope": (
        "Gemma3",
        {"num_hidden_layers": 3, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "rope_parameters": GEMMA3_ROPES},
    ),
}  # fmt: skip


def make_model(name: str, seed: int) -> bool:
    """Writes models/NAME.npz; False, and nothing written, if the second best token ever comes within 1e-3 in logits."""
    family, traits = MODELS[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**(SHAPE | traits), attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            # Norms and biases far from their defaults, so that a forgotten one or a wrong offset cannot pass.
            if "norm" in key:
                value = 0.3 * rng.standard_normal(weight.shape) + (0.0 if family.startswith("Gemma") else 1.0)
            elif key.endswith("bias"):
                value = 0.5 * rng.standard_normal(weight.shape)
            elif "embed_tokens" in key:
                scale = 0.1 if family.startswith("Gemma") else 0.5
                value = scale * rng.standard_normal(weight.shape)
            else:
                value = 1.5 / np.sqrt(weight.shape[1]) * rng.standard_normal(weight.shape)
            weight.copy_(torch.from_numpy(value.astype(np.float32)))
    ids = rng.integers(3, SHAPE["vocab_size"], (BATCH, LENGTH))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.float().numpy()
        greedy, gap = greedy_tokens(model, ids[:, :PROMPT])
        generated = model.generate(
            torch.from_numpy(ids[:, :PROMPT]), attention_mask=torch.ones(BATCH, PROMPT), do_sample=False,
            max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        ).numpy()[:, PROMPT:]  # fmt: skip
    if gap < 1e-3:
        return False
    if not np.array_equal(greedy, generated):
        raise SystemExit(f"{name}: generate with its cache disagrees with full recomputation")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        saved = (Path(folder) / "config.json").read_text()
    meta = {"seed": seed, "torch": torch.__version__, "transformers": transformers.__version__, "gap": float(gap)}
    out = HERE / "models" / f"{name}.npz"
    np.savez_compressed(
        out,
        config=np.array(saved),
        meta=np.array(json.dumps(meta)),
        ids=ids.astype(np.int32),
        logits=logits,
        greedy=greedy.astype(np.int32),
        **{f"weights/{key}": value for key, value in weights.items()},
    )
    print(f"{name}: {out.stat().st_size / 1e3:.0f} kB, |logits| {np.abs(logits).max():.1f}, gap {gap:.1e}")
    return True


def greedy_tokens(model: torch.nn.Module, prompt: np.ndarray) -> tuple[np.ndarray, float]:
    """(tokens [B, NEW], the smallest distance between the best and the second logit), without any cache."""
    ids, gap = torch.from_numpy(prompt), float("inf")
    for _ in range(NEW):
        last = model(ids, use_cache=False).logits[:, -1]
        best = last.topk(2).values
        gap = min(gap, float((best[:, 0] - best[:, 1]).min()))
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompt.shape[1] :].numpy(), gap


def main() -> None:
    """Makes every model."""
    (HERE / "models").mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for index, name in enumerate(MODELS):
        # A seed whose greedy choices are clear, so that the last bits of a float cannot decide one.
        if not any(make_model(name, seed) for seed in range(100 + index, 2000, 100)):
            raise SystemExit(f"{name}: no seed gives clear greedy choices")


if __name__ == "__main__":
    main()
