"""Attention over segments in plain XLA: one softmax over the scores of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from memjax.kernels.segment_attention.api import Segment


def attend_reference(
    q: jax.Array,
    q_position: jax.Array,
    segments: Sequence[Segment],
    *,
    scale: float,
    softcap: float | None,
    window: jax.Array | int | None,
    dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H] in `dtype`, q's by default, lse [B, T, N] float32); arguments as in `api.attend`, without layers.

    A shared segment is multiplied once for the whole batch: its rows are folded into the query axis. The products are
    written as [batch, head, rows, H] x [batch, head, H, S]; XLA's CPU backend runs other layouts several times slower.
    """
    batch, length, heads, size = q.shape
    groups = segments[0].k.shape[-2]
    folded = (q * scale).reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    rows = folded.reshape(batch, groups, -1, size)
    scores = [_scores(rows, s.k.astype(q.dtype)) for s in segments]
    logits = jnp.concatenate(scores, axis=-1).reshape(batch, groups, heads // groups, length, -1)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(_seen_by_head([_seen(q_position, s, window) for s in segments]), logits, -jnp.inf)
    weights, lse = _softmax(logits)
    weights = weights.astype(q.dtype).reshape(batch, groups, rows.shape[2], -1)
    out = jnp.zeros((), jnp.float32)
    begin = 0
    for s in segments:
        end = begin + s.k.shape[-3]
        out = out + _mix(weights[..., begin:end], s.v.astype(q.dtype))
        begin = end
    out = out.reshape(batch, groups, heads // groups, length, size).transpose(0, 3, 1, 2, 4)
    out = out.reshape(batch, length, heads, size).astype(q.dtype if dtype is None else dtype)
    return out, lse.transpose(0, 3, 1, 2).reshape(batch, length, heads)


@jax.custom_vjp
def _softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(weights, log-sum-exp) over the last axis of float32 logits; zeros and -inf where all of them are -inf.

    Its own gradient, because the one that JAX derives keeps and passes over more arrays of the scores' size.
    """
    top = logits.max(axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    nothing = total == 0
    total = jnp.where(nothing, 1.0, total)
    return weights / total, jnp.where(nothing, -jnp.inf, top + jnp.log(total))[..., 0]


def _softmax_forward(logits: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    weights, lse = _softmax(logits)
    return (weights, lse), weights


def _softmax_backward(weights: jax.Array, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    to_weights, to_lse = cotangents
    shift = (to_weights * weights).sum(axis=-1, keepdims=True) - to_lse[..., None]
    return (weights * (to_weights - shift),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _scores(rows: jax.Array, k: jax.Array) -> jax.Array:
    """rows [B, K, Q, H] against k [Bk, S, K, H]: [B, K, Q, S] float32."""
    batch, groups, count, size = rows.shape
    if k.shape[0] == 1 and batch > 1:
        shared = rows.transpose(1, 0, 2, 3).reshape(groups, batch * count, size)
        scores = jnp.matmul(shared, k[0].transpose(1, 2, 0), preferred_element_type=jnp.float32)
        return scores.reshape(groups, batch, count, -1).transpose(1, 0, 2, 3)
    return jnp.matmul(rows, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights [B, K, Q, S] over v [Bk, S, K, H]: [B, K, Q, H] float32."""
    batch, groups, count, held = weights.shape
    if v.shape[0] == 1 and batch > 1:
        shared = weights.transpose(1, 0, 2, 3).reshape(groups, batch * count, held)
        mixed = jnp.matmul(shared, v[0].transpose(1, 0, 2), preferred_element_type=jnp.float32)
        return mixed.reshape(groups, batch, count, -1).transpose(1, 0, 2, 3)
    return jnp.matmul(weights, v.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)


def _seen(q_position: jax.Array, segment: Segment, window: jax.Array | int | None) -> jax.Array:
    """Which keys each query sees, bool [B, T, S], or [B, K, T, S] where each head has positions of its own."""
    by_head = segment.position.ndim == 3

    def at() -> jax.Array:
        return segment.position.swapaxes(1, 2)[:, :, None] if by_head else segment.position[:, None, :]

    ahead = (q_position[:, None, :, None] if by_head else q_position[:, :, None]) - at()
    seen = (at() >= 0) & (ahead >= 0)
    if window is not None:
        seen &= ahead < window
    if segment.mask is not None:
        seen &= segment.mask[:, None] if by_head else segment.mask
    return seen


def _seen_by_head(parts: Sequence[jax.Array]) -> jax.Array:
    """The parts over all keys as a mask of logits [B, K, N/K, T, S]; one of all heads stays one of all heads."""
    heads = max(part.shape[1] if part.ndim == 4 else 0 for part in parts)
    if not heads:
        return jnp.concatenate(parts, axis=-1)[:, None, None]
    wide = [part if part.ndim == 4 else part[:, None] for part in parts]
    return jnp.concatenate([jnp.broadcast_to(p, (p.shape[0], heads, *p.shape[2:])) for p in wide], axis=-1)[:, :, None]
