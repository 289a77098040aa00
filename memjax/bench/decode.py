"""Decode steps of a whole model: rows over one shared prefix against rows that own it, and memory that is not used."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bench.timing import SMOLLM2_SHAPE, bytes_accessed, in_turn, ratio
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Slots
from memjax.memory.cache import Cache
from memjax.models.config import ModelConfig
from memjax.models.decoder import Model, Params, forward, init_params, make_model, unembed

TAIL = 64  # tokens that a row may own behind the prefix


@partial(jax.jit, static_argnums=0, static_argnames=("unroll",), donate_argnames=("cache",))
def decode_step(
    model: Model,
    params: Params,
    cache: Cache,
    token: jax.Array,
    position: jax.Array,
    segments: tuple[Segment, ...] = (),
    slots: Slots | None = None,
    slot_ids: jax.Array | None = None,
    *,
    unroll: int = 1,
) -> tuple[jax.Array, Cache]:
    """(the likeliest next token [B], cache) after one token per row."""
    told: dict[str, Any] = {"segments": segments, "slots": slots, "slot_ids": slot_ids, "unroll": unroll}
    out = forward(model, params, token[:, None], position[:, None], cache, **told)
    assert out.cache is not None
    return jnp.argmax(unembed(model, params, out.hidden[:, 0]), axis=-1).astype(jnp.int32), out.cache


def shared_prefix(
    config: ModelConfig = SMOLLM2_SHAPE, rows: int = 32, prefix: int = 2048, times: int = 9
) -> dict[str, float]:
    """{shared_prefix_bytes_ratio, shared_prefix_time_ratio, …}: decoding over one prefix over decoding over copies of it.

    One token for each of `rows` rows; the prefix has `prefix` tokens, its values are random. Bytes are XLA's estimate, for
    one and two layers without a loop, extended to all layers; seconds are those of the whole step.
    """
    numbers: dict[str, float] = {}
    counted = {}
    for layers in (1, 2):
        small = dataclasses.replace(config, num_layers=layers)
        model, params = make_model(small), init_params(small, jax.random.key(0))
        for name, given in prefixed(small, rows, prefix).items():
            counted[name, layers] = bytes_accessed(decode_step, model, params, *given, unroll=layers)
    for name in ("shared", "copied"):
        one, two = counted[name, 1], counted[name, 2]
        numbers[f"shared_prefix_bytes/{name}"] = one + (config.num_layers - 1) * (two - one)
    model, params = make_model(config), init_params(config, jax.random.key(0))
    calls = {name: stepper(model, params, *given) for name, given in prefixed(config, rows, prefix).items()}
    took = in_turn(calls, times)
    numbers |= {f"shared_prefix_seconds/{name}": float(np.median(seconds)) for name, seconds in took.items()}
    numbers["shared_prefix_bytes_ratio"] = numbers["shared_prefix_bytes/shared"] / numbers["shared_prefix_bytes/copied"]
    numbers["shared_prefix_time_ratio"] = ratio(took["shared"], took["copied"])
    return numbers


def unused_same_program(config: ModelConfig = SMOLLM2_SHAPE, rows: int = 4, prefix: int = 128) -> dict[str, float]:
    """{unused_same_program: 1.0}, where a step that is told of no segments, slots or mask compiles to the plain program."""
    model = make_model(config)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    cache = jax.eval_shape(lambda: random_cache(config, rows, prefix, 0, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

    def text(**told: Any) -> str:
        read = lambda params, cache, ids, at: forward(model, params, ids, at, cache, **told)
        return jax.jit(read).lower(params, cache, ids, ids).as_text()

    unused = {"segments": (), "slots": None, "slot_ids": None, "adapter_mask": None, "visible": None, "taps": ()}
    # What the compiler is given, without source lines: the same input compiles to the same program.
    return {"unused_same_program": float(text() == text(**unused))}


def prefixed(config: ModelConfig, rows: int, prefix: int) -> dict[str, tuple[Any, ...]]:
    """{way: (cache, token, position, segments)} of one step, with a prefix for all rows and with one in each cache."""
    key = jax.random.key(1)
    token, position = jnp.arange(rows, dtype=jnp.int32) + 5, jnp.full((rows,), prefix, jnp.int32)
    one = random_cache(config, 1, prefix, prefix, key)
    segment = Segment(one.k, one.v, one.position)
    shared = (random_cache(config, rows, TAIL, 0, key), token, position, (segment,))
    return {"shared": shared, "copied": (random_cache(config, rows, prefix + TAIL, prefix, key), token, position, ())}


def random_cache(config: ModelConfig, rows: int, capacity: int, filled: int, key: jax.Array) -> Cache:
    """A cache of random keys and values, its first `filled` places taken."""
    shape = (config.num_layers, rows, capacity, config.num_kv_heads, config.head_size)
    k = jax.random.normal(key, shape, jnp.float32)
    place = jnp.arange(capacity, dtype=jnp.int32)
    position = jnp.broadcast_to(jnp.where(place < filled, place, -1), (rows, capacity))
    return Cache(k, k + 0, position, jnp.full((rows,), filled, jnp.int32))


def stepper(model: Model, params: Params, cache: Cache, *given: Any) -> Any:
    """A call of the step that goes on from the cache that the last call left."""
    held = [cache]

    def step() -> np.ndarray:
        token, held[0] = decode_step(model, params, held[0], *given)
        return np.asarray(token)

    return step
