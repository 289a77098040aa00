"""Block sizes of the segment attention kernel: how many rows and cache tokens are in vector memory at a time."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from memjax.kernels.vmem import LANES, VMEM_BUDGET, tiled_bytes

TOKENS = (512, 256, 128)  # cache tokens of a block, largest first: long transfers, few grid steps


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is called with: rows B (of which a segment is shared or not), T, N, K, S, H and the dtypes."""

    batch: int
    length: int
    heads: int
    groups: int
    held: int
    size: int
    q_dtype: jnp.dtype
    k_dtype: jnp.dtype
    shared: bool
    per_query: bool = False  # every query has a row of positions of its own


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """rows: batch rows folded into one block of queries (1 unless the segment is shared); tokens: S of one block."""

    rows: int
    tokens: int


def block_sizes(shape: Shape) -> BlockSizes:
    """The most rows, then the most tokens, that fit the budget; NotImplementedError where one row does not.

    A shared segment is read once per block of rows, so rows come first: usually all of them fit.
    """
    divisors = [r for r in range(shape.batch, 0, -1) if shape.batch % r == 0] if shape.shared else [1]
    # A block of fewer than 128 tokens must be the whole segment: positions lie along the lanes.
    tokens = [t for t in TOKENS if t < shape.held] if shape.held > LANES else []
    if shape.held <= TOKENS[0]:
        tokens = [shape.held, *tokens]
    for rows in divisors:
        for count in tokens:
            blocks = BlockSizes(rows, count)
            if vmem_bytes(shape, blocks) <= VMEM_BUDGET:
                return blocks
    least = vmem_bytes(shape, BlockSizes(1, tokens[-1]))
    raise NotImplementedError(
        f"{shape.length} queries and {tokens[-1]} tokens need {least} bytes of VMEM, the budget is {VMEM_BUDGET}"
    )


def vmem_bytes(shape: Shape, blocks: BlockSizes) -> int:
    """Vector memory that the kernel takes: pipelined blocks twice, running softmax once, one head's working set."""
    count = queries(shape, blocks)
    held, groups, size = blocks.tokens, shape.groups, shape.size
    f32, i32 = jnp.float32, jnp.int32
    moved = (
        tiled_bytes((groups, count, size), shape.q_dtype)
        + 2 * tiled_bytes((held, groups, size) if groups > 1 else (held, size), shape.k_dtype)
        + tiled_bytes((count, 1), i32)
        + tiled_bytes((count if shape.per_query else 1, held), i32)
        + tiled_bytes((groups, count, size), f32)
        + tiled_bytes((groups, count), f32)
    )
    running = 2 * tiled_bytes((groups, count, 1), f32)
    # Scores, weights and the mask of one head; its keys and values, unpacked to float32 and in the queries' dtype.
    working = 4 * tiled_bytes((count, held), f32) + 3 * tiled_bytes((held, size), f32) + tiled_bytes((count, size), f32)
    return 2 * moved + running + working


def queries(shape: Shape, blocks: BlockSizes) -> int:
    """Rows of the score matrix of one key/value head: batch rows x T x query heads of the group."""
    return blocks.rows * shape.length * (shape.heads // shape.groups)


def bytes_moved(shape: Shape, blocks: BlockSizes) -> int:
    """Bytes between HBM and the kernel where every block of keys is seen by some query: an estimate, by counting.

    A shared segment is read once per block of rows; scores and weights never leave the chip.
    """
    parts = shape.batch // blocks.rows
    count = parts * queries(shape, blocks)
    k_size, q_size = np.dtype(shape.k_dtype).itemsize, np.dtype(shape.q_dtype).itemsize
    keys = 2 * parts * shape.held * shape.groups * shape.size * k_size
    places = 4 * shape.held * (count if shape.per_query else parts)
    return keys + places + count * (shape.groups * (shape.size * (q_size + 4) + 4) + 4)
