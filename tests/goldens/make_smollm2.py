"""Makes smollm2.npz: what `transformers` computes with the embedded base, from the folder that memjax made of it.

    python tests/goldens/make_smollm2.py FOLDER [GGUF]

It holds texts with their ids, and for a prompt of ids [T] the float32 logits [T, len(COLUMNS)] of some tokens, the best
token at every position, and 24 greedy tokens. Given the GGUF file too, transformers' own reading of it must agree: same
ids, and the same weights up to rounding to bfloat16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
COLUMNS = np.arange(0, 49152, 499)
PASSAGE = (
    "The harbour of Quillmar has one ferry, the Osprey, which leaves at 07:45 from gate 12. Captain Inge Dahlström "
    "has sailed it since 1998. When does the ferry leave, and who is its captain?"
)
TEXTS = [
    PASSAGE,
    "  two  spaces\n\n\tand a tab \r\n",
    "naïve café 你好 🙂🇬🇧 don't I'LL x2y 1234567890 3.14",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|",
    "def f(x):\n    return {'a': x ** 2}  # comment\n",
]
# The original tokenizer and llama.cpp split these numerals too; transformers' reading of the GGUF file does not.
NUMERALS = "١٢ ½ Ⅷ"


def main(folder: str, gguf: str | None = None) -> None:
    """Writes the golden."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [tokenizer(text, add_special_tokens=False).input_ids for text in [*TEXTS, NUMERALS]]
    if gguf is not None:
        check(model, texts[:-1], gguf)
    chat = [{"role": "user", "content": PASSAGE}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    meta = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "passage": PASSAGE,
        "texts": [*TEXTS, NUMERALS],
    }
    np.savez_compressed(
        HERE / "smollm2.npz",
        meta=np.array(json.dumps(meta)),
        text_ids=np.array(json.dumps(texts)),
        ids=ids[0].numpy().astype(np.int32),
        columns=COLUMNS,
        logits=logits[:, COLUMNS],
        best=logits.argmax(-1).astype(np.int32),
        greedy=greedy[0, ids.shape[1] :].numpy().astype(np.int32),
    )
    print(tokenizer.decode(greedy[0, ids.shape[1] :]))


def check(model: torch.nn.Module, texts: list[list[int]], gguf: str) -> None:
    """Stops unless transformers reads the same tokenizer and weights from the GGUF file itself."""
    path = Path(gguf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS] != texts:
        raise SystemExit("the tokenizer in the folder is not the one in the GGUF file")
    original = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    weights = dict(original.named_parameters())
    for name, ours in model.named_parameters():
        if not torch.equal(ours, weights[name].to(torch.bfloat16).float()) and not torch.equal(ours, weights[name]):
            raise SystemExit(f"{name} is not that of the GGUF file")


if __name__ == "__main__":
    main(*sys.argv[1:])
