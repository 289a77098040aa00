"""Makes kvzip.npz: what kvpress' KVzip scores and keeps of a text that a tiny random Qwen3 repeats in parts.

Run once where torch, transformers and kvpress are installed; none of them is needed to run the tests:

    python tests/goldens/make_kvzip.py

The model is that of models/qwen3.npz. Saved: ids [S] of the context, of which the first HEADER are the template's; the
prompts that ask for the first part, for later ones, and begin the answer; scores [L, K, S], kept sets [R, L, K, S] bool.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from kvpress import KVzipPress
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
SEED, LENGTH, HEADER, CHUNK = 11, 56, 6, 20
RATIOS = (0.25, 0.5, 0.75)
PROMPTS = {"first": [40, 41, 42], "later": [50, 51], "answer": [60, 61]}


class Words:
    """Stands in for the tokenizer that words KVzip's two prompts."""

    def encode(self, text: str, **_: object) -> torch.Tensor:
        """The ids of the prompt that `text` begins."""
        return torch.tensor([PROMPTS["first" if "previous context exactly." in text else "later"]])


def main() -> None:
    """Makes the file."""
    torch.set_num_threads(1)
    with np.load(HERE / "models" / "qwen3.npz") as file:
        saved = dict(file)
    names = {name: name.removeprefix("weights/") for name in saved if name.startswith("weights/")}
    config = Qwen3Config(**json.loads(str(saved["config"])))
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict({n: torch.tensor(saved[key]) for key, n in names.items()}, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    ids = np.random.default_rng(SEED).integers(3, 40, LENGTH)
    scores, kept = None, []
    for ratio in RATIOS:
        press = KVzipPress(ratio, chunk_size=CHUNK)
        with torch.no_grad():
            cache = DynamicCache()
            context = torch.tensor(ids)[None]
            model.model(input_ids=context, past_key_values=cache)
            for layer in model.model.layers:
                layer.self_attn.rotary_emb = model.model.rotary_emb
            press._context_ids, press._cache, press.prefix_length = context, cache, HEADER
            press._suffix_ids = torch.tensor([PROMPTS["answer"]])
            press._perform_kvzip_compression(model, Words())
        scores = press.score_val[:, 0].numpy()
        mask = np.ones(scores.shape, bool)
        for index, layer in enumerate(model.model.layers):
            _, head, place = layer.self_attn.masked_key_indices
            mask[index, head.numpy(), place.numpy()] = False
            layer.self_attn.masked_key_indices = None
        kept.append(mask)
    meta = {"seed": SEED, "header": HEADER, "chunk": CHUNK, "ratios": RATIOS, "prompts": PROMPTS}
    meta |= {name: version(name) for name in ("torch", "transformers", "kvpress")}
    out = HERE / "kvzip.npz"
    np.savez_compressed(out, meta=np.array(json.dumps(meta)), ids=ids.astype(np.int32), scores=scores, kept=np.stack(kept))
    print(f"{out.name}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
