"""The key/value cache: a plain pytree of fixed capacity, an argument and a result of `forward`, donated by its users."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from memjax.sharding import AnyMesh, mesh_of, pinned, shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far.

    k (rotated), v [L, B, C, K, H]; position int32 [B, C], -1 where empty; next int32 [B], the first free place.
    """

    k: jax.Array
    v: jax.Array
    position: jax.Array
    next: jax.Array

    @property
    def capacity(self) -> int:
        """C, the tokens that one row can hold."""
        return self.k.shape[2]


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def make_cache(
    num_layers: int,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_size: int,
    dtype: jnp.dtype = jnp.float32,
    mesh: AnyMesh | None = None,
) -> Cache:
    """An empty cache, in its places on a mesh if there is one; one program for its four arrays."""
    shape = (num_layers, batch, capacity, num_kv_heads, head_size)
    cache = Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        position=jnp.full((batch, capacity), -1, jnp.int32),
        next=jnp.zeros((batch,), jnp.int32),
    )
    return pinned(cache, "cache", mesh)


def append(cache: Cache, k: jax.Array, v: jax.Array, positions: jax.Array) -> Cache:
    """The cache with T tokens written at each row's `next`; a token of position -1 is padding and takes no place.

    k, v [L, B, T, K, H]; positions [B, T], valid tokens first. What lies beyond the capacity is dropped, so callers
    check lengths on the host before they start. On a mesh every device writes its own rows and heads: the partitioner
    would gather the tokens of all rows first.
    """
    mesh = mesh_of(cache.k)
    if mesh is None:
        return _append(cache, k, v, positions)
    places = jax.tree.map(lambda place: place.spec, shardings(cache, "cache", mesh))
    given = (places, places.k, places.v, places.position)
    return jax.shard_map(_append, mesh=mesh, in_specs=given, out_specs=places)(cache, k, v, positions)


def _append(cache: Cache, k: jax.Array, v: jax.Array, positions: jax.Array) -> Cache:
    """`append` on one device."""
    batch, length = positions.shape
    valid = positions >= 0
    place = jnp.where(valid, cache.next[:, None] + jnp.arange(length), cache.capacity)
    row = jnp.arange(batch)[:, None]
    # The TPU's compiler lays an array out for the windows that are written to it. Windows over all layers make it copy the
    # whole cache, to be written and again to be read: nothing beside a block of tokens, most of a decode step. One token
    # of a row is therefore written layer by layer; a block so would be more windows than the compiler gets through.
    layer = jnp.arange(cache.k.shape[0])[:, None, None] if length == 1 else slice(None)
    at = layer, row, place
    return Cache(
        k=cache.k.at[at].set(k.astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[at].set(v.astype(cache.v.dtype), mode="drop"),
        position=cache.position.at[row, place].set(positions, mode="drop"),
        next=cache.next + valid.sum(axis=1, dtype=jnp.int32),
    )


def select_rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache of the given rows, in their order (rows may repeat)."""
    return Cache(cache.k[:, rows], cache.v[:, rows], cache.position[rows], cache.next[rows])
