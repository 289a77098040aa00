"""The tasks of a step of compilation in packed rows: no padding to the longest, and vocabulary logits where answers are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from memjax.models.generate import bucket
from memjax.write.packing import first_fit
from memjax.write.tasks import Tasks
from memjax.write.teacher import Array

WIDTH = 128  # tokens of a row, unless a task is longer
EVEN = 2  # rows are counted in these, so that texts of like lengths share a program


class Room(NamedTuple):
    """The shape of packed tasks: rows [R], tokens of a row [W], answer tokens of all rows together [A]."""

    rows: int
    width: int
    answers: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTasks:
    """Tasks side by side in R rows of W tokens, of which A predict an answer.

    inputs int32 [R, W]; offset int32 [R, W]: places counted from the first token behind the context, -1 for padding; owner
    int32 [R, W]: the number of the task, which sees no other, -1 for padding. at int32 [A]: where, in the rows one after
    the other, answer tokens are predicted; target int32, logp float32 [A, k] and norm float32 [A] as in `Tasks`. share
    {kind: float32 [A]}: what each answer token counts in the mean of its kind, 0 for other kinds' and for padding.
    """

    inputs: Array
    offset: Array
    owner: Array
    at: Array
    target: Array
    logp: Array
    share: dict[str, Array]
    norm: Array | None = None


def room_for(steps: Iterable[Mapping[str, Tasks]]) -> Room:
    """The least room that holds the tasks of each of the steps."""
    found = [(_lengths(tasks), sum(int((some.weight > 0).sum()) for some in tasks.values())) for tasks in steps]
    longest = max(max(lengths) for lengths, _ in found)
    width = max(WIDTH, bucket(longest))
    rows = max(1 + max(row for row, _, _ in first_fit(lengths, width)) for lengths, _ in found)
    return Room(-(-rows // EVEN) * EVEN, width, bucket(max(answers for _, answers in found)))


def pack_tasks(tasks: Mapping[str, Tasks], room: Room | None = None) -> PackedTasks:
    """The tasks of a step, by kind, in as much room as is given or as they need.

    A kind's loss is a mean over each task's answer tokens, then over its tasks: long continuations do not drown short
    answers.
    """
    rows, width, answers = room or room_for([tasks])
    inputs = np.zeros((rows, width), np.int32)
    offset, owner = np.full((rows, width), -1, np.int32), np.full((rows, width), -1, np.int32)
    first = next(iter(tasks.values()))
    at, kept = np.zeros(answers, np.int32), (answers, first.target.shape[-1])
    target, logp = np.zeros(kept, np.int32), np.zeros(kept, np.float32)
    norm = None if first.norm is None else np.zeros(answers, np.float32)
    share: dict[str, Array] = {kind: np.zeros(answers, np.float32) for kind in tasks}
    places, filled, number = first_fit(_lengths(tasks), width), 0, 0
    for kind, some in tasks.items():
        for i in range(len(some.inputs)):
            row, begin, length = places[number]
            inputs[row, begin : begin + length] = some.inputs[i, :length]
            offset[row, begin : begin + length] = some.offset[i, :length]
            owner[row, begin : begin + length] = number
            asked = np.flatnonzero(some.weight[i])
            to = slice(filled, filled + len(asked))
            at[to] = row * width + begin + asked
            target[to], logp[to] = some.target[i, asked], some.logp[i, asked]
            share[kind][to] = 1 / (len(asked) * len(some.inputs))
            if norm is not None and some.norm is not None:
                norm[to] = some.norm[i, asked]
            filled, number = filled + len(asked), number + 1
    return PackedTasks(inputs, offset, owner, at, target, logp, share, norm)


def _lengths(tasks: Mapping[str, Tasks]) -> list[int]:
    return [int(length) for some in tasks.values() for length in (np.asarray(some.offset) >= 0).sum(axis=1)]
