"""The low-rank delta per row on TPU: the row's slot says which blocks of the bank are read; nothing is gathered in HBM."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memjax.kernels.choose import LONGEST
from memjax.kernels.slot_lora.block_sizes import Shape, block_size, bytes_moved


def rows_delta(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    weight: jax.Array,
    slot_ids: jax.Array,
    layer: jax.Array | None = None,
    *,
    interpret: Any = False,
) -> jax.Array:
    """[B, T, F] in x's dtype: `weight[row] * (x @ a[s]^T) @ b[s]` with `s = slot_ids[row]`; sums are float32.

    x [B, T, I]; a [E, R, I], b [E, R, F], or [L, E, R, ...] with `layer` int32 []; weight [B] float32, the scales of the
    rows' slots; slot_ids [B]. Rows are visited in the order of their slots, so that an adapter is read once however many
    rows use it (multi-adapter batches as in Punica, arXiv 2310.18547 section 4). A row of weight 0 gets exactly zero.
    NotImplementedError, with the reason, for what XLA should do.
    """
    batch, length, size_in = x.shape
    if layer is None:
        a, b, layer = a[None], b[None], jnp.int32(0)
    rank, size_out = b.shape[2:]
    if length > LONGEST:
        raise NotImplementedError(f"{length} tokens of a row are more than {LONGEST}: arithmetic binds, not memory")
    if x.dtype not in (jnp.float32, jnp.bfloat16) or a.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"inputs of {x.dtype} over slots of {a.dtype}; the kernel knows float32 and bfloat16")
    shape = Shape(length, size_in, size_out, rank, x.dtype, a.dtype)
    size = block_size(shape)
    order = jnp.argsort(slot_ids).astype(jnp.int32)
    slots = slot_ids[order].astype(jnp.int32)
    # Index maps: (place in the order, block of the output, then the prefetched scalars).
    inputs = lambda i, f, layer, order, slots, scale: (order[i], 0, 0)
    adapter_in = lambda i, f, layer, order, slots, scale: (layer[0], slots[i], 0, 0)
    adapter_out = lambda i, f, layer, order, slots, scale: (layer[0], slots[i], 0, f)
    outputs = lambda i, f, layer, order, slots, scale: (order[i], 0, f)
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, pl.cdiv(size_out, size)),
            in_specs=[
                pl.BlockSpec((None, length, size_in), inputs),
                pl.BlockSpec((None, None, rank, size_in), adapter_in),
                pl.BlockSpec((None, None, rank, size), adapter_out),
            ],
            out_specs=pl.BlockSpec((None, length, size), outputs),
            scratch_shapes=[pltpu.VMEM((length, rank), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, length, size_out), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * length * rank * (size_in + size_out),
            transcendentals=0,
            bytes_accessed=bytes_moved(shape, size, batch, active=batch),
        ),
        interpret=interpret,
        name="slot_lora",
    )(layer.reshape(1), order, slots, weight[order].astype(jnp.float32), x, a, b)


def _kernel(
    layer_ref: Any, order_ref: Any, slots_ref: Any, scale_ref: Any,
    x_ref: Any, a_ref: Any, b_ref: Any, out_ref: Any, low_ref: Any,
) -> None:  # fmt: skip
    """One row and one block of its output; the low-rank value of a row is computed with its first block."""
    scale = scale_ref[pl.program_id(0)]
    exact = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    dot = partial(jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32)

    @pl.when(scale == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when((scale != 0) & (pl.program_id(1) == 0))
    def _() -> None:
        low_ref[...] = scale * dot(x_ref[...], a_ref[...].astype(x_ref.dtype), (((1,), (1,)), ((), ())))

    @pl.when(scale != 0)
    def _() -> None:
        b = b_ref[...].astype(x_ref.dtype)
        out_ref[...] = dot(low_ref[...].astype(x_ref.dtype), b, (((1,), (0,)), ((), ()))).astype(out_ref.dtype)
