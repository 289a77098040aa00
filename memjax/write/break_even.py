"""After how many questions a compiled buffer has paid for its compilation (arXiv 2602.21221 counts no such cost)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from memjax.memory.buffer import Buffer
from memjax.models.base import Base
from memjax.models.buffers import buffer_prefix, read_buffer
from memjax.models.generate import Sampling, generate_all, read_prefix
from memjax.write.prompts import UNLIKE, PromptStyle
from memjax.write.reading import split_prompts

_RUNS = 3


def reading_seconds(base: Base, style: PromptStyle, text: str, buffer: Buffer) -> tuple[float | None, float]:
    """Seconds to the first token of an answer: (with the text in the prompt, behind the buffer of it).

    None for a text that the base cannot read at once: then nothing but the buffer answers from all of it.

    The least of a few runs each, on this machine as it is, one question at a time; programs are compiled before. The
    prompt's beginning and the buffer are read already, as they are where a bank serves them.
    """
    split = split_prompts(base.tokenizer, style, text)
    tail = split.tail(UNLIKE[0])
    header = read_prefix(base.model, base.params, split.header)
    slots = buffer_prefix(header.segment, *read_buffer(base.config, buffer))
    one = Sampling(max_tokens=1)
    stops = base.tokenizer.eos_ids
    whole = lambda: generate_all(base.model, base.params, [[*split.context, *tail]], stops, one, prefix=header)
    short = lambda: generate_all(base.model, base.params, [tail], stops, one, prefix=slots)
    fits = len(split.header) + len(split.context) + len(tail) + 1 <= base.config.max_positions
    return _least(whole) if fits else None, _least(short)


def break_even(seconds: float, with_text: float | None, with_buffer: float) -> int | None:
    """The number of questions that make up for `seconds` of compiling; None where a buffer is not read faster, or there is
    no other way to read the text."""
    if with_text is None:
        return None
    saved = with_text - with_buffer
    return math.ceil(seconds / saved) if saved > 0 else None


def _least(run: Callable[[], object]) -> float:
    run()
    taken = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)
