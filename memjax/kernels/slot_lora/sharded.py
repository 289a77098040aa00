"""The low-rank delta on a mesh. Where slots are divided among devices, rows go to the device that holds their slot.

A row of one token is a few thousand numbers and its adapter hundreds of thousands, so what crosses devices is the rows and
their deltas. Each device works on its own rows only, a few at a time, and exactly one device gives a row's delta. Where
slots are whole, the kernel reads them for the rows of a device: the compiler partitions no Mosaic kernel.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from memjax.kernels.slot_lora.reference import slot_delta_reference
from memjax.sharding import mesh_of, shardings


def slot_axes(scale: jax.Array) -> tuple[Any, tuple[str, ...]]:
    """(mesh, the mesh axes that divide the slots) by the table of `memjax.sharding`; no axes where slots are whole."""
    mesh = mesh_of(scale)
    if mesh is None:
        return None, ()
    spec = shardings({"scale": scale}, "slots", mesh)["scale"].spec
    entry = spec[0] if len(spec) else ()
    return mesh, (entry,) if isinstance(entry, str) else tuple(entry or ())


def sharded_delta(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    slot_ids: jax.Array,
    layer: jax.Array | None,
    mesh: Any,
    axes: tuple[str, ...],
    way: str = "xla",
) -> jax.Array:
    """`api.slot_delta` without a mask, for a, b, scale divided over `axes` of `mesh` by their slots.

    Rows are spread over the devices as their slots are: where all rows ask for slots of one device, it takes all turns.
    way: how a device computes them, as `kernels.choose.chosen` says it.
    """
    shards = math.prod(mesh.shape[name] for name in axes)
    held, rows = scale.shape[0] // shards, x.shape[0]
    turn = -(-rows // shards)  # rows at a time: a device's share where slots are asked for evenly
    slot_first = jax.P(axes) if layer is None else jax.P(None, axes)
    layer = jnp.int32(0) if layer is None else layer
    stacked = len(slot_first) == 2

    def local(x: Any, a: Any, b: Any, scale: Any, slot_ids: Any, layer: Any) -> Any:
        place = slot_ids - jax.lax.axis_index(axes) * held
        mine = (place >= 0) & (place < held)
        order = jnp.argsort(~mine, stable=True)  # own rows first
        order = jnp.pad(order, (0, -rows % turn))
        count = mine.sum()

        def work(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            done, out = carry
            own = jax.lax.dynamic_slice_in_dim(order, done, turn)
            valid = done + jnp.arange(turn) < count
            slot = jnp.where(valid, place[own], 0)
            weight = jnp.where(valid, scale[slot], 0.0)
            part = _rows(x[own], a, b, weight, slot, layer if stacked else None, way)
            return done + turn, out.at[own].add(jnp.where(valid[:, None, None], part, 0))

        begin = jnp.int32(0), jnp.zeros((*x.shape[:2], b.shape[-1]), x.dtype)
        _, out = jax.lax.while_loop(lambda carry: carry[0] < count, work, begin)
        return jax.lax.psum(out, axes)

    whole = jax.P()
    specs = (whole, slot_first, slot_first, jax.P(axes), whole, whole)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)(
        x, a, b, scale, slot_ids, layer
    )


def kernel_delta(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, slot_ids: jax.Array, layer: Any, mesh: Any, way: str
) -> jax.Array:
    """`api.slot_delta` without a mask by the Pallas kernel; on a mesh each device reads all slots for its own rows.

    NotImplementedError, with the reason, for what XLA should do.
    """
    from memjax.kernels.slot_lora.pallas_tpu import rows_delta

    def local(x: Any, a: Any, b: Any, weight: Any, slot_ids: Any, layer: Any) -> jax.Array:
        return rows_delta(x, a, b, weight, slot_ids, layer, interpret=way == "interpret")

    if mesh is None or mesh.size == 1:
        return local(x, a, b, scale[slot_ids], slot_ids, layer)
    rows, whole = shardings({"x": x}, "batch", mesh)["x"].spec, jax.P()
    specs = (rows, whole, whole, rows, rows, None if layer is None else whole)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return run(x, a, b, scale[slot_ids], slot_ids, layer)


def _rows(
    x: jax.Array, a: jax.Array, b: jax.Array, weight: jax.Array, slot: jax.Array, layer: jax.Array | None, way: str
) -> jax.Array:
    """The deltas of rows x [B, T, I] on one device, by their slots and weights [B]; what the kernel refuses is gathered."""
    from memjax.kernels.slot_lora.pallas_tpu import rows_delta

    if way != "xla":
        try:
            return rows_delta(x, a, b, weight, slot, layer, interpret=way == "interpret")
        except NotImplementedError:
            pass
    low, high = (w[slot] if layer is None else w[layer, slot] for w in (a, b))
    return slot_delta_reference(x, low, high, weight, jnp.arange(x.shape[0]))
