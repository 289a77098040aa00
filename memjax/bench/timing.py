"""What every measurement shares: a shape, calls timed in turn, and the bytes that XLA allocates or expects to move."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from memjax.models.config import ModelConfig

SMOLLM2_SHAPE = ModelConfig(
    family="llama",
    vocab_size=49152,
    num_layers=30,
    width=576,
    mlp_width=1536,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    max_positions=8192,
    query_scale=64**-0.5,
)


def in_turn(calls: Mapping[str, Callable[[], Any]], times: int) -> dict[str, np.ndarray]:
    """{name: seconds [times]} of each call; the calls alternate, so that a machine's moods meet all of them.

    Each is called twice before, since the first call compiles. `ratio` compares two of them, round by round.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(2):
            jax.block_until_ready(call())
    for _ in range(times):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            took[name].append(time.perf_counter() - began)
    return {name: np.asarray(seconds) for name, seconds in took.items()}


def ratio(seconds: np.ndarray, other: np.ndarray) -> float:
    """The median over rounds of one call's seconds over the other's: a slow minute then weighs on both alike."""
    return float(np.median(seconds / other))


def bytes_accessed(program: Any, *args: Any, **kwargs: Any) -> float:
    """Bytes that a compiled program is expected to read and write: XLA's estimate. A loop's body counts once."""
    cost = program.lower(*args, **kwargs).compile().cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["bytes accessed"])


def bytes_allocated(program: Any, *args: Any, **kwargs: Any) -> float:
    """Bytes that a compiled program needs at once: arguments, results that take no argument's place, temporaries."""
    memory = program.lower(*args, **kwargs).compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(memory.argument_size_in_bytes + results + memory.temp_size_in_bytes)
