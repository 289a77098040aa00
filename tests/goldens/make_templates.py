"""Makes templates.json: conversations as `transformers` renders them with templates/*.jinja.

    python tests/goldens/make_templates.py

smollm2.jinja is the template of SmolLM2-135M-Instruct, from its GGUF file. The others are written for this test after
the form of each family's published template: same control tokens, same Jinja constructs. whitespace.jinja is what
trimming of blocks decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers

HERE = Path(__file__).parent
SPECIAL: dict[str, dict[str, str]] = {
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3": {"eos_token": "<|im_end|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "gemma3": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "whitespace": {"eos_token": "</s>"},
}
USER = {"role": "user", "content": "  When does the ferry leave?\n"}
ANSWER = {"role": "assistant", "content": "At 7 <b>"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nAt 7."}
SYSTEM = {"role": "system", "content": "Be brief. 你好 🙂"}
TOOL = {"role": "tool", "content": "7 & 8"}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [USER], "add_generation_prompt": True},
    {"messages": [SYSTEM, USER], "add_generation_prompt": True},
    {"messages": [USER, ANSWER], "add_generation_prompt": False},
    {"messages": [USER, ANSWER, USER], "add_generation_prompt": True, "variables": {"enable_thinking": False}},
    {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER, USER], "add_generation_prompt": True},
    {"messages": [ANSWER, USER], "add_generation_prompt": True},
    {"messages": [USER, THOUGHT], "add_generation_prompt": False},
    {"messages": [USER], "add_generation_prompt": True, "variables": {"date_string": "1 May 2024"}},
    {"messages": [USER, TOOL, USER], "add_generation_prompt": True},
]


def main() -> None:
    """Renders every template on every conversation; `null` where the template refuses it."""
    goldens = []
    for name, special in SPECIAL.items():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
        backend.add_special_tokens(sorted(set(special.values())))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        template, cases = (HERE / "templates" / f"{name}.jinja").read_text(encoding="utf-8"), []
        for conversation in CONVERSATIONS:
            try:
                rendered = tokenizer.apply_chat_template(
                    conversation["messages"],
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=conversation["add_generation_prompt"],
                    **conversation.get("variables", {}),
                )
            except Exception as error:  # the template's own refusal
                rendered = None
                print(f"{name} refuses {[message['role'] for message in conversation['messages']]}: {error}")
            cases.append({**conversation, "rendered": rendered})
        goldens.append({"name": name, "special": special, "cases": cases})
    document = {"transformers": transformers.__version__, "templates": goldens}
    (HERE / "templates.json").write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
