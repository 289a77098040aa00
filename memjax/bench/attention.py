"""One layer's attention of decoding rows: over one shared prefix, over a copy in every row's cache."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bench.timing import SMOLLM2_SHAPE, bytes_accessed, in_turn, ratio
from memjax.kernels.segment_attention import Segment, attend
from memjax.kernels.segment_attention.block_sizes import Shape, block_sizes, bytes_moved
from memjax.models.config import ModelConfig


def shared_segment(
    config: ModelConfig = SMOLLM2_SHAPE, rows: int = 32, prefix: int = 2048, times: int = 9
) -> dict[str, float]:
    """{attention_bytes_ratio, attention_time_ratio, attention_kernel_bytes_ratio, …} of one token per row and layer.

    bytes and time: XLA over the shared segment over XLA over `rows` copies of it; bytes are the compiler's estimate.
    kernel_bytes: what the TPU kernel moves for the shared segment, counted, over the estimate for the copies.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    kv = (prefix, config.num_kv_heads, config.head_size)
    q = jax.random.normal(keys[0], (rows, 1, config.num_heads, config.head_size), jnp.float32)
    k, v = (jax.random.normal(key, (1, *kv), jnp.float32) for key in keys[1:])
    copied = tuple(jnp.broadcast_to(x, (rows, *kv)) + 0 for x in (k, v))
    at = jnp.full((rows, 1), prefix, jnp.int32)

    @jax.jit
    def read(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        position = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (k.shape[0], prefix))
        return attend(q, at, [Segment(k, v, position)], scale=config.query_scale, kernels="xla")

    ways = {"shared": (q, k, v), "copied": (q, *copied)}
    moved = {name: bytes_accessed(read, *given) for name, given in ways.items()}
    seconds = in_turn({name: partial(read, *given) for name, given in ways.items()}, times)
    shape = Shape(rows, 1, config.num_heads, config.num_kv_heads, prefix, config.head_size, q.dtype, k.dtype, True)
    kernel = float(bytes_moved(shape, block_sizes(shape)))
    return {
        "attention_bytes_ratio": moved["shared"] / moved["copied"],
        "attention_time_ratio": ratio(seconds["shared"], seconds["copied"]),
        "attention_kernel_bytes_ratio": kernel / moved["copied"],
        **{f"attention_bytes/{name}": value for name, value in {**moved, "kernel": kernel}.items()},
        **{f"attention_seconds/{name}": float(np.median(value)) for name, value in seconds.items()},
    }
