"""Answers of lessons packed into the rows of a training step, several to a row, each with its own cached prompt."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from memjax.kernels.segment_attention import Segment
from memjax.write.teacher import Array, Lesson

ANSWERS = 4  # answers to a row at most: more cached prompts to a row are more keys that its other answers must pass over


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed answers: B rows of T tokens, and beside each row the S cached tokens of its answers' prompts.

    inputs, positions, owner int32 [B, T]: tokens (or hidden states [B, T, D], as in `Lesson`), their positions and which
    answer of the row they belong to, -1 for padding; target int32, logp float32 [B, T, k], weight float32 [B, T] as in
    `Lesson`; read bool [B, T]: the answer is about the text and not replay; k, v [L, B, S, K, H], place, holder int32
    [B, S]: the cached prompts, their positions and the answer that each belongs to; header: what all prompts begin with.
    """

    header: Segment
    k: Array
    v: Array
    place: Array
    holder: Array
    inputs: Array
    positions: Array
    owner: Array
    target: Array
    logp: Array
    weight: Array
    read: Array


class Packer:
    """A batch under construction. Its shapes depend on `rows`, `tokens` and the widths of the lessons' prompts alone.

    lesson: the text's; replay: none, or one that shares header, marker and k with it.
    """

    def __init__(self, lesson: Lesson, replay: Lesson | None, rows: int, tokens: int) -> None:
        self._lesson = lesson
        self._width = max(one.place.shape[1] for one in (lesson, replay) if one is not None)
        layers, _, _, heads, size = lesson.k.shape
        keys = (layers, rows, ANSWERS, self._width, heads, size)
        self._k, self._v = np.zeros(keys, lesson.k.dtype), np.zeros(keys, lesson.k.dtype)
        self._place = np.full(keys[1:4], -1, np.int32)
        shape, top_k = (rows, tokens), lesson.target.shape[-1]
        self._flat = {
            "inputs": np.zeros((*shape, *lesson.inputs.shape[2:]), lesson.inputs.dtype),
            "positions": np.full(shape, -1, np.int32),
            "target": np.zeros((*shape, top_k), np.int32),
            "logp": np.zeros((*shape, top_k), np.float32),
            "weight": np.zeros(shape, np.float32),
        }
        self._owner, self._read = np.full(shape, -1, np.int32), np.zeros(shape, bool)
        self._used, self._answers = [0] * rows, [0] * rows

    def add(self, source: Lesson, index: int) -> bool:
        """Puts answer `index` of a lesson into the first row with room for it; False where there is none."""
        count, tokens = length(source, index), self._owner.shape[1]
        row = next((r for r, n in enumerate(self._used) if n + count <= tokens and self._answers[r] < ANSWERS), None)
        if row is None:
            return False
        number, held = self._answers[row], source.place.shape[1]
        self._k[:, row, number, :held], self._v[:, row, number, :held] = source.k[:, index], source.v[:, index]
        self._place[row, number, :held] = source.place[index]
        at = slice(self._used[row], self._used[row] + count)
        for name, values in self._flat.items():
            values[row, at] = getattr(source, name)[index, :count]
        self._owner[row, at], self._read[row, at] = number, source is self._lesson
        self._used[row] += count
        self._answers[row] += 1
        return True

    def batch(self) -> Batch:
        """The batch as it stands."""
        layers, rows, answers, width, heads, size = self._k.shape
        k, v = (x.reshape(layers, rows, answers * width, heads, size) for x in (self._k, self._v))
        holder = np.tile(np.repeat(np.arange(answers, dtype=np.int32), width), (rows, 1))
        place = self._place.reshape(rows, -1)
        return Batch(self._lesson.header, k, v, place, holder, owner=self._owner, read=self._read, **self._flat)


def length(lesson: Lesson, index: int) -> int:
    """How many tokens an answer takes in a row."""
    return int((lesson.positions[index] >= 0).sum())
