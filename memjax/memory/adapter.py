"""Adapters and slots: the structure and algebra of low-rank memories (the forward delta lives in `kernels.slot_lora`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import ArtefactError

SITES = ("q", "k", "v", "o", "gate", "up", "down")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """One low-rank memory: at each site, `delta = scale * (x @ a^T) @ b` in every layer.

    a {site: [L, R, I]}, b {site: [L, R, F]}, scale a float32 scalar.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    scale: jax.Array

    @property
    def rank(self) -> int:
        """R, equal at all sites."""
        return next(iter(self.a.values())).shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Resident adapters of one rank bucket. Slot 0 is all zeros and is the base.

    a {site: [L, E, R, I]}, b {site: [L, E, R, F]}, scale [E] float32.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    scale: jax.Array

    @property
    def capacity(self) -> int:
        """E, slot 0 included."""
        return self.scale.shape[0]

    @property
    def rank(self) -> int:
        """R, the bucket's rank: smaller adapters are zero-padded to it."""
        return next(iter(self.a.values())).shape[2]


def init_adapter(
    site_shapes: Mapping[str, tuple[int, int]], num_layers: int, rank: int, scale: float, key: jax.Array
) -> Adapter:
    """A fresh adapter that changes nothing: a Kaiming-uniform, b zero, float32 (LoRA, arXiv 2106.09685 section 4.1).

    site_shapes: {site: (I, F)} of the sites to adapt.
    """
    keys = jax.random.split(key, len(site_shapes))
    a, b = {}, {}
    for site_key, (site, (size_in, size_out)) in zip(keys, sorted(site_shapes.items()), strict=True):
        bound = size_in**-0.5
        a[site] = jax.random.uniform(site_key, (num_layers, rank, size_in), jnp.float32, -bound, bound)
        b[site] = jnp.zeros((num_layers, rank, size_out), jnp.float32)
    return Adapter(a, b, jnp.float32(scale))


def make_slots(
    site_shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    capacity: int,
    rank: int,
    dtype: jnp.dtype = jnp.float32,
) -> Slots:
    """Empty slots for `capacity` residents, slot 0 included: every slot is the base until one is inserted."""
    a = {s: jnp.zeros((num_layers, capacity, rank, i), dtype) for s, (i, _) in site_shapes.items()}
    b = {s: jnp.zeros((num_layers, capacity, rank, f), dtype) for s, (_, f) in site_shapes.items()}
    return Slots(a, b, jnp.zeros((capacity,), jnp.float32))


def as_slots(adapter: Adapter) -> Slots:
    """The adapter as the only slot (E = 1), which every row then reads; used while it is being trained."""
    expand = lambda x: x[:, None]
    return Slots(jax.tree.map(expand, adapter.a), jax.tree.map(expand, adapter.b), jnp.asarray(adapter.scale)[None])


def pad_rank(adapter: Adapter, rank: int) -> Adapter:
    """The same adapter with zero rows up to `rank`; ArtefactError if it is larger."""
    if adapter.rank > rank:
        raise ArtefactError(f"an adapter of rank {adapter.rank} does not fit a slot of rank {rank}; recompress it first")
    pad = lambda x: jnp.pad(x, ((0, 0), (0, rank - adapter.rank), (0, 0)))
    return Adapter(jax.tree.map(pad, adapter.a), jax.tree.map(pad, adapter.b), adapter.scale)


def fill_sites(adapter: Adapter, site_shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """The same adapter with zeros at the sites that it leaves alone, so that it fits slots that carry them."""
    layers, rank = next(iter(adapter.a.values())).shape[:2]
    dtype = next(iter(adapter.a.values())).dtype
    unknown = sorted(set(adapter.a) - set(site_shapes))
    if unknown:
        raise ArtefactError(f"the adapter has sites {unknown} that these slots do not carry; open slots with them")
    a = {s: adapter.a.get(s, np.zeros((layers, rank, i), dtype)) for s, (i, _) in site_shapes.items()}
    b = {s: adapter.b.get(s, np.zeros((layers, rank, f), dtype)) for s, (_, f) in site_shapes.items()}
    return Adapter(a, b, adapter.scale)


def insert(slots: Slots, slot: jax.Array | int, adapter: Adapter) -> Slots:
    """Slots with `adapter` (already padded to the bucket's rank and sites) written at `slot`: a fixed-shape write.

    Donate `slots` when jitting this. Slot 0 must stay zeros; the caller never names it.
    """
    write = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), slot, 1)
    return Slots(
        jax.tree.map(write, slots.a, adapter.a),
        jax.tree.map(write, slots.b, adapter.b),
        slots.scale.at[slot].set(jnp.float32(adapter.scale)),
    )


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter whose delta is the sum of the given ones, by concatenation along the rank; scale 1."""
    a = {s: jnp.concatenate([x.a[s] for x in adapters], axis=1) for s in adapters[0].a}
    b = {s: jnp.concatenate([x.b[s] * x.scale for x in adapters], axis=1) for s in adapters[0].b}
    return Adapter(a, b, jnp.float32(1.0))
