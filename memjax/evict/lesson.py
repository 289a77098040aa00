"""What eviction learns from: texts, and what comes behind each of them, read once by the frozen base with a full cache.

A batch of lessons is {ids, at: int32 [B, S], the texts, left-padded, with their positions, -1 for padding; behind, places,
owner: int32 [B, A], what is read behind each text (questions with answers, or how the text goes on) with positions that go
on from the text's, -1 for padding, and which of the readings of its text each token belongs to, from 1, 0 for padding;
asks: bool [B, A], the tokens whose attention counts}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.kernels.segment_attention import Segment
from memjax.models.decoder import Model, Params, empty_cache, forward
from memjax.models.generate import PREFILL_BLOCK

Lessons = Mapping[str, jax.Array]
CHUNK = 128  # queries whose weights over a whole text are held at once


class Studied(NamedTuple):
    """A batch of lessons as the base reads them: taps of the texts and of what stands behind, [L, B, …] each."""

    text: dict[str, jax.Array]
    behind: dict[str, jax.Array]


def study(model: Model, params: Params, lessons: Lessons, text: tuple[str, ...], behind: tuple[str, ...]) -> Studied:
    """All layers' taps from one forward pass of each part, `k` and `v` of the texts always among them.

    Every reading sees the text and itself only. Gradients end here: with frozen inputs layers are trained side by side.
    """
    first = _read(model, params, lessons["ids"], lessons["at"], tuple(dict.fromkeys((*text, "k", "v"))))
    held = [Segment(first["k"], first["v"], lessons["at"])]
    then = forward(
        model, params, lessons["behind"], lessons["places"], segments=held, visible=lessons["owner"], taps=behind
    ).taps
    return Studied(*jax.lax.stop_gradient((first, then)))


def _read(model: Model, params: Params, ids: jax.Array, at: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
    """Taps [L, B, S, …] of texts, which are read in blocks where they are long: attention then never sees S x S at once."""
    batch, length = ids.shape
    if length <= PREFILL_BLOCK:
        return forward(model, params, ids, at, taps=taps).taps
    more = -length % PREFILL_BLOCK
    ids, at = jnp.pad(ids, ((0, 0), (more, 0))), jnp.pad(at, ((0, 0), (more, 0)), constant_values=-1)
    count = ids.shape[1] // PREFILL_BLOCK
    blocks = lambda x: x.reshape(batch, count, PREFILL_BLOCK).swapaxes(0, 1)

    def step(cache: Any, block: tuple[jax.Array, ...]) -> tuple[Any, dict[str, jax.Array]]:
        ids, at, begin = block
        out = forward(model, params, ids, at, dataclasses.replace(cache, next=jnp.full_like(cache.next, begin)), taps=taps)
        return out.cache, out.taps

    begins = jnp.arange(count, dtype=jnp.int32) * PREFILL_BLOCK
    cache = empty_cache(model.config, batch, count * PREFILL_BLOCK, params["embed"])
    _, found = jax.lax.scan(step, cache, (blocks(ids), blocks(at), begins))

    def joined(x: jax.Array) -> jax.Array:
        """[blocks, L, B, T, …] as [L, B, S, …]."""
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, more:]

    return jax.tree.map(joined, found)
