"""How much of a TPU core's vector memory arrays take, and how much of it a kernel may use."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

LANES, SUBLANES = 128, 8
# XLA grants a kernel 16 MiB on every chip unless told otherwise; the rest is for what Mosaic spills.
VMEM_BUDGET = 12 * 2**20


def tiled_bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    """Bytes of an array in vector memory: its last two axes are padded to tiles of 8 x 128 words of 32 bits."""
    size = np.dtype(dtype).itemsize
    packed = SUBLANES * 4 // size
    *outer, rows, lanes = (1, 1, *shape)
    return math.prod(outer) * _up(rows, packed) * _up(lanes, LANES) * size


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
