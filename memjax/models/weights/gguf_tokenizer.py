"""The tokenizer inside a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

The JSON is written here field by field, not by the `tokenizers` library, so that its bytes and hence the tokenizer's id
do not depend on a library version.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from memjax.errors import WeightsError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # gguf.TokenType
SPACE = "\u2581"  # SentencePiece writes a space as ▁
Json = dict[str, Any]

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> Json:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_DIGITS: Json = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
}
# tokenizer.ggml.pre -> (pre-tokenizer, normalizer, whether a word that is in the vocabulary skips the merges)
PRE_TOKENIZERS: dict[str, tuple[Json, Json | None, bool]] = {
    "gpt-2": (_byte_level(True), None, False),
    "smollm": (_DIGITS, None, False),
    "starcoder": (_DIGITS, None, False),
    "llama-bpe": (_split(_LLAMA3_SPLIT), None, True),
    "llama-v3": (_split(_LLAMA3_SPLIT), None, True),
    "llama3": (_split(_LLAMA3_SPLIT), None, True),
    "qwen2": (_split(_QWEN2_SPLIT), {"type": "NFC"}, False),
    "deepseek-r1-qwen": (_split(_QWEN2_SPLIT), None, False),
    "tekken": (_split(_TEKKEN_SPLIT), None, True),
}


def tokenizer_files(metadata: Json, where: str) -> dict[str, Json]:
    """{"tokenizer.json": ..., "tokenizer_config.json": ...} from a GGUF file's metadata.

    `where` names the file in errors. WeightsError for a kind of tokenizer that cannot be rebuilt exactly.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise WeightsError(f"{where} holds no tokenizer; use the base's Hugging Face folder")
    if kind == "gpt2":
        pieces = _byte_level_bpe(metadata, tokens, where)
    elif kind == "llama":
        pieces = _sentencepiece_bpe(metadata, tokens)
    else:
        raise WeightsError(
            f"{where} has a tokenizer of kind {kind!r}, which memjax cannot rebuild; supported: gpt2, llama; "
            "use the base's Hugging Face folder"
        )
    document = {"version": "1.0", "truncation": None, "padding": None, **pieces}
    try:
        tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(f"{where} has a tokenizer whose parts do not fit: {error}") from None
    return {"tokenizer.json": document, "tokenizer_config.json": _config(metadata, tokens)}


def _byte_level_bpe(metadata: Json, tokens: list[str], where: str) -> Json:
    """GPT-2's kind: text as bytes spelt in 256 printable characters, merges listed in the file."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = metadata.get("tokenizer.ggml.merges")
    if pre not in PRE_TOKENIZERS or merges is None:
        lacks = "no merges" if merges is None else f"pre-tokenizer {pre!r}"
        raise WeightsError(
            f"{where} has a tokenizer with {lacks}; supported: {', '.join(PRE_TOKENIZERS)}; "
            "use the base's Hugging Face folder"
        )
    pre_tokenizer, normalizer, ignore_merges = PRE_TOKENIZERS[pre]
    return {
        "added_tokens": _added(metadata, tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(metadata, tokens, default_bos=False),
        "decoder": _byte_level(True),
        "model": _bpe(_vocab(metadata, tokens), [merge.split(" ") for merge in merges], ignore_merges=ignore_merges),
    }


def _sentencepiece_bpe(metadata: Json, tokens: list[str]) -> Json:
    """SentencePiece's BPE: spaces as ▁, unknown characters as bytes, merges implied by the order of the vocabulary.

    Gemma files spell tokens of several spaces with real spaces, and their scores do not follow the merge order, while
    the position in the file does. Elsewhere the score is the order.
    """
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    if gemma:
        tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocab = _vocab(metadata, tokens)
    scores = metadata.get("tokenizer.ggml.scores") or []
    by_place = gemma or not scores
    rank = {token: float(-index if by_place else scores[index]) for token, index in vocab.items()}
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", not gemma))
    to_marks: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer = to_marks
    if prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, to_marks]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    return {
        "added_tokens": _added(metadata, tokens),
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": _post_processor(metadata, tokens, default_bos=True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocab,
            implied_merges(vocab, rank),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback="<0x00>" in vocab,
        ),
    }


def implied_merges(vocab: dict[str, int], rank: dict[str, float]) -> list[list[str]]:
    """The merges of a SentencePiece BPE vocabulary: every way to cut a token into two tokens, best rank first.

    Cuts of one token come in vocabulary order of their halves, as `transformers` orders them.
    """
    merges: list[tuple[float, int, int, str, str]] = []
    for token in vocab:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        cuts.sort(key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        merges += [(-rank[token], -len(left), -len(right), left, right) for left, right in cuts]
    merges.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in merges]


def _vocab(metadata: Json, tokens: list[str]) -> dict[str, int]:
    """{token: id} without the rows that only pad the embedding matrix."""
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    padding = re.compile(r"\[PAD\d+\]")
    return {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if not (kind == UNUSED and padding.fullmatch(token))
    }


def _added(metadata: Json, tokens: list[str]) -> list[Json]:
    """Tokens that are matched whole in the text: control tokens (special) and those the user defined (not special)."""
    types = metadata.get("tokenizer.ggml.token_type") or []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": tokens[index], **flags, "special": kind == CONTROL}
        for index, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]


def _post_processor(metadata: Json, tokens: list[str], default_bos: bool) -> Json | None:
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", default_bos):
        return None
    start = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }


def _bpe(
    vocab: dict[str, int],
    merges: list[list[str]],
    *,
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _config(metadata: Json, tokens: list[str]) -> Json:
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    for name, key in keys.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        if index is not None and index < len(tokens):
            config[name] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    return config
