"""Where arrays lie on a mesh: one table of logical axes by path, one set of rules from those to mesh axes.

Arrays are placed by these two when they are made or loaded, and XLA's partitioner carries the placement through the
programs (Xu et al., GSPMD, arXiv 2105.04663); `pinned` holds it fast at a few points. Nothing here changes a program whose
arrays lie on no mesh.

A mesh axis is used for a dimension where it divides it; where it does not, the dimension stays whole on every device along
that axis, and `left_whole` names it. Of several mesh axes for one dimension, as many are used, in their order, as divide
it. Heads are counted, not their features: no head is ever cut. One mesh axis for two dimensions of one array is an error.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils

from memjax.errors import ConfigError

T = TypeVar("T")
Kind = Literal["params", "hyper", "adapter", "slots", "cache", "batch"]
Axes = tuple[str | None, ...]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# data: rows of a batch; fsdp: rows too, and with them the parameters by width; tensor: heads, inner width and vocabulary.
MESH_AXES = ("data", "fsdp", "tensor")

_KEYS: Axes = (None, "batch", None, "kv_heads", None)
# Kind -> the end of a path -> the logical axis of each dimension, None for one that is never divided. An optimizer's state
# ends in its parameter's path. A path's first match counts.
_TABLE: dict[Kind, dict[str, Axes]] = {
    "params": {
        "embed": ("vocab", "width"),
        "head": ("width", "vocab"),
        "final_norm": (None,),
        "layers/q": (None, "width", "heads"),
        "layers/k": (None, "width", "kv_heads"),
        "layers/v": (None, "width", "kv_heads"),
        "layers/o": (None, "heads", "width"),
        "layers/gate": (None, "width", "mlp"),
        "layers/up": (None, "width", "mlp"),
        "layers/down": (None, "mlp", "width"),
        "layers/*_norm": (None, None),
        "layers/q_bias": (None, "heads"),
        "layers/k_bias": (None, "kv_heads"),
        "layers/v_bias": (None, "kv_heads"),
        "ns_coeffs": (None,),  # Muon's
    },
    # A hypernetwork's: `write.hypernet.network`.
    "hyper": {
        "project/gate": ("width", "mlp"),
        "project/up": ("width", "mlp"),
        "project/down": ("mlp", None),
        "latents": (None, None),
        "blocks/q": (None, "width", "heads"),
        "blocks/k": (None, "width", "kv_heads"),
        "blocks/v": (None, "width", "kv_heads"),
        "blocks/o": (None, "heads", "width"),
        "blocks/gate": (None, "width", "mlp"),
        "blocks/up": (None, "width", "mlp"),
        "blocks/down": (None, "mlp", "width"),
        "blocks/*_norm": (None, None),
        "out_norm": (None,),
        "mlp/up": (None, "width", "mlp"),
        "mlp/up_bias": (None, "mlp"),
        "mlp/down": (None, "mlp", "width"),
        "mlp/down_bias": (None, None),
        "mlp/*_norm": (None,),
        "mlp/*_norm_bias": (None,),
        "head": (None, None, "width", "mlp"),
        "chunk_gate": (None, None),
        "chunk_gate_bias": (None,),
        "*/a_scale": (None, None),
        "*/b_scale": (None, None),
        "*/a_bias": (None, None, None),
        "*/b_bias": (None, None, None),
    },
    "adapter": {"a/*": (None, None, None), "b/*": (None, None, None), "slots": (None, None)},
    "slots": {"a/*": (None, "slot", None, None), "b/*": (None, "slot", None, None), "scale": ("slot",)},
    "cache": {"k": _KEYS, "v": _KEYS, "position": ("batch", None), "next": ("batch",)},
    # Of a batch all else begins with its rows.
    "batch": {"k": _KEYS, "v": _KEYS, "*": ("batch",)},
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. Their product must be the number of devices; one axis may be 0: what the others leave."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if min(sizes) < 0 or sizes.count(0) > 1:
            raise ConfigError(f"mesh {self} has no such sizes; give each axis at least 1, and one of them at most 0")

    def __str__(self) -> str:
        return "x".join(map(str, dataclasses.astuple(self)))


def mesh_from(environment: Mapping[str, str]) -> jax.sharding.Mesh | None:
    """The mesh that MEMJAX_MESH names as data x fsdp x tensor, such as `1x2x4`; None without it. ConfigError for others."""
    text = environment.get("MEMJAX_MESH", "")
    if not text:
        return None
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
        raise ConfigError(f"MEMJAX_MESH is {text!r}; give devices along data, fsdp and tensor, such as 1x2x4")
    return build_mesh(MeshConfig(*map(int, sizes)))


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices (of all processes), or of those given. ConfigError where the sizes are for another number."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.astuple(config)
    known = math.prod(size for size in sizes if size)
    if len(devices) % known or (0 not in sizes and known != len(devices)):
        raise ConfigError(f"mesh {config} is for {known} devices and there are {len(devices)}; change data, fsdp or tensor")
    shape = tuple(size or len(devices) // known for size in sizes)
    types = (jax.sharding.AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # sizes that are no products of the slice's sides: two axes share a side
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(laid, MESH_AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axes of each logical axis, in the order in which they are used; () leaves it whole.

    Raises ConfigError for a mesh axis that does not exist, and where two dimensions of one array meet on one mesh axis.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    width: tuple[str, ...] = ("fsdp",)
    vocab: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    slot: tuple[str, ...] = ("data", "fsdp", "tensor")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            unknown = [name for name in self.of(field.name) if name not in MESH_AXES]
            if unknown:
                raise ConfigError(f"rules.{field.name} names {unknown[0]!r}; a mesh has the axes {', '.join(MESH_AXES)}")
        for kind, rows in _TABLE.items():
            for path, axes in rows.items():
                used = [(name, axis) for axis in axes for name in self.of(axis)]
                for i, (name, axis) in enumerate(used):
                    if other := next((o for n, o in used[:i] if n == name), None):
                        raise ConfigError(
                            f"{kind} {path}: {other} and {axis} both lie on the mesh axis {name}; change the rule of one"
                        )

    def of(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis."""
        return () if axis is None else getattr(self, axis)


