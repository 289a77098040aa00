"""Segment attention on a mesh: every device reads the rows and heads that it holds.

The compiler partitions no Mosaic kernel, so the kernel is called within `jax.shard_map`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from memjax.sharding import RULES, AnyMesh, shardings

Attention = Callable[[jax.Array, list[jax.Array], list[jax.Array], Any], tuple[jax.Array, jax.Array]]


def attend_sharded(
    local: Attention, mesh: AnyMesh, q: jax.Array, k: Sequence[jax.Array], v: Sequence[jax.Array], rest: Any
) -> tuple[jax.Array, jax.Array]:
    """`local(q, k, v, rest)` over the devices of a mesh, rows and key/value heads divided as caches are; nothing is sent.

    q [B, T, N, H]; k, v of each segment [..., Bk, S, K, H]; rest = (q_position [B, T], window, (position, mask, layer) of
    each segment), as in `api.attend`. A segment that all rows share is whole along the axes of rows. NotImplementedError
    where the key/value heads do not divide over the mesh: XLA can still divide the query heads.
    """
    q_position, window, more = rest
    batch, heads = q.shape[0], k[0].shape[-2]
    row_axes, head_axes = axes_of(mesh, batch, heads)
    rows = lambda size: row_axes if size == batch else None

    def keys(x: jax.Array) -> jax.P:
        return jax.P(*[None] * (x.ndim - 4), rows(x.shape[-4]), None, head_axes)

    def segment(position: jax.Array, mask: jax.Array | None, layer: jax.Array | None) -> tuple[Any, ...]:
        at = jax.P(rows(position.shape[0]), None, *[head_axes] * (position.ndim - 2))
        return at, None if mask is None else jax.P(row_axes), None if layer is None else jax.P()

    window = None if window is None else jnp.asarray(window, jnp.int32)
    told = jax.P(row_axes), None if window is None else jax.P(), [segment(*one) for one in more]
    out = jax.P(row_axes, None, head_axes)
    given = (out, [keys(x) for x in k], [keys(x) for x in v], told)
    run = jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=(out, out), check_vma=False)
    return run(q, list(k), list(v), (q_position, window, list(more)))


def axes_of(mesh: AnyMesh, batch: int, heads: int) -> tuple[Any, Any]:
    """The mesh axes of B rows and of K key/value heads, by the table of `memjax.sharding`; None for what stays whole.

    NotImplementedError, with the reason, where the heads stay whole though the rules would divide them.
    """
    like = {"k": jax.ShapeDtypeStruct((1, batch, 1, heads, 1), jnp.float32)}
    spec: list[Any] = list(shardings(like, "cache", mesh)["k"].spec)
    _, row_axes, _, head_axes, _ = spec + [None] * (5 - len(spec))
    devices = math.prod(mesh.shape[name] for name in RULES.kv_heads)
    if devices > 1 and head_axes is None:
        raise NotImplementedError(
            f"{heads} key/value heads do not divide over {devices} devices ({', '.join(RULES.kv_heads)}): no head is cut"
        )
    return row_axes, head_axes
