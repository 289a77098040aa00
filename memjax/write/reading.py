"""A reading prompt in its parts: header, context, and the tail that asks; a buffer takes the context's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from memjax.errors import InputError
from memjax.models.generate import common_prefix
from memjax.models.tokenizer import Tokenizer
from memjax.write.prompts import UNLIKE, Message, PromptStyle, read_tokens

QUESTION_ROOM = 96  # tokens of the window kept for a question about a text and its answer
_BEGINNINGS = ("7 of them", "Zebra", "in")  # contexts that begin with different tokens


@dataclasses.dataclass(frozen=True)
class Split:
    """A reading prompt in its parts: header, context, and what follows for a question: header + context + tail(question).

    The seam between text and question belongs to the context, so that a tail depends on the question alone.
    """

    header: tuple[int, ...]
    context: tuple[int, ...]
    tokenizer: Tokenizer
    style: PromptStyle

    def tail(self, question: str) -> list[int]:
        """The tokens of the prompt behind the context, up to where the answer begins."""
        return tail_tokens(self.tokenizer, self.style, question)


def split_prompts(tokenizer: Tokenizer, style: PromptStyle, text: str) -> Split:
    """A text's reading prompt in its parts; InputError for a text that is empty or melts into the header."""
    text = text.lstrip()
    if not text.strip():
        raise InputError("the text is empty; give it something to remember")
    header = header_tokens(tokenizer, style)
    whole, other = (read_tokens(tokenizer, style, text, question) for question in UNLIKE)
    if whole[: len(header)] != header:
        raise InputError(f"the text's beginning {text[:12]!r} melts into the prompt before it; begin it with a plain word")
    return Split(tuple(header), tuple(whole[len(header) : common_prefix([whole, other])]), tokenizer, style)


def header_tokens(tokenizer: Tokenizer, style: PromptStyle) -> list[int]:
    """What every reading prompt of a style begins with, whatever the context is."""
    read = [read_tokens(tokenizer, style, context, UNLIKE[0]) for context in _BEGINNINGS]
    return read[0][: common_prefix(read)]


def tail_tokens(tokenizer: Tokenizer, style: PromptStyle, question: str, history: Sequence[Message] = ()) -> list[int]:
    """What follows a context in a reading prompt, whatever the context is, up to where the answer begins."""
    seam = common_prefix([read_tokens(tokenizer, style, "A text.", asked) for asked in UNLIKE])
    return read_tokens(tokenizer, style, "A text.", question, history)[seam:]
