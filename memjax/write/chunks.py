"""A text that is too long to be read at once, in chunks that are compiled one after the other (arXiv 2602.21221 tells of
none; the ways are AutoCompressor's, arXiv 2305.14788, and that of separately written caches, arXiv 2506.06266)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from memjax.errors import InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.buffer import Buffer
from memjax.models.base import Base
from memjax.models.buffers import buffer_prefix, check_reach, rotate_layers
from memjax.models.generate import Prefix, bucket, read_prefix
from memjax.write.compile_config import CompileConfig
from memjax.write.reading import Split, question_room, split_prompts
from memjax.write.tasks import LEAST_WINDOW, longest_cue, window_room

_WORD = re.compile(r"\s*\S{1,32}")
_SLACK = 24  # tokens that a cut may lie aside of its place, so that it falls between two sentences
_SHORTEST = 96  # tokens of the shortest chunk that is worth a compilation of its own


def chunk_texts(base: Base, split: Split, text: str, config: CompileConfig) -> list[str]:
    """The text itself where the base can read it at once, with slots and tasks behind it; else its chunks, in order.

    As few chunks of like lengths as fit the window behind the slots of all others, cut between sentences where one ends
    near by. InputError where the slots alone leave no room for a chunk.
    """
    tokens, ratio = len(split.context), config.ratio
    if window_room(base, split, config) >= LEAST_WINDOW and (not config.chunk or tokens <= config.chunk):
        return [text]
    reads = max(question_room(base.config.max_positions), longest_cue(split, config) + config.window)
    window = base.config.max_positions - len(split.header) - reads - 2 * _SLACK
    shortest = min(_SHORTEST, config.chunk or _SHORTEST)
    for count in range(2, max(2, math.ceil(tokens / shortest)) + 1):
        size, slots = math.ceil(tokens / count), math.ceil(tokens / ratio) + count
        if slots + size <= window and (not config.chunk or size <= config.chunk):
            check_reach(base.config, np.arange(slots), slots)
            return cut_text(text, count, lambda part: len(base.tokenizer.encode(part)))
    raise InputError(
        f"the text has {tokens:,} tokens, of which the base reads {base.config.max_positions:,} at once: beside the "
        f"{math.ceil(tokens / ratio):,} slots of a ratio of {ratio:g} there is no room for chunks of "
        f"{shortest} or more tokens; give a larger ratio or a shorter text"
    )


def cut_text(text: str, count: int, size: Callable[[str], int]) -> list[str]:
    """The text in `count` pieces of about one size, cut behind a sentence where one ends within a few tokens."""
    words = _WORD.findall(text)
    ends = np.cumsum([size(word) for word in words])
    slack = min(_SLACK, int(ends[-1]) // (4 * count))
    closes = np.asarray([word[-1] in ".!?" or "\n" in after for word, after in itertools.pairwise(words)])
    places = [0]
    for number in range(1, count):
        aside = np.abs(ends[:-1] - ends[-1] * number / count)
        near = np.where(closes & (aside <= slack), aside, np.inf)
        places.append(1 + int((near if np.isfinite(near).any() else aside).argmin()))
    return ["".join(words[a:b]).strip() for a, b in zip(places, [*places[1:], len(words)], strict=True)]


class Chunks:
    """What is read before each chunk of a text, from the slots of those that are written. All have one shape."""

    def __init__(self, base: Base, split: Split, count: int, sequential: bool) -> None:
        """count: an upper bound of all chunks' slots."""
        self._base, self._sequential, self._places = base, sequential, bucket(count)
        self._header = read_prefix(base.model, base.params, split.header)
        self.done: list[Buffer] = []

    def before(self) -> Prefix:
        """The header, and behind it the slots of all chunks that are written, or their empty places where chunks are
        independent: what follows stands where it will stand when all are read together."""
        config, header = self._base.config, int(self._header.length)
        count = sum(buffer.slots for buffer in self.done)
        shape = (config.num_layers, self._places, config.num_kv_heads, config.head_size)
        k = v = jnp.zeros(shape, self._header.segment.k.dtype)
        at = np.full(self._places, -1, np.int32)
        if self._sequential and self.done:
            at[:count] = header + np.arange(count)
            whole = join_chunks(self.done)
            k, v = k.at[:, :count].set(rotate_layers(config, whole.k, at[:count])), v.at[:, :count].set(whole.v)
        segment = Segment(k[:, None], v[:, None], jnp.asarray(at)[None])
        return buffer_prefix(self._header.segment, segment, header + count)


def join_chunks(buffers: list[Buffer]) -> Buffer:
    """One compact buffer of a text's chunks, behind the one header that they share."""
    k, v = (jnp.concatenate([getattr(buffer, name) for buffer in buffers], axis=1) for name in ("k", "v"))
    return Buffer(k, v, buffers[0].header, sum(buffer.context for buffer in buffers), "compact")


def split_chunks(base: Base, split: Split, texts: list[str]) -> list[Split]:
    """The chunks' own prompts; before any work, since a chunk may melt into what stands around it (InputError)."""
    return [split_prompts(base.tokenizer, split.style, text) for text in texts]
