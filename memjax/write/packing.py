"""Many short continuations of one prefix, read side by side in packed rows: no padding to the longest, one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from memjax.kernels.segment_attention import Segment
from memjax.models.decoder import Model, Params, empty_cache, forward, unembed
from memjax.models.generate import Prefix, bucket
from memjax.sharding import fetch

ROW = 256  # tokens of a packed row, unless one sequence is longer
ROWS = 2  # rows read at once
SCORED = 32  # answers whose vocabulary logits are held at once


@dataclasses.dataclass(frozen=True)
class Packed:
    """Token sequences packed into rows [rows, width]: `ids`, `offset` (place within its sequence, -1 is padding),
    `owner` (which sequence, -1 is none), and `places`: (row, first column, length) of each sequence."""

    ids: np.ndarray
    offset: np.ndarray
    owner: np.ndarray
    places: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Packed:
        """Pack first-fit, longest first; sequences stay whole."""
        width = max(ROW, bucket(max(len(s) for s in sequences)))
        places = first_fit([len(s) for s in sequences], width)
        rows = -(-(1 + max(row for row, _, _ in places)) // ROWS) * ROWS
        ids = np.zeros((rows, width), np.int32)
        offset, owner = np.full((rows, width), -1, np.int32), np.full((rows, width), -1, np.int32)
        for i, (row, begin, length) in enumerate(places):
            ids[row, begin : begin + length] = sequences[i]
            offset[row, begin : begin + length] = np.arange(length)
            owner[row, begin : begin + length] = i
        return cls(ids, offset, owner, places)

    def take(self, values: np.ndarray, index: int) -> np.ndarray:
        """The part of values [rows, width, ...] that belongs to a sequence."""
        row, begin, length = self.places[index]
        return values[row, begin : begin + length]


def first_fit(lengths: Sequence[int], width: int) -> tuple[tuple[int, int, int], ...]:
    """(row, first column, length) of sequences of these lengths in rows of `width`, longest first, each whole."""
    free: list[int] = []
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), len(free))
        if row == len(free):
            free.append(width)
        places[i] = (row, width - free[row], lengths[i])
        free[row] -= lengths[i]
    return tuple(places)


def read_hidden(model: Model, params: Params, packed: Packed, prefix: Prefix) -> np.ndarray:
    """Final hidden states [rows, width, D] of packed sequences that each continue `prefix`."""
    return np.concatenate([fetch(_hidden(model, params, *part, prefix.segment)) for part in _parts(packed, prefix)])


def read_keys(model: Model, params: Params, packed: Packed, prefix: Prefix, width: int) -> tuple[np.ndarray, np.ndarray]:
    """k (rotated), v [L, n, width, K, H] of packed sequences that each continue `prefix`, zeros behind a sequence's end."""
    config = model.config
    shape = (config.num_layers, len(packed.places), width, config.num_kv_heads, config.head_size)
    dtype = params["embed"].dtype
    k, v = np.zeros(shape, dtype), np.zeros(shape, dtype)
    for part, (keys, values) in enumerate(_keys(model, params, *x, prefix.segment) for x in _parts(packed, prefix)):
        keys, values = fetch((keys, values))
        for i, (row, begin, length) in enumerate(packed.places):
            if row // ROWS == part:
                k[:, i, :length] = keys[:, row % ROWS, begin : begin + length]
                v[:, i, :length] = values[:, row % ROWS, begin : begin + length]
    return k, v


def top_k_logp(model: Model, params: Params, hidden: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """`top_logp` [n, T, k] of hidden states [n, T, D], a few answers' vocabulary logits at a time."""
    parts = [top_logp(model, params, part, top_k=top_k) for part in _scored_parts(hidden)]
    ids, logp = (np.concatenate([fetch(part[j]) for part in parts])[: len(hidden)] for j in (0, 1))
    return ids, logp


def log_norms(model: Model, params: Params, hidden: np.ndarray) -> np.ndarray:
    """Log-sum-exp [n, T] of the logits of hidden states [n, T, D], float32: what log-probabilities lack to be logits."""
    parts = [fetch(_log_norm(model, params, part)) for part in _scored_parts(hidden)]
    return np.concatenate(parts)[: len(hidden)]


def _scored_parts(hidden: np.ndarray) -> list[np.ndarray]:
    rows = min(SCORED, bucket(len(hidden)))
    padded = np.pad(hidden, ((0, -len(hidden) % rows), (0, 0), (0, 0)))
    return [padded[i : i + rows] for i in range(0, len(padded), rows)]


@partial(jax.jit, static_argnums=0)
def _log_norm(model: Model, params: Params, hidden: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(unembed(model, params, hidden), axis=-1)


def _parts(packed: Packed, prefix: Prefix) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    positions = np.where(packed.offset >= 0, packed.offset + int(prefix.length), -1).astype(np.int32)
    for begin in range(0, len(packed.ids), ROWS):
        rows = slice(begin, begin + ROWS)
        yield packed.ids[rows], positions[rows], packed.owner[rows]


@partial(jax.jit, static_argnums=0)
def _hidden(
    model: Model, params: Params, ids: jax.Array, positions: jax.Array, owner: jax.Array, prefix: Segment
) -> jax.Array:
    return forward(model, params, ids, positions, visible=owner, segments=(prefix,)).hidden


@partial(jax.jit, static_argnums=0)
def _keys(
    model: Model, params: Params, ids: jax.Array, positions: jax.Array, owner: jax.Array, prefix: Segment
) -> tuple[jax.Array, jax.Array]:
    rows, width = ids.shape
    cache = empty_cache(model.config, rows, width, params["embed"])
    same = owner[:, :, None] == owner[:, None, :]
    visible = jnp.concatenate([jnp.zeros_like(same), same], axis=-1)
    out = forward(model, params, ids, positions, cache, visible=visible, segments=(prefix,))
    assert out.cache is not None
    return out.cache.k, out.cache.v


@partial(jax.jit, static_argnums=0, static_argnames=("top_k",))
def top_logp(model: Model, params: Params, hidden: jax.Array, *, top_k: int) -> tuple[jax.Array, jax.Array]:
    """(ids int32, log-probabilities float32 over the full vocabulary) [..., k] of final hidden states [..., D]."""
    logp = jax.nn.log_softmax(unembed(model, params, hidden), axis=-1)
    values, ids = jax.lax.top_k(logp, top_k)
    return ids.astype(jnp.int32), values