RULES = Rules()


def logical_axes(kind: Kind, path: str, ndim: int) -> Axes | None:
    """The table's row for an array; None where it has none. A scalar has no axes."""
    if not ndim:
        return ()
    parts = path.split("/")
    for pattern, axes in _TABLE[kind].items():
        end = "/".join(parts[-1 - pattern.count("/") :])
        if fnmatch.fnmatchcase(end, pattern) and (len(axes) == ndim or pattern == "*"):
            return axes + (None,) * (ndim - len(axes))
    return None


def _spec(
    axes: Axes, shape: Sequence[int], sizes: Mapping[str, int], rules: Rules, counts: Mapping[str, int]
) -> tuple[jax.P, list[tuple[int, tuple[str, ...]]]]:
    """(the partition spec, [(dimension, mesh axes that do not divide it)])."""
    entries: list[Any] = []
    whole = []
    for dimension, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        wanted = [name for name in rules.of(axis) if sizes.get(name, 1) > 1]
        used: list[str] = []
        for name in wanted:
            if counts.get(axis or "", size) % math.prod(sizes[n] for n in [*used, name]):
                break
            used.append(name)
        if len(used) < len(wanted):
            whole.append((dimension, tuple(wanted[len(used) :])))
        entries.append(tuple(used) if len(used) > 1 else used[0] if used else None)
    while entries and entries[-1] is None:
        entries.pop()
    return jax.P(*entries), whole


def _specs(
    tree: Any, kind: Kind, sizes: Mapping[str, int], rules: Rules, counts: Mapping[str, int], strict: bool = True
) -> Iterator[tuple[str, Any, jax.P, list[tuple[int, tuple[str, ...]]]]]:
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        axes = logical_axes(kind, path, np.ndim(leaf))
        if axes is None and not strict:
            axes = (None,) * np.ndim(leaf)
        if axes is None:
            raise ConfigError(f"{kind} {path} {np.shape(leaf)} has no row in the table of memjax/sharding.py; add one")
        yield path, leaf, *_spec(axes, np.shape(leaf), sizes, rules, counts)


def shardings(
    tree: Any,
    kind: Kind,
    mesh: AnyMesh,
    *,
    rules: Rules = RULES,
    counts: Mapping[str, int] | None = None,
    strict: bool = True,
) -> Any:
    """The `NamedSharding` of every leaf (arrays or ShapeDtypeStructs) of a tree of that kind, as a tree.

    counts: how many units a logical axis has where a dimension holds several features of each: {heads: N, kv_heads: K}
    for `params` (see `models.decoder.head_counts`). ConfigError for a leaf that the table does not know; with strict=False
    it is whole on every device.
    """
    found = [jax.NamedSharding(mesh, spec) for *_, spec, _ in _specs(tree, kind, mesh.shape, rules, counts or {}, strict)]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def describe(
    tree: Any, kind: Kind, sizes: Mapping[str, int], *, rules: Rules = RULES, counts: Mapping[str, int] | None = None
) -> dict[str, str]:
    """{path: shape with mesh axes}, such as `32, 4096/fsdp, 14336/tensor`, on a mesh of these sizes; needs no device."""
    told = {}
    for path, leaf, spec, _ in _specs(tree, kind, sizes, rules, counts or {}):
        entries = [*spec, *[None] * (np.ndim(leaf) - len(spec))]
        names = [entry if isinstance(entry, tuple) else (entry,) * (entry is not None) for entry in entries]
        told[path] = ", ".join("/".join([str(n), *used]) for n, used in zip(np.shape(leaf), names, strict=True))
    return told


