"""Attention over a list of key/value segments (buffer slots | shared base cache | own cache), merged exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from memjax.kernels.segment_attention.reference import attend_reference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
    """Keys and values that attention reads, and which rows see them.

    k (rotated), v [..., Bk, S, K, H] with Bk = B, or 1 where all rows share the segment (then it is read once for the
    whole batch); position int32 [Bp, S] with Bp in {1, B}: -1 is empty, so a row of -1 does not see the segment; a
    query sees positions up to its own. Where heads keep different tokens, position is [..., Bp, S, K]. mask bool
    [B, T, S] narrows that further (packed rows), None elsewhere.
    """

    k: jax.Array
    v: jax.Array
    position: jax.Array
    mask: jax.Array | None = None


def attend(
    q: jax.Array,
    q_position: jax.Array,
    segments: Sequence[Segment],
    *,
    scale: float,
    softcap: float | None = None,
    window: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of the queries over the union of the segments.

    q [B, T, N, H] rotated; q_position [B, T]; `window` limits a query to the last that many positions. Returns
    (out [B, T, N, H] in q's dtype, lse [B, T, N] float32); a query that sees nothing gets zeros and lse = -inf.
    Query heads g*N/K .. share key/value head g. `merge` joins results over disjoint segments by their lse, exactly.
    """
    return attend_reference(q, q_position, segments, scale=scale, softcap=softcap, window=window)


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over a union of disjoint key sets from the (out float32, lse) of each; empty parts are harmless."""
    if len(parts) == 1:
        return parts[0]
    lses = jnp.stack([lse for _, lse in parts])
    top = lses.max(axis=0)
    weights = jnp.exp(lses - jnp.where(jnp.isfinite(top), top, 0.0))
    total = weights.sum(axis=0)
    share = weights / jnp.where(total > 0, total, 1.0)
    out = sum(w[..., None] * part for w, (part, _) in zip(share, parts, strict=True))
    return out, jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
