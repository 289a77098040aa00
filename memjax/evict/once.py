"""One-shot eviction, kvpress' protocol: a context is read whole, then cut once; what comes afterwards reads the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import InputError
from memjax.evict.bounded import index_block, pad_left, queries_of
from memjax.evict.compact import DECAY, Budget, Candidates, Kept, Plan, Queries, compact
from memjax.evict.latent import state_of
from memjax.evict.learned import NOTHING, Learned, check_learned
from memjax.evict.policies import Policy
from memjax.memory.cache import Cache
from memjax.models.decoder import Model, Params, empty_cache, forward
from memjax.models.generate import PREFILL_BLOCK, batch_bucket, bucket, check_prompts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Contexts read whole, to be cut by any number of policies: the cache, its last queries, lengths int32 [B].

    index float32 [L, B, S, P, e]: the tokens' index keys, where the contexts were read for an indexer too.
    """

    cache: Cache
    queries: Queries
    length: jax.Array
    index: jax.Array | None = None


def read_dense(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    queries: int | None,
    *,
    learned: Learned = NOTHING,
    block: int = PREFILL_BLOCK,
) -> Dense:
    """The contexts read in blocks with a full cache; the last `queries` queries are kept for scoring (None: all).

    For several policies give the largest number that any of them reads; with an indexer it
    is read for its policy too. InputError where a context does not fit the base.
    """
    longest = check_prompts(model, prompts, 0, what="context")
    rows, size = batch_bucket(len(prompts)), min(block, bucket(longest))
    count = -(-longest // size)
    ids, positions = pad_left(prompts, rows, count * size)
    cache = empty_cache(model.config, rows, count * size, params["embed"])
    wanted = count * size if queries is None else queries
    parts: list[Queries] = []
    keys: list[jax.Array] = []
    for begin in range(0, count * size, size):
        part = slice(begin, begin + size)
        taps = ("q", "q_raw") if wanted else ()
        given = (ids[:, part], positions[:, part], cache, np.int32(begin), learned)
        found, index, cache = _dense_block(model, params, *given, taps=taps)
        keys += [] if index is None else [index]
        parts = [*parts, found][-max(1, -(-wanted // size)) :]
    held = ([part.q for part in parts], [part.q_raw for part in parts])
    q, q_raw = (jnp.concatenate(each, axis=2)[:, :, -wanted or None :] for each in held)
    at = jnp.concatenate([part.position for part in parts], axis=1)[:, -wanted or None :]
    length = jnp.asarray(positions.max(axis=1) + 1)
    if not keys:
        return Dense(cache, Queries(q, q_raw, at), length)
    h = jnp.concatenate([part.h for part in parts if part.h is not None], axis=2)[:, :, -wanted or None :]
    return Dense(cache, Queries(q, q_raw, at, h), length, jnp.concatenate(keys, axis=2))


@partial(jax.jit, static_argnums=0, static_argnames=("taps",), donate_argnames=("cache",))
def _dense_block(
    model: Model,
    params: Params,
    ids: jax.Array,
    positions: jax.Array,
    cache: Cache,
    begin: jax.Array,
    learned: Learned,
    *,
    taps: tuple[str, ...],
) -> tuple[Queries, jax.Array | None, Cache]:
    """(this block's queries, its tokens' index keys where there is an indexer, the cache with the block at its place
    `begin`, padding left empty)."""
    cache = dataclasses.replace(cache, next=jnp.full_like(cache.next, begin))
    judged = ("x",) if learned.indexer is not None else ()
    out = forward(model, params, ids, positions, cache, taps=(*taps, *judged))
    assert out.cache is not None
    queries = queries_of(model, out.taps, positions)
    if learned.indexer is None:
        return queries, None, out.cache
    index, h = index_block(model, params, learned.indexer, out.taps["x"], positions.shape[1])
    return queries._replace(h=h), index, out.cache


def cut(model: Model, dense: Dense, policy: Policy, budget: Budget, sinks: int = 0, learned: Learned = NOTHING) -> Kept:
    """What the policy keeps of the contexts under the budget, which is the longest one's where it is a share.

    Nothing is protected but the first `sinks` tokens, which count, and what the policy itself protects. A window that
    would fill the rest of the budget is narrowed to half of it: kvpress would keep ties in an arbitrary order there.
    """
    check_learned(policy, learned)
    longest = int(dense.length.max())
    keep = budget.of(longest)
    window = policy.queries or 0
    if window >= int(keep) - sinks:
        window = max(1, (int(keep) - sinks) // 2)
    if dense.queries.q.shape[2] < min(longest, longest if policy.queries is None else policy.queries):
        raise InputError(
            f"{policy.name} reads the last {policy.queries or longest} queries, but the context was read with "
            f"{dense.queries.q.shape[2]}; read it again with more"
        )
    budgets = policy.budgets(min(keep, longest), longest, model.config.num_layers)
    plan = Plan(jnp.asarray(budgets), jnp.int32(sinks), jnp.int32(0), jnp.int32(window), jnp.float32(DECAY))
    most = policy.slots(int(budgets.max()), model.config.num_kv_heads)
    capacity = min(bucket(most), dense.cache.capacity)  # contexts of like lengths share a program
    return _cut(model, dense, plan, learned, policy=policy, capacity=capacity)


@partial(jax.jit, static_argnums=0, static_argnames=("policy", "capacity"))
def _cut(model: Model, dense: Dense, plan: Plan, learned: Learned, *, policy: Policy, capacity: int) -> Kept:
    cache, queries = dense.cache, dense.queries
    if policy.queries is not None:
        last = queries.q.shape[2] - policy.queries if queries.q.shape[2] > policy.queries else 0
        h = None if queries.h is None else queries.h[:, :, last:]
        queries = Queries(queries.q[:, :, last:], queries.q_raw[:, :, last:], queries.position[:, last:], h)
    heads = (model.config.num_layers, cache.position.shape[0], model.config.num_kv_heads, cache.capacity)
    position = jnp.broadcast_to(cache.position[None, :, None], heads)
    index = dense.index if policy.judged else None
    found = Candidates(cache.k, cache.v, position, jnp.full(heads, -jnp.inf, jnp.float32), index)
    latent = None
    if policy.remembers:
        assert learned.rule is not None
        latent = state_of(model.config, learned.rule, cache.position.shape[0])
    return compact(model.config, found, queries, dense.length, plan, policy, capacity, learned, latent)