def left_whole(
    tree: Any, kind: Kind, sizes: Mapping[str, int], *, rules: Rules = RULES, counts: Mapping[str, int] | None = None
) -> dict[str, str]:
    """{path: dimension and mesh axes} of what the rules would divide and the sizes do not allow."""
    found = _specs(tree, kind, sizes, rules, counts or {})
    return {path: "; ".join(f"{at} over {'/'.join(names)}" for at, names in whole) for path, _, _, whole in found if whole}


def abstract(tree: T, places: Any) -> T:
    """The tree (arrays or ShapeDtypeStructs) as ShapeDtypeStructs that lie on these shardings; nothing is made."""
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, places)


def put(tree: T, places: Any) -> T:
    """The tree on its shardings. With several processes each must hold the same values, and none waits for another."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def one(x: Any, place: jax.sharding.Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, place)
        held = np.asarray(x)
        return jax.make_array_from_callback(held.shape, place, lambda index: held[index])

    return jax.tree.map(one, tree, places)


def pinned(tree: T, kind: Kind, mesh: AnyMesh | None, *, rules: Rules = RULES) -> T:
    """The tree, held to its places within a program; itself where there is no mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(tree, kind, mesh, rules=rules))


def looked_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids] [B, T, D] for a table [V, D] and ids [B, T] (or of any other shape, on no mesh).

    On a mesh the rows of a batch and the width of a parameter share the axis fsdp. So the parts of the width are looked up
    for the rows of all that share it, and exchanged for rows after it (one all-to-all), where the partitioner by itself
    would copy everything to every device.
    """
    mesh = mesh_of(table)
    if mesh is None or ids.ndim != 2:
        return table[ids]
    rules = dataclasses.replace(RULES, batch=tuple(name for name in RULES.batch if name not in RULES.width))
    found = table[pinned(ids, "batch", mesh, rules=rules)]
    spec, _ = _spec(("batch", None, "width"), found.shape, mesh.shape, rules, {})
    return pinned(jax.lax.with_sharding_constraint(found, jax.NamedSharding(mesh, spec)), "batch", mesh)


def readable(tree: T, mesh: AnyMesh | None) -> T:
    """The tree on every device, so that each process can read it on the host; itself where there is no mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P())), tree)


def fetch(tree: T) -> T:
    """The tree as NumPy arrays, also where its parts lie with other processes; all processes must call it."""
    local = all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    mesh = None if local else find_mesh(tree)
    if mesh is not None:
        tree = jax.jit(lambda held: held, out_shardings=jax.NamedSharding(mesh, jax.P()))(tree)
    return jax.tree.map(np.asarray, tree)


def find_mesh(*trees: Any) -> jax.sharding.Mesh | None:
    """The mesh on which arrays (or shardings) in the trees lie; None where none is sharded by name.

    Raises ConfigError for more than one.
    """
    places = (getattr(x, "sharding", x) for x in jax.tree.leaves(trees))
    meshes = {p.mesh for p in places if isinstance(p, jax.NamedSharding) and isinstance(p.mesh, jax.sharding.Mesh)}
    if len(meshes) > 1:
        raise ConfigError("params, loss and batches lie on different meshes; place them all on one")
    return meshes.pop() if meshes else None


def mesh_of(x: Any) -> AnyMesh | None:
    """The mesh of an array, concrete or while a program is traced; None where it lies on none, or on one device of it.

    JAX carries the mesh in the type of every value that is made from an array on it. On a mesh with axes of JAX's explicit
    kind, programs state their shardings themselves, and this is None.
    """
    mesh: AnyMesh | None
    if isinstance(x, jax.core.Tracer):
        mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    else:
        mesh = find_mesh(x)
    if mesh is None or mesh.empty or any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def row_share(mesh: jax.sharding.Mesh, rules: Rules = RULES) -> tuple[int, int]:
    """(host, hosts) for `train.data`: which contiguous share of a batch's rows this process needs.

    Processes that share rows (a tensor axis between them) have the same. ConfigError where the rows of a process are not
    one such share.
    """
    parts = math.prod(mesh.shape[name] for name in rules.batch)
    rows = jax.NamedSharding(mesh, jax.P(rules.batch)).addressable_devices_indices_map((parts,))
    mine = sorted({index[0].indices(parts)[0] for index in rows.values() if index is not None})
    if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine) or parts % len(mine):
        raise ConfigError(f"this process's devices hold the row shares {mine} of {parts}; put the axis data first")
    return mine[0] // len(mine), parts // len(mine)
