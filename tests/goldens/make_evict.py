"""Makes evict.npz: what kvpress scores and keeps on frozen tensors.

Run once where torch, transformers and kvpress are installed; none of them is needed to run the tests:

    python tests/goldens/make_evict.py

Two attention layers of a random Qwen3 (grouped heads, norms on queries and keys) read LENGTH random hidden states. Saved
per layer: queries before rotation (after their norm) q_raw [L, T, N, H], rotated keys k and values v [L, S, K, H],
frequency [H/2]; per press scores [L, K, S] and the kept sets at each of RATIOS removed, kept [R, L, K, S] bool; and
PyramidKV's budgets [R, 6] of six layers.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

HERE = Path(__file__).parent
SEED, LENGTH, LAYERS = 7, 384, 2
RATIOS = (0.25, 0.5, 0.75, 0.9)
WINDOW, LAG = 32, 32  # smaller than kvpress' own, so that at 0.9 more is kept than the window, and several parts are ranked
CONFIG = Qwen3Config(
    hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, vocab_size=8, max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip


def presses(ratio: float) -> dict[str, object]:
    """{our name: the press}."""
    return {
        "knorm": KnormPress(ratio),
        "streaming": StreamingLLMPress(ratio),
        "h2o": ObservedAttentionPress(ratio),
        "snapkv": SnapKVPress(ratio, window_size=WINDOW),
        "tova": TOVAPress(ratio),
        "pyramidkv": PyramidKVPress(ratio, window_size=WINDOW, beta=2),
        "adakv": AdaKVPress(SnapKVPress(ratio, window_size=WINDOW)),
        "keydiff": KeyDiffPress(ratio),
        "lagkv": LagKVPress(ratio, lag_size=LAG),
        "expected_attention": ExpectedAttentionPress(ratio),
    }


def kept_by(press: object, module: Qwen3Attention, hidden, keys, values, attentions, kwargs) -> np.ndarray:
    """bool [K, S]: what `compress` leaves, read from values that are their own indices."""
    index = torch.arange(LENGTH, dtype=torch.float32)[None, None, :, None].expand_as(values)
    kept = np.zeros((keys.shape[1], LENGTH), bool)
    if isinstance(press, AdaKVPress):
        press.compress(module, hidden, keys, values, None, kwargs)
        kept[:] = True
        _, head, place = module.masked_key_indices
        kept[head.numpy(), place.numpy()] = False
        return kept
    # Scores come from the true values, the gathered ones are the indices.
    score = press.score(module, hidden, keys, values, attentions, kwargs)
    press.score = lambda *_: score
    _, left = press.compress(module, hidden, keys, index, attentions, kwargs)
    for head in range(kept.shape[0]):
        kept[head, left[0, head, :, 0].long().numpy()] = True
    return kept


def main() -> None:
    """Makes the file."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rotary = Qwen3RotaryEmbedding(CONFIG)
    arrays: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for layer in range(LAYERS):
            CONFIG._attn_implementation = "eager"
            module = Qwen3Attention(CONFIG, layer).eval()
            for name, weight in module.named_parameters():
                weight.normal_(std=0.3) if "norm" not in name else weight.uniform_(0.5, 2.0)
            module.rotary_emb = rotary
            # Neighbours are alike, as in texts, so that pooling and parts have something to see.
            hidden = torch.randn(1, LENGTH, CONFIG.hidden_size).cumsum(1) / 4 + torch.randn(1, LENGTH, CONFIG.hidden_size)
            position = torch.arange(LENGTH)[None]
            cos, sin = rotary(hidden, position)
            mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
            _, attentions = module(hidden, position_embeddings=(cos, sin), attention_mask=mask)
            CONFIG._attn_implementation = "sdpa"
            shape = (1, LENGTH, -1, CONFIG.head_dim)
            q = module.q_norm(module.q_proj(hidden).view(shape))
            k = module.k_norm(module.k_proj(hidden).view(shape)).transpose(1, 2)
            v = module.v_proj(hidden).view(shape).transpose(1, 2)
            half = CONFIG.head_dim // 2
            k = k * cos + torch.cat([-k[..., half:], k[..., :half]], -1) * sin
            values = {"q_raw": q[0], "k": k[0].transpose(0, 1), "v": v[0].transpose(0, 1)}
            kwargs = {"position_embeddings": (cos, sin)}
            for name, press in presses(0.5).items():
                scorer = press.press if isinstance(press, AdaKVPress) else press
                seen = attentions if name == "h2o" else None
                if name != "streaming":
                    values[f"score/{name}"] = scorer.score(module, hidden, k, v, seen, kwargs)[0]
            for name, value in values.items():
                arrays.setdefault(name, []).append(value.numpy())
            for name in presses(0.5):
                seen = attentions if name == "h2o" else None
                kept = [kept_by(presses(r)[name], module, hidden, k, v, seen, kwargs) for r in RATIOS]
                arrays.setdefault(f"kept/{name}", []).append(np.stack(kept))
    stacked = {name: np.stack(value, axis=1 if name.startswith("kept/") else 0) for name, value in arrays.items()}
    CONFIG.num_hidden_layers = 6
    budgets = []
    for ratio in RATIOS:
        press = PyramidKVPress(ratio, window_size=WINDOW, beta=20)
        budgets.append([])
        for layer in range(6):
            module.layer_idx = layer
            budgets[-1].append(press.get_layer_budget(module, 4096))
    meta = {"seed": SEED, "ratios": RATIOS, "window": WINDOW, "lag": LAG}
    meta |= {name: version(name) for name in ("torch", "transformers", "kvpress")}
    out = HERE / "evict.npz"
    np.savez_compressed(
        out,
        meta=np.array(json.dumps(meta)),
        frequency=rotary.inv_freq.numpy(),
        budgets=np.array(budgets, np.int32),
        **stacked,
    )
    print(f"{out.name}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
