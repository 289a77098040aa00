"""Makes prefix.npz: what `transformers` answers behind a buffer that memjax has written as a key/value prefix.

Two steps, since the two need not be installed together; the first where memjax is, the second where torch is:

    python tests/goldens/make_prefix.py write FOLDER     # from the root of the repository
    python tests/goldens/make_prefix.py read FOLDER

The model is `small_base()` of tests/support.py, known by the sums of its weights; logits [T, V] are those of the tail's
tokens, greedy [8] the tokens that follow. The second step reads as the README's example does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def write(folder: Path) -> None:
    """The model, the prefix of a buffer of it, and the tail that is read after it."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from memjax.bank.prefix_file import export_prefix
    from memjax.bank.store import open_bank
    from memjax.evaluate.tiny import Shape, hf_config
    from memjax.models.weights.export import save_folder
    from memjax.write.reading import tail_tokens
    from tests.bank.test_prefix_file import BASE, QUESTION, add_slots, sums
    from tests.small_bank import STYLE

    shape = Shape(3, 32, 48, 4, 2, 8, BASE.config.max_positions)
    config = json.dumps(hf_config(shape, BASE.config.vocab_size))
    save_folder(folder / "model", BASE.config, BASE.params, {"config.json": config})
    with open_bank(folder / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        add_slots(bank)
        export_prefix(bank, BASE, STYLE, "slots", folder / "prefix")
    tail = tail_tokens(BASE.tokenizer, STYLE, QUESTION)
    (folder / "tail.json").write_text(json.dumps({"tail": tail, "weights": sums(BASE)}))


def read(folder: Path) -> None:
    """Reads the tail behind the prefix with transformers, and writes the golden file."""
    import torch
    import transformers
    from safetensors.torch import load_file

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tensors = load_file(folder / "prefix" / "prefix.safetensors")
    about = json.loads((folder / "prefix" / "prefix.json").read_text())
    told = json.loads((folder / "tail.json").read_text())
    cache = transformers.DynamicCache()
    for layer in range(about["layers"]):
        cache.update(tensors[f"layers.{layer}.key"], tensors[f"layers.{layer}.value"], layer)
    ids, at, made, first = torch.tensor([told["tail"]]), about["next_position"], [], None
    with torch.no_grad():
        for _ in range(8):
            positions = torch.arange(at, at + ids.shape[1])[None]
            logits = model(input_ids=ids, past_key_values=cache, position_ids=positions).logits[0]
            first = logits if first is None else first
            at, ids = at + ids.shape[1], logits[-1:].argmax(-1)[None]
            made.append(int(ids))
    versions = json.dumps({"torch": torch.__version__, "transformers": transformers.__version__})
    golden = Path(__file__).parent / "prefix.npz"
    np.savez_compressed(
        golden, logits=first.numpy(), greedy=np.array(made), tail=np.array(told["tail"]), weights=told["weights"],
        versions=versions,
    )  # fmt: skip
    print(golden, versions, golden.stat().st_size)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
