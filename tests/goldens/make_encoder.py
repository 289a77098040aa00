"""Makes the golden file that says what `transformers` computes with BERT encoders.

Run once where torch and transformers are installed; torch is not needed to run the tests:

    python tests/goldens/make_encoder.py FOLDER

FOLDER holds all-MiniLM-L6-v2 as memjax fetches it. encoder.npz holds a tiny random BERT (config.json, weights as
`save_pretrained` writes them, ids and mask [B, T], hidden [B, T, D], mean-pooled unit vectors [B, D]) and, for a few
texts, the token ids and vectors [n, 384] of the real encoder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

OUT = Path(__file__).parent / "encoder.npz"
TEXTS = [
    "When does the ferry leave?",
    "The ferry to Ilmar leaves the north pier at 07:45 on weekdays. Tickets cost 1,250 crowns.",
    "Orla's bakery opens at six; São Tomé, Zürich, naïve café.",
    "東京へ行く",
    "x",
    "A long text. " + "The radio tower on Mount Besk is 312.5 metres tall and was finished in 1974. " * 30,
]


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Mean over the tokens of the mask, then L2 norm, as the model card of all-MiniLM-L6-v2 does it."""
    weights = mask.unsqueeze(-1).float()
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, p=2, dim=1).numpy()


def tiny() -> dict[str, np.ndarray]:
    """A random BERT whose norms and biases are far from their defaults, so that a forgotten one cannot pass."""
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=True).float().eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            size = (
                0.3
                if "LayerNorm" in key
                else 0.5
                if "bias" in key or "embeddings" in key
                else 1.5 / weight.shape[-1] ** 0.5
            )
            value = size * rng.standard_normal(weight.shape) + (1.0 if "LayerNorm.weight" in key else 0.0)
            weight.copy_(torch.from_numpy(value.astype(np.float32)))
    lengths = (17, 1, 40)
    ids = rng.integers(0, 96, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    with torch.no_grad():
        hidden = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64))).last_hidden_state
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        saved = (Path(folder) / "config.json").read_text()
    return {
        "config": np.array(saved),
        "ids": ids.astype(np.int32),
        "mask": mask,
        "hidden": hidden.numpy(),
        "pooled": pooled(hidden, torch.from_numpy(mask)),
        **{f"weights/{key}": value for key, value in weights.items()},
    }


def real(folder: str) -> dict[str, np.ndarray]:
    """The texts under the real encoder, cut at 256 tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").float().eval()
    rows, vectors = [], []
    for text in TEXTS:
        row = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            vectors.append(pooled(model(**row).last_hidden_state, row["attention_mask"])[0])
        rows.append(row["input_ids"][0].tolist())
    meta = {"texts": TEXTS, "ids": rows, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"meta": np.array(json.dumps(meta)), "vectors": np.stack(vectors)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.savez_compressed(OUT, **tiny(), **real(sys.argv[1]))
    print(f"{OUT.name}: {OUT.stat().st_size / 1e3:.0f} kB")
