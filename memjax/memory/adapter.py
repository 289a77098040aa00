"""Adapters and slots: the structure and algebra of low-rank memories (the forward delta lives in `kernels.slot_lora`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import ArtefactError
from memjax.sharding import mesh_of, pinned, shardings

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
    mesh: jax.sharding.Mesh | None = None,
) -> Slots:
    """Empty slots for `capacity` residents, slot 0 included: every slot is the base until one is inserted.

    On a mesh they are made where they lie: divided among the devices where their number divides the capacity.
    """

    def make() -> Slots:
        a = {s: jnp.zeros((num_layers, capacity, rank, i), dtype) for s, (i, _) in site_shapes.items()}
        b = {s: jnp.zeros((num_layers, capacity, rank, f), dtype) for s, (_, f) in site_shapes.items()}
        return Slots(a, b, jnp.zeros((capacity,), jnp.float32))

    return make() if mesh is None else jax.jit(make, out_shardings=shardings(jax.eval_shape(make), "slots", mesh))()


def as_slots(adapter: Adapter) -> Slots:
    """The adapter as the only slot (E = 1), which every row then reads; used while it is being trained."""
    expand = lambda x: x[:, None]
    return Slots(jax.tree.map(expand, adapter.a), jax.tree.map(expand, adapter.b), jnp.asarray(adapter.scale)[None])


def side_by_side(adapters: Sequence[Adapter], rank: int = 0) -> Slots:
    """Adapters of one base as slots, one for each in their order, filled up to `rank` or the largest among them."""
    rank = rank or max(adapter.rank for adapter in adapters)
    filled = [pad_rank(adapter, rank) for adapter in adapters]
    join = lambda name: {site: jnp.stack([getattr(x, name)[site] for x in filled], axis=1) for site in filled[0].a}
    return Slots(join("a"), join("b"), jnp.stack([jnp.asarray(x.scale, jnp.float32) for x in filled]))


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
    zeros = lambda size: jnp.zeros((layers, rank, size), dtype)
    a = {s: adapter.a[s] if s in adapter.a else zeros(i) for s, (i, _) in site_shapes.items()}
    b = {s: adapter.b[s] if s in adapter.b else zeros(f) for s, (_, f) in site_shapes.items()}
    return Adapter(a, b, adapter.scale)


def insert(slots: Slots, slot: jax.Array | int, adapter: Adapter) -> Slots:
    """Slots with `adapter` (already padded to the bucket's rank and sites) written at `slot`: a fixed-shape write.

    Donate `slots` when jitting this. Slot 0 must stay zeros; the caller never names it.
    """
    write = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), slot, 1)
    written = Slots(
        jax.tree.map(write, slots.a, adapter.a),
        jax.tree.map(write, slots.b, adapter.b),
        slots.scale.at[slot].set(jnp.float32(adapter.scale)),
    )
    return pinned(written, "slots", mesh_of(slots.scale))


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter whose delta is the sum of the given ones, by concatenation along the rank; scale 1."""
    a = {s: jnp.concatenate([x.a[s] for x in adapters], axis=1) for s in adapters[0].a}
    b = {s: jnp.concatenate([x.b[s] * x.scale for x in adapters], axis=1) for s in adapters[0].b}
    return Adapter(a, b, jnp.float32(1.0))


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """One adapter whose delta is the weighted sum of the given ones, exactly: the ranks add up, scale 1.

    weights: one per adapter, of any sign; an adapter of weight 0 takes no rank. All must have the same sites, and factors
    of one L, I and F per site; ArtefactError else.
    """
    _check_alike(adapters, weights)
    kept = [(x, w) for x, w in zip(adapters, weights, strict=True) if w] or [(adapters[0], 0.0)]
    return concatenate([dataclasses.replace(x, scale=jnp.float32(x.scale * w)) for x, w in kept])


def update_inner(one: Adapter, other: Adapter) -> dict[str, np.ndarray]:
    """{site: [L]} inner products of two adapters' updates of each weight, float64; the updates are never formed."""
    made = {}
    for site in one.a:
        a, b, c, d = map(_host, (one.a[site], one.b[site], other.a[site], other.b[site]))
        product = np.einsum("lrs,lrs->l", a @ c.swapaxes(1, 2), b @ d.swapaxes(1, 2))
        made[site] = float(one.scale) * float(other.scale) * product
    return made


def recompress(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """(the adapter of that rank whose deltas are nearest, relative error): a truncated SVD per site and layer; scale 1.

    Nearest in the Frobenius norm (Eckart and Young 1936). The deltas are never formed: with a^T = Qa Ra and b^T = Qb Rb
    the SVD of the [R,R] matrix Rb Ra^T is theirs. relative error: norm of what was cut off / norm of the whole, over all
    sites and layers; 0 where nothing was lost. Float64 inside, float32 out. On the host: it is done once per memory, and
    compiling it for each shape of site would take longer than doing it.
    """
    a, b, cut, whole = {}, {}, 0.0, 0.0
    for site in adapter.a:
        right, right_r = np.linalg.qr(_host(adapter.a[site]).swapaxes(1, 2))  # [L,I,k], [L,k,R]
        left, left_r = np.linalg.qr(_host(adapter.b[site]).swapaxes(1, 2) * float(adapter.scale))
        u, s, v = np.linalg.svd(left_r @ right_r.swapaxes(1, 2), full_matrices=False)
        root = np.sqrt(s[:, :rank, None])
        a[site] = root * (v[:, :rank] @ right.swapaxes(1, 2))
        b[site] = root * (left @ u[:, :, :rank]).swapaxes(1, 2)
        cut, whole = cut + float((s[:, rank:] ** 2).sum()), whole + float((s**2).sum())
    return _of_rank(a, b, rank), _share(cut, whole)


def ties(adapters: Sequence[Adapter], weights: Sequence[float], density: float, rank: int) -> tuple[Adapter, float]:
    """(one adapter of that rank, relative error of the rank): TIES-Merging (arXiv 2306.01708, section 3) of the deltas.

    Of each delta [F,I] the share `density` of largest values is kept (trim); at every place the sign with the greater
    weighted sum is elected; the values of that sign are averaged by weight (disjoint merge) and multiplied by the sum of
    the weights. The merged delta has full rank, so it is cut to `rank` by SVD; the relative error is as in `recompress`.
    An adapter of weight 0 is left out; ArtefactError for negative weights, or a density outside (0, 1]. One site's deltas
    of one layer are in memory at a time, on the host.
    """
    _check_alike(adapters, weights)
    if min(weights) < 0 or sum(weights) <= 0 or not 0 < density <= 1:
        raise ArtefactError(f"TIES needs weights >= 0 and a density in (0, 1], not {list(weights)} and {density}")
    kept = [(x, w) for x, w in zip(adapters, weights, strict=True) if w]
    a, b, cut, whole = {}, {}, 0.0, 0.0
    for site in adapters[0].a:
        factors = [(_host(x.a[site]), _host(x.b[site]) * float(x.scale)) for x, _ in kept]
        rows_a, rows_b = [], []
        for layer in range(len(factors[0][0])):
            deltas = np.stack([fb[layer].T @ fa[layer] for fa, fb in factors])
            merged = ties_merge(deltas, [w for _, w in kept], density)
            layer_a, layer_b, lost = _cut_dense(merged, rank)
            rows_a.append(layer_a)
            rows_b.append(layer_b)
            cut, whole = cut + lost, whole + float((merged**2).sum())
        a[site], b[site] = np.stack(rows_a), np.stack(rows_b)
    return _of_rank(a, b, rank), _share(cut, whole)


def ties_merge(deltas: np.ndarray, weights: Sequence[float], density: float) -> np.ndarray:
    """TIES-Merging of arrays [n, ...] with n weights: trim, elect sign, disjoint mean times the sum of the weights."""
    size = np.abs(deltas).reshape(len(deltas), -1)
    cut = size.shape[1] - max(round(density * size.shape[1]), 1)
    least = np.partition(size, cut, axis=1)[:, cut].reshape(-1, *[1] * (deltas.ndim - 1))
    trimmed = np.where(np.abs(deltas) >= least, deltas, 0)
    weight = np.asarray(weights, deltas.dtype).reshape(-1, *[1] * (deltas.ndim - 1))
    elected = np.sign((trimmed * weight).sum(axis=0))
    share = np.where((np.sign(trimmed) == elected) & (trimmed != 0), weight, 0)
    total = share.sum(axis=0)
    return (trimmed * share).sum(axis=0) / np.where(total > 0, total, 1) * weight.sum()


def _cut_dense(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(a [r,I], b [r,F], squared norm cut off) of the best factors, r <= rank, of a delta [F,I].

    By the eigenvectors of the smaller Gram matrix, several times faster than an SVD of a wide delta; in float64 its
    squared values are exact enough for the leading ones.
    """
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.T
    values, vectors = np.linalg.eigh(wide @ wide.T)
    values, left = np.maximum(values[::-1], 0), vectors[:, ::-1][:, :rank]  # largest first
    root = np.sqrt(np.sqrt(values[:rank, None]))
    right = (left.T @ wide) / np.where(root > 0, root, 1)  # singular value times right vector, over its root
    left = root * left.T
    lost = float(values[rank:].sum())
    return (right, left, lost) if wide is delta else (left, right, lost)


def _host(x: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _of_rank(a: dict[str, np.ndarray], b: dict[str, np.ndarray], rank: int) -> Adapter:
    """A float32 adapter of scale 1 of these factors [L,r,...], with zero rows up to `rank`."""
    pad = lambda x: np.pad(x, ((0, 0), (0, rank - x.shape[1]), (0, 0))).astype(np.float32)
    return Adapter(jax.tree.map(pad, a), jax.tree.map(pad, b), jnp.float32(1.0))


def _share(cut: float, whole: float) -> float:
    """The relative norm of what was cut off."""
    return (cut / whole) ** 0.5 if whole > 0 else 0.0


def _check_alike(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """ArtefactError unless there is a weight for each adapter and all adapt the same sites of the same base."""
    if not adapters or len(adapters) != len(weights):
        raise ArtefactError(f"{len(adapters)} adapters and {len(weights)} weights were given; give one weight for each")
    shapes = [{s: (x.a[s].shape[0], x.a[s].shape[2], x.b[s].shape[2]) for s in sorted(x.a)} for x in adapters]
    if odd := next((shape for shape in shapes if shape != shapes[0]), None):
        raise ArtefactError(f"the adapters differ in sites or shapes: {shapes[0]} and {odd}; they cannot be merged")
