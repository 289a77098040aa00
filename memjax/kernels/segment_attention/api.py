"""Attention over a list of key/value segments (buffer slots | shared base cache | own cache), merged exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.kernels.choose import chosen
from memjax.kernels.segment_attention.reference import attend_reference
from memjax.kernels.segment_attention.sharded import attend_sharded
from memjax.sharding import mesh_of

Static = tuple[float, float | None, str]  # scale, soft cap, and which kernel
Arrays = list[jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
    """Keys and values that attention reads, and which rows see them.

    k (rotated), v [..., Bk, S, K, H] with Bk = B, or 1 where all rows share the segment (then it is read once for the
    whole batch); position int32 [Bp, S] with Bp in {1, B}: -1 is empty, so a row of -1 does not see the segment; a
    query sees positions up to its own. Where heads keep different tokens, position is [..., Bp, S, K]. mask bool
    [B, T, S] narrows that further (packed rows), None elsewhere. layer int32 []: k and v are those of all layers,
    [L, Bk, S, K, H], and this one is meant; a kernel reads it where it lies, where a slice of a scan would be a copy.
    """

    k: jax.Array
    v: jax.Array
    position: jax.Array
    mask: jax.Array | None = None
    layer: jax.Array | None = None


def attend(
    q: jax.Array,
    q_position: jax.Array,
    segments: Sequence[Segment],
    *,
    scale: float,
    softcap: float | None = None,
    window: jax.Array | int | None = None,
    kernels: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of the queries over the union of the segments.

    q [B, T, N, H] rotated; q_position [B, T]; `window` limits a query to the last that many positions. Returns
    (out [B, T, N, H] in q's dtype, lse [B, T, N] float32); a query that sees nothing gets zeros and lse = -inf.
    Query heads g*N/K .. share key/value head g. `merge` joins results over disjoint segments by their lse, exactly.

    `kernels` says how, see `kernels.choose.chosen`: one softmax over all segments in XLA, or a Pallas kernel per segment
    and `merge`; segments that the kernel refuses (short ones, long blocks of queries) are XLA's. On a mesh the kernel
    reads the rows and heads that a device holds; where key/value heads do not divide over it, all is XLA's. Gradients are
    the reference's, computed anew.
    """
    way = chosen(kernels, q.shape[1])
    if way == "xla":
        return attend_reference(
            q, q_position, [_one_layer(s) for s in segments], scale=scale, softcap=softcap, window=window
        )
    rest = (q_position, window, [(s.position, s.mask, s.layer) for s in segments])
    return _attend_kernel((scale, softcap, way), q, [s.k for s in segments], [s.v for s in segments], rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_kernel(static: Static, q: jax.Array, k: Arrays, v: Arrays, rest: Any) -> tuple[jax.Array, jax.Array]:
    """`attend` by the kernel where it can, on a mesh by each device for its share."""
    mesh = mesh_of(q)
    if mesh is None or mesh.size == 1:
        return _attend_local(static, q, k, v, rest)
    try:
        return attend_sharded(partial(_attend_local, static), mesh, q, k, v, rest)
    except NotImplementedError:
        return _attend_xla(static, q, k, v, rest)


def _attend_local(static: Static, q: jax.Array, k: Arrays, v: Arrays, rest: Any) -> tuple[jax.Array, jax.Array]:
    """`attend` on one device: by the kernel what it takes, by XLA the rest."""
    from memjax.kernels.segment_attention.pallas_tpu import attend_segment

    scale, softcap, way = static
    q_position, window, more = rest
    told = {"scale": scale, "softcap": softcap, "window": window}
    parts, left = [], []
    for keys, values, (position, mask, layer) in zip(k, v, more, strict=True):
        try:
            read = attend_segment(q, q_position, keys, values, position, mask, layer, interpret=way == "interpret", **told)
            parts.append(read)
        except NotImplementedError:
            left.append(_one_layer(Segment(keys, values, position, mask, layer)))
    if left:
        parts.append(attend_reference(q, q_position, left, dtype=jnp.float32, **told))
    out, lse = merge(parts)
    return out.astype(q.dtype), lse


def _attend_xla(static: Static, q: jax.Array, k: Arrays, v: Arrays, rest: Any) -> tuple[jax.Array, jax.Array]:
    scale, softcap, _ = static
    q_position, window, more = rest
    segments = [_one_layer(Segment(*kv, *others)) for *kv, others in zip(k, v, more, strict=True)]
    return attend_reference(q, q_position, segments, scale=scale, softcap=softcap, window=window)


def _forward(static: Static, q: jax.Array, k: Arrays, v: Arrays, rest: Any) -> tuple[Any, Any]:
    return _attend_kernel(static, q, k, v, rest), (q, k, v, rest)


def _backward(static: Static, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    q, k, v, rest = kept
    none = jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0), rest)
    return *jax.vjp(lambda q, k, v: _attend_xla(static, q, k, v, rest), q, k, v)[1](cotangents), none


_attend_kernel.defvjp(_forward, _backward)


def _one_layer(segment: Segment) -> Segment:
    if segment.layer is None:
        return segment
    k, v = (jax.lax.dynamic_index_in_dim(x, segment.layer, keepdims=False) for x in (segment.k, segment.v))
    return Segment(k, v, segment.position, segment.mask)


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
