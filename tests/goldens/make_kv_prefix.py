"""Makes tests/goldens/kv_prefix: a cartridge and a prefix as PEFT saves them, and what it computes behind each.

    python tests/goldens/make_kv_prefix.py        # needs torch, transformers, peft and ml_dtypes

The base is that of make_peft.py. `cartridge` and `prefix_tuning` (with a projection) are folders of `save_pretrained`;
golden.npz holds input ids and the logits behind each, golden.json the seed and the versions.
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

sys.path.insert(0, str(Path(__file__).parent))

from make_peft import CONFIG, SEED, logits_of, make_base

OUT = Path(__file__).parent / "kv_prefix"


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    ids = torch.randint(0, CONFIG["vocab_size"], (2, 7), generator=torch.Generator().manual_seed(SEED))
    arrays = {"input_ids": ids.numpy().astype(np.int32)}
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    configs = {
        "cartridge": peft.CartridgeConfig(**common, num_frozen_tokens=1),
        "prefix_tuning": peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=8),
    }
    for folder, config in configs.items():
        model = peft.get_peft_model(make_base(), config).eval()
        model.save_pretrained(OUT / folder)
        (OUT / folder / "README.md").unlink(missing_ok=True)
        arrays[f"logits/{folder}"] = logits_of(model, ids)
    np.savez_compressed(OUT / "golden.npz", **arrays)
    versions = {m.__name__: m.__version__ for m in (peft, torch, transformers, np)}
    (OUT / "golden.json").write_text(json.dumps({"seed": SEED, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
