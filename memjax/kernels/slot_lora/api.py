"""The low-rank delta of a site, with an adapter chosen per row: `scale[s] * (x @ a[s]^T) @ b[s]`, `s = slot_ids[row]`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.kernels.choose import chosen
from memjax.kernels.slot_lora.reference import slot_delta_reference
from memjax.kernels.slot_lora.sharded import kernel_delta, sharded_delta, slot_axes
from memjax.sharding import mesh_of


def slot_delta(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    slot_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    kernels: str = "auto",
) -> jax.Array:
    """The delta that a site's adapters add to its output (LoRA, arXiv 2106.09685 equation 3, one adapter per row).

    x [B, T, I]; a [E, R, I], b [E, R, F], scale [E] float32; slot_ids int32 [B], or None where E = 1 and all rows
    share the one adapter; mask [B, T] switches the delta per token. Returns [B, T, F] in x's dtype. With layer int32 []
    a and b are those of all layers, [L, E, R, ...].

    `kernels` says how, see `kernels.choose.chosen`: XLA gathers the rows' adapters, the Pallas kernel reads them where they
    lie. On a mesh, where slots are divided among devices, each of them works on the rows whose slots it holds, and where
    they are whole, the kernel works on the rows of a device. What the kernel refuses (one adapter for all rows, long
    blocks) is XLA's. Gradients are the reference's.
    """
    way = chosen(kernels, x.shape[1])
    if slot_ids is None or (way == "xla" and not slot_axes(scale)[1]):
        return _reference(x, a, b, scale, slot_ids, mask, layer)
    return _delta_kernel(way, x, a, b, scale, (slot_ids, mask, layer))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_kernel(way: str, x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, rest: Any) -> jax.Array:
    """`slot_delta` by the kernel where it can, and on a mesh by the devices that hold the slots or the rows."""
    slot_ids, mask, layer = rest
    mesh, axes = slot_axes(scale)
    try:
        if axes:
            delta = sharded_delta(x, a, b, scale, slot_ids, layer, mesh, axes, way)
        else:
            delta = kernel_delta(x, a, b, scale, slot_ids, layer, mesh_of(x), way)
    except NotImplementedError:
        return _reference(x, a, b, scale, *rest)
    return delta if mask is None else delta * mask.astype(delta.dtype)[..., None]


def _forward(way: str, x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, rest: Any) -> tuple[Any, Any]:
    return _delta_kernel(way, x, a, b, scale, rest), (x, a, b, scale, rest)


def _backward(way: str, kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    x, a, b, scale, rest = kept
    grads = jax.vjp(lambda *arrays: _reference(*arrays, *rest), x, a, b, scale)[1](cotangent)
    # Masks are constants, also those of a floating dtype.
    none = lambda v: jnp.zeros_like(v) if jnp.issubdtype(v.dtype, jnp.floating) else np.zeros(v.shape, jax.dtypes.float0)
    return *grads, jax.tree.map(none, rest)


_delta_kernel.defvjp(_forward, _backward)


def _reference(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, slot_ids: Any, mask: Any, layer: Any
) -> jax.Array:
    if layer is None:
        return slot_delta_reference(x, a, b, scale, slot_ids, mask)
    if slot_ids is None:
        a, b = (jax.lax.dynamic_index_in_dim(w, layer, keepdims=False) for w in (a, b))
        return slot_delta_reference(x, a, b, scale, None, mask)
    # The barrier ties the slots to the layer, else XLA's CPU backend, which gathers no bfloat16, moves a conversion of all
    # resident slots to float32 before the loop over the layers.
    a, b, layer = jax.lax.optimization_barrier((a, b, layer))
    rows = jnp.arange(x.shape[0])
    return slot_delta_reference(x, a[layer, slot_ids], b[layer, slot_ids], scale[slot_ids], rows, mask)
