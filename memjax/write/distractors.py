"""Other buffers beside the one that is compiled: what trains it for being read among several (Cartridges at Scale, arXiv
2606.04557, trains with as many as will be loaded; arXiv 2602.21221 tests one buffer alone)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.buffer import Buffer
from memjax.models.buffers import check_reach, rotate_layers
from memjax.models.config import ModelConfig

POOL = 4  # buffers to draw from, for each that is present at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Others:
    """Frozen buffers of other texts: k (before RoPE), v [P, L, S, K, H], filled up to the longest's slots; size int32 [P],
    the slots of each; share float32 []: of the steps that have some beside; most: how many at once."""

    k: jax.Array
    v: jax.Array
    size: jax.Array
    share: jax.Array
    most: int = dataclasses.field(metadata={"static": True})


class Beside(NamedTuple):
    """Which buffers stand beside in one step: chosen int32 [most] of `Others`, of which the first `present` do; the buffer
    that is compiled comes after the first `place` of them."""

    chosen: jax.Array
    present: jax.Array
    place: jax.Array


def make_others(config: ModelConfig, buffers: Sequence[Buffer], most: int, share: float, header: int) -> Others:
    """The pool of distractors, of which up to `most` stand beside at once. InputError where there is none, one was written
    behind another header, or slots of that many would not be seen."""
    if not buffers:
        raise InputError("training with distractors wants other buffers; compile some texts into the bank first")
    if any(buffer.header != header for buffer in buffers):
        raise InputError("a distractor was written with another prompt style; leave it out, or write it again")
    longest = max(buffer.slots for buffer in buffers)
    fill = lambda x: jnp.pad(jnp.asarray(x), ((0, 0), (0, longest - x.shape[1]), (0, 0), (0, 0)))
    k, v = (jnp.stack([fill(getattr(buffer, name)) for buffer in buffers]) for name in ("k", "v"))
    size = np.asarray([buffer.slots for buffer in buffers], np.int32)
    most = min(most, len(buffers))
    slots = int(np.sort(size)[-most:].sum())
    check_reach(config, np.arange(slots), slots)
    return Others(k, v, jnp.asarray(size), jnp.float32(share), most=most)


def draw_beside(others: Others, key: jax.Array) -> Beside:
    """With the probability `share` 1 ... `most` of the others, drawn anew, in any order and place; else none."""
    on, number, order, place = jax.random.split(key, 4)
    some = jax.random.randint(number, (), 1, others.most + 1)
    present = jnp.where(jax.random.bernoulli(on, others.share), some, 0)
    chosen = jax.random.permutation(order, others.size.shape[0])[: others.most]
    return Beside(chosen, present, jax.random.randint(place, (), 0, present + 1))


def all_beside(others: Others) -> Beside:
    """As many as there may be, half of them before the buffer: what is read where losses are held out."""
    return Beside(jnp.arange(others.most), jnp.int32(others.most), jnp.int32(others.most // 2))


def place_beside(
    config: ModelConfig, others: Others, beside: Beside, read_at: jax.Array, start: jax.Array, following: jax.Array
) -> tuple[Segment, jax.Array, jax.Array]:
    """(the others as a segment, positions [M] of the compiled slots, position of what is read after all of them).

    read_at, following: those of the buffer alone, which stay where no other is present. Where some are, all lie one after
    the other from `start` on, as `models.buffers.read_buffers` shifts them.
    """
    number = jnp.arange(others.most)
    size = jnp.where(number < beside.present, others.size[beside.chosen], 0)
    own = (read_at >= 0).sum()
    before = jnp.where(number < beside.place, size, 0).sum()
    begin = start + jnp.cumsum(size) - size + jnp.where(number >= beside.place, own, 0)
    slot = jnp.arange(others.k.shape[2])
    at = jnp.where(slot < size[:, None], begin[:, None] + slot, -1).reshape(-1)
    flat = lambda x: x[beside.chosen].swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    segment = Segment(rotate_layers(config, flat(others.k), at)[:, None], flat(others.v)[:, None], at[None])
    shifted = jnp.where(read_at >= 0, start + before + jnp.arange(read_at.shape[0]), -1)
    some = beside.present > 0
    after = jnp.where(some, start + size.sum() + own, following)
    return segment, jnp.where(some, shifted, read_at), after
