"""Block sizes of the slot kernel: how much of the output is in vector memory at a time."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from memjax.kernels.vmem import LANES, VMEM_BUDGET, tiled_bytes


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is called with: T, I, F, R and the dtypes. The input of a row is always whole."""

    length: int
    size_in: int
    size_out: int
    rank: int
    x_dtype: jnp.dtype
    dtype: jnp.dtype


def block_size(shape: Shape) -> int:
    """Output features of a block: all, or the most tiles of 128 that fit; NotImplementedError where one tile does not."""
    size = shape.size_out
    while vmem_bytes(shape, size) > VMEM_BUDGET:
        if size <= LANES:
            raise NotImplementedError(
                f"{shape.length} tokens of {shape.size_in} features at rank {shape.rank} need "
                f"{vmem_bytes(shape, size)} bytes of VMEM, the budget is {VMEM_BUDGET}"
            )
        size = -(-size // (2 * LANES)) * LANES
    return size


def vmem_bytes(shape: Shape, size_out: int) -> int:
    """Vector memory that the kernel takes with blocks of `size_out`: pipelined blocks twice, the low-rank value once."""
    length, rank = shape.length, shape.rank
    moved = (
        tiled_bytes((length, shape.size_in), shape.x_dtype)
        + tiled_bytes((rank, shape.size_in), shape.dtype)
        + tiled_bytes((rank, size_out), shape.dtype)
        + tiled_bytes((length, size_out), shape.x_dtype)
    )
    # Adapters in the input's dtype and the product in float32, while they are multiplied.
    working = tiled_bytes((rank, max(shape.size_in, size_out)), shape.x_dtype) + tiled_bytes(
        (length, size_out), jnp.float32
    )
    return 2 * moved + working + tiled_bytes((length, rank), jnp.float32)


def bytes_moved(shape: Shape, size_out: int, rows: int, active: int) -> int:
    """Bytes between HBM and the kernel for `rows` rows that use `active` distinct slots: an estimate, by counting.

    Rows of one slot follow each other and read it once; only `b` in several blocks is read again for every row.
    """
    adapter, value = np.dtype(shape.dtype).itemsize, np.dtype(shape.x_dtype).itemsize
    readers = active if size_out >= shape.size_out else rows
    slots = shape.rank * adapter * (active * shape.size_in + readers * shape.size_out)
    return slots + rows * shape.length * value * (shape.size_in + shape.size_out)
