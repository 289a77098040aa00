"""A reading prompt in its parts: header, context, and the tail that asks; a buffer takes the context's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from memjax.errors import InputError
from memjax.models.generate import common_prefix
from memjax.models.tokenizer import Tokenizer
from memjax.write.prompts import UNLIKE, Message, PromptStyle, read_tokens

_BEGINNINGS = ("7 of them", "Zebra", "in")  # contexts that begin with different tokens
_ENDINGS = ("A text.", "is it 7", "Zebra?")  # contexts that end with different tokens


def question_room(window: int) -> int:
    """Tokens of a base's window that are kept for a question about a text and its answer: a tenth, and at most 96."""
    return min(96, window // 10)


@dataclasses.dataclass(frozen=True)
class Split:
    """A reading prompt in its parts: header, context, and what follows for a question: header + context + tail(question).

    The tail begins with what the chat template puts behind any text. Slots stand for the text alone: a turn's marker among
    them would have to be compressed with it, and a copy of the context behind the context would be read as a question.
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
    whole, tail = read_tokens(tokenizer, style, text, UNLIKE[0]), tail_tokens(tokenizer, style, UNLIKE[0])
    if whole[: len(header)] != header:
        raise InputError(f"the text's beginning {text[:12]!r} melts into the prompt before it; begin it with a plain word")
    if whole[-len(tail) :] != tail:
        raise InputError(f"the text's end {text[-12:]!r} melts into the prompt behind it; end it with a full stop")
    return Split(tuple(header), tuple(whole[len(header) : -len(tail)]), tokenizer, style)


def header_tokens(tokenizer: Tokenizer, style: PromptStyle) -> list[int]:
    """What every reading prompt of a style begins with, whatever the context is."""
    read = [read_tokens(tokenizer, style, context, UNLIKE[0]) for context in _BEGINNINGS]
    return read[0][: common_prefix(read)]


def tail_tokens(tokenizer: Tokenizer, style: PromptStyle, question: str, history: Sequence[Message] = ()) -> list[int]:
    """What follows a context in a reading prompt, whatever the context is, up to where the answer begins."""
    read = [read_tokens(tokenizer, style, context, question, history) for context in _ENDINGS]
    return read[0][-common_prefix([tokens[::-1] for tokens in read]) :]
