"""A document in chunks: cut into equal pieces, each wrapped in the base's template again (arXiv 2602.15902, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from memjax.errors import InputError
from memjax.models.generate import common_prefix
from memjax.models.tokenizer import Tokenizer
from memjax.write.prompts import PromptStyle

_TEXTS = ("Zebra 7", "in the end, why?", "7 of them!")  # texts that begin and end with different tokens


class Affixes(NamedTuple):
    """What the template puts before and behind a document's own tokens."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def document_tokens(tokenizer: Tokenizer, style: PromptStyle, text: str) -> list[int]:
    """A document as the hypernetwork's base reads it: a user turn, up to where the model's turn begins.

    A base of the plain style has a place for a document before a question, which is left empty.
    """
    content = f"{text.strip()}\n\n" if style.name == "plain" else text.strip()
    return tokenizer.encode_chat([{"role": "user", "content": content}])


def affixes_of(tokenizer: Tokenizer, style: PromptStyle) -> Affixes:
    """What `document_tokens` puts around every document, found by comparing three of them."""
    read = [document_tokens(tokenizer, style, text) for text in _TEXTS]
    before = common_prefix(read)
    behind = common_prefix([tokens[before:][::-1] for tokens in read])
    return Affixes(tuple(read[0][:before]), tuple(read[0][len(read[0]) - behind :]))


def split_tokens(
    tokens: Sequence[int], affixes: Affixes, max_chunk: int, overlap: int = 0, window: int | None = None
) -> list[list[int]]:
    """The chunks of a wrapped document: contiguous pieces of one length, of up to `max_chunk` tokens, each wrapped again.

    Without overlap this is the reference's rule: n = ceil(tokens / max_chunk) pieces of ceil(tokens / n). With it,
    neighbours share `overlap` tokens, so that any `overlap` + 1 tokens in a row are whole in a piece. Affixes come on top.
    window: tokens that the base reads at once. InputError where tokens are not wrapped, or a chunk does not fit.
    """
    if not 0 <= overlap < max_chunk:
        raise InputError(f"chunks of {max_chunk} tokens cannot share {overlap}; give an overlap from 0 to below the chunk")
    added = len(affixes.prefix) + len(affixes.suffix)
    count = max(math.ceil((len(tokens) - overlap) / (max_chunk - overlap)), 1)
    if window is not None and min(max_chunk, len(tokens)) + added * (count > 1) > window:
        raise InputError(
            f"chunks of {max_chunk} tokens and {added} around them do not fit the base's window of {window}; "
            f"give chunks of at most {window - added}"
        )
    return split_evenly(tokens, affixes, count, overlap)


def split_evenly(tokens: Sequence[int], affixes: Affixes, count: int, overlap: int = 0) -> list[list[int]]:
    """A wrapped document in at most `count` chunks, each wrapped again; see `split_tokens`.

    Fewer where equal pieces of whole tokens cover it before the last.
    """
    prefix, suffix = list(affixes.prefix), list(affixes.suffix)
    tokens = list(tokens)
    ends = tokens[len(tokens) - len(suffix) :] == suffix
    if tokens[: len(prefix)] != prefix or not ends or len(tokens) <= len(prefix) + len(suffix):
        raise InputError("the document is empty or melts into the template around it; begin and end it with plain words")
    stride = max(math.ceil((len(tokens) - overlap) / count), 1)
    starts = [at for at in range(0, count * stride, stride) if at == 0 or at + overlap < len(tokens)]
    pieces = [tokens[at : at + stride + overlap] for at in starts]
    chunks = []
    for number, piece in enumerate(pieces):
        before = prefix if number else []
        behind = suffix if number < len(pieces) - 1 else []
        chunks.append([*before, *piece, *behind])
    return chunks
