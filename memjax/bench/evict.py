"""A bounded cache against a full one: what block prefill allocates, and what a token of decoding takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bench.decode import random_cache, stepper
from memjax.bench.timing import SMOLLM2_SHAPE, bytes_allocated, in_turn, ratio
from memjax.evict.bounded import TAIL, make_plan, read_block
from memjax.evict.compact import Kept, Plan, empty_kept
from memjax.evict.indexer import IndexerConfig, init_indexer
from memjax.evict.learned import NOTHING, Learned
from memjax.evict.policies import DEFAULT_POLICY, Policy, policy_named
from memjax.evict.policies.indexer import Indexer
from memjax.evict.policies.streaming import Streaming
from memjax.models.config import ModelConfig
from memjax.models.decoder import Model, Params, abstract_params, empty_cache, init_params, make_model
from memjax.models.generate import PREFILL_BLOCK, bucket, prefill


def prefill_memory(
    config: ModelConfig = SMOLLM2_SHAPE,
    rows: int = 4,
    tokens: int = 8192,
    budget: int = 512,
    block: int = PREFILL_BLOCK,
    policy: Policy = policy_named(DEFAULT_POLICY),
) -> dict[str, float]:
    """{peak_ratio, peak_bytes/bounded, peak_bytes/full}: block prefill in a cache of `budget` over one in a full cache.

    What the compiler allocates for the program of a block, the parameters left out: cache, blocks' tokens and
    temporaries. Both read blocks of the same length; nothing is run.
    """
    model, params = make_model(config), abstract_params(config)
    ids = jax.ShapeDtypeStruct((rows, min(block, bucket(tokens))), jnp.int32)
    kept = jax.eval_shape(lambda: empty_kept(config, rows, policy.slots(budget, config.num_kv_heads), jnp.float32))
    cache = jax.eval_shape(lambda: empty_cache(config, rows, bucket(tokens)))
    plan = make_plan(policy, budget, tokens, config.num_layers)
    used = {
        "bounded": bytes_allocated(read_block, model, params, ids, ids, kept, plan, policy=policy),
        "full": bytes_allocated(prefill, model, params, ids, ids, cache),
    }
    weights = float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)))
    peaks = {name: bytes_ - weights for name, bytes_ in used.items()}
    return {
        "peak_ratio": peaks["bounded"] / peaks["full"],
        **{f"peak_bytes/{name}": value for name, value in peaks.items()},
    }


def decode_time(
    config: ModelConfig = SMOLLM2_SHAPE,
    rows: int = 4,
    tokens: int = 8192,
    budget: int = 512,
    times: int = 9,
    policy: Policy = policy_named(DEFAULT_POLICY),
) -> dict[str, float]:
    """{decode_ratio, decode_seconds/…}: a step over `budget` kept tokens over a step over all of them, values random.

    To the bounded step a TAIL-th of the block is added by which the cache takes TAIL generated tokens in.
    """
    model, params = make_model(config), init_params(config, jax.random.key(0))
    token, position = jnp.arange(rows, dtype=jnp.int32) + 5, jnp.full((rows,), tokens, jnp.int32)
    kept = random_kept(config, rows, policy.slots(budget, config.num_kv_heads), tokens, jax.random.key(1))
    plan = make_plan(policy, budget, tokens, config.num_layers)
    tail = random_cache(config, rows, TAIL, 0, jax.random.key(2))
    full = random_cache(config, rows, tokens + TAIL, tokens, jax.random.key(3))
    calls = {
        "full": stepper(model, params, full, token, position),
        "bounded": stepper(model, params, tail, token, position, (kept.segment(),)),
        "take_in": _taker(model, params, jax.tree.map(lambda x: x + 0, kept), plan, policy, rows),
    }
    took = in_turn(calls, times)
    each = took["bounded"] + took["take_in"] / TAIL
    return {
        "decode_ratio": ratio(each, took["full"]),
        "decode_seconds/full": float(np.median(took["full"])),
        "decode_seconds/bounded": float(np.median(each)),
        "take_in_seconds": float(np.median(took["take_in"])),
    }


def indexer_overhead(
    config: ModelConfig = SMOLLM2_SHAPE,
    rows: int = 4,
    tokens: int = 8192,
    budget: int = 512,
    times: int = 3,
    block: int = PREFILL_BLOCK,
) -> dict[str, float]:
    """{indexer_overhead, prefill_seconds/…}: what judging by an indexer adds to bounded prefill, as a share of it.

    Seconds of one block with an untrained indexer over seconds with a policy that only looks at positions, less one. What
    is measured is time alone: random parameters keep random tokens.
    """
    model, params = make_model(config), init_params(config, jax.random.key(0))
    learned = Learned(init_indexer(config, IndexerConfig.of(config), jax.random.key(1)))
    size = min(block, bucket(tokens))
    calls = {}
    for policy, given in ((Streaming(), NOTHING), (Indexer(), learned)):
        kept = random_kept(config, rows, budget, tokens, jax.random.key(2), given)
        plan = make_plan(policy, budget, tokens, config.num_layers)
        calls[policy.name] = _taker(model, params, kept, plan, policy, rows, size, given)
    took = in_turn(calls, times)
    return {
        "indexer_overhead": ratio(took["indexer"], took["streaming"]) - 1,
        **{f"prefill_seconds/{name}": float(np.median(seconds)) for name, seconds in took.items()},
    }


def random_kept(
    config: ModelConfig, rows: int, capacity: int, length: int, key: jax.Array, learned: Learned = NOTHING
) -> Kept:
    """A bounded cache of random keys and values after a text of `length` tokens, of which its heads keep the last; index
    keys of zeros where an indexer is learned."""
    empty = empty_kept(config, rows, capacity, jnp.float32, learned.index_shape)
    k, v = (jax.random.normal(part, empty.k.shape, jnp.float32) for part in jax.random.split(key))
    place = jnp.arange(capacity, dtype=jnp.int32)
    position = jnp.broadcast_to(jnp.where(place < length, place + max(length - capacity, 0), -1), empty.position.shape)
    score = jnp.where(position >= 0, 0.0, -jnp.inf)
    return Kept(k, v, position, score, jnp.full((rows,), length, jnp.int32), empty.index)


def _taker(
    model: Model,
    params: Params,
    kept: Kept,
    plan: Plan,
    policy: Policy,
    rows: int,
    count: int = TAIL,
    learned: Learned = NOTHING,
) -> Any:
    """A call that lets the cache of the last call take `count` tokens in."""
    held, ids = [kept], jnp.ones((rows, count), jnp.int32)

    def take() -> jax.Array:
        positions = held[0].length[:, None] + jnp.arange(count, dtype=jnp.int32)
        hidden, held[0] = read_block(model, params, ids, positions, held[0], plan, learned, policy=policy)
        return hidden

    return take
