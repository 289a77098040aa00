"""The low-rank delta in plain XLA: gather the rows' adapters once, then two batched matmuls."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def slot_delta_reference(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    slot_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """See `api.slot_delta`; here a and b are those of one layer."""
    if slot_ids is None:
        if a.shape[0] != 1:
            raise ValueError(f"slot_ids are needed to choose among {a.shape[0]} slots")
        low = jnp.einsum("bti,ri->btr", x, a[0].astype(x.dtype)) * scale[0].astype(x.dtype)
        delta = jnp.einsum("btr,rf->btf", low, b[0].astype(x.dtype))
    else:
        low = jnp.einsum("bti,bri->btr", x, a[slot_ids].astype(x.dtype)) * scale[slot_ids].astype(x.dtype)[:, None, None]
        delta = jnp.einsum("btr,brf->btf", low, b[slot_ids].astype(x.dtype))
    return delta if mask is None else delta * mask.astype(delta.dtype)[..., None]
