"""The low-rank delta of a site, with an adapter chosen per row: `scale[s] * (x @ a[s]^T) @ b[s]`, `s = slot_ids[row]`."""

from __future__ import annotations

import jax

from memjax.kernels.slot_lora.reference import slot_delta_reference


def slot_delta(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    slot_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The delta that a site's adapters add to its output (LoRA, arXiv 2106.09685 equation 3, one adapter per row).

    x [B, T, I]; a [E, R, I], b [E, R, F], scale [E] float32; slot_ids int32 [B], or None where E = 1 and all rows
    share the one adapter; mask [B, T] switches the delta per token. Returns [B, T, F] in x's dtype.
    """
    return slot_delta_reference(x, a, b, scale, slot_ids, mask)
