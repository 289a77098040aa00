"""A text through a cache of fixed capacity: blocks are read and compacted, so memory does not grow with the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.evict.compact import DECAY, SINKS, Budget, Candidates, Kept, Plan, Queries, compact, empty_kept
from memjax.evict.indexer import index_keys
from memjax.evict.learned import NOTHING, Learned, check_learned
from memjax.evict.policies import Policy
from memjax.models import generate
from memjax.models.decoder import Model, Params, empty_cache, forward, rms_norm
from memjax.models.generate import PREFILL_BLOCK, Sampling, batch_bucket, bucket, check_prompts

TAIL = 128  # tokens that are generated before the bounded cache takes them in


@dataclasses.dataclass(frozen=True)
class Reading:
    """Where rows stand after a text: hidden [B, D] of the last tokens, the cache, lengths [B] (0: an unused row)."""

    hidden: jax.Array
    kept: Kept
    lengths: np.ndarray
    plan: Plan
    rows: int


def make_plan(policy: Policy, keep: float, length: int, num_layers: int) -> Plan:
    """The plan of block prefill for a text of `length` tokens of which `keep` stay: sinks and recent tokens protected.

    Protected tokens never fill more than three quarters of the budget, and the observing window is part of the recent.
    """
    keep_int = max(1, int(keep))
    recent = policy.recent(keep_int)
    return Plan(
        keep=jnp.asarray(policy.budgets(keep, length, num_layers), jnp.int32),
        sinks=jnp.int32(min(SINKS, keep_int // 4)),
        recent=jnp.int32(recent),
        window=jnp.int32(min(policy.queries or 0, recent)),
        decay=jnp.float32(DECAY),
    )


@partial(jax.jit, static_argnums=0, static_argnames=("policy",), donate_argnames=("kept",))
def read_block(
    model: Model,
    params: Params,
    ids: jax.Array,
    positions: jax.Array,
    kept: Kept,
    plan: Plan,
    learned: Learned = NOTHING,
    *,
    policy: Policy,
) -> tuple[jax.Array, Kept]:
    """(hidden [B, D] of the last column, the bounded cache) after ids [B, T] that see what was kept and each other.

    positions int32 [B, T] of the text, -1 for padding, which comes first. The C kept tokens and the T new ones compete
    for the C places; the queries of this block judge them, and it reads the latent memory as it was before (arXiv
    2605.25475, inference under a budget). learned: what the policy reads, with a `kept` that has index keys, and a latent
    memory, where it asks for them.
    """
    taps = ["k", "v"] + ["q", "q_raw"] * (policy.queries != 0) + ["x"] * policy.judged
    seen = min(policy.queries or ids.shape[1], ids.shape[1])
    latent = kept.residual(learned)
    out = forward(model, params, ids, positions, segments=[kept.segment()], latent=latent, taps=taps, tap_last=seen)
    heads = jnp.broadcast_to(positions[None, :, None], (*kept.position.shape[:3], positions.shape[1]))
    found = Candidates(
        jnp.concatenate([kept.k, out.taps["k"].astype(kept.k.dtype)], axis=2),
        jnp.concatenate([kept.v, out.taps["v"].astype(kept.v.dtype)], axis=2),
        jnp.concatenate([kept.position, heads], axis=3),
        jnp.concatenate([kept.score, jnp.full(heads.shape, -jnp.inf, jnp.float32)], axis=3),
    )
    length = jnp.maximum(kept.length, positions.max(axis=1) + 1)
    hidden = jnp.where(positions[:, -1:] >= 0, out.hidden[:, -1], 0)
    queries = queries_of(model, out.taps, positions[:, -seen:])
    if policy.judged:
        assert kept.index is not None
        assert learned.indexer is not None
        keys, h = index_block(model, params, learned.indexer, out.taps["x"], seen)
        found = found._replace(index_keys=jnp.concatenate([kept.index, keys], axis=2))
        queries = queries._replace(h=h)
    return hidden, compact(model.config, found, queries, length, plan, policy, kept.capacity, learned, kept.latent)


def index_block(
    model: Model, params: Params, indexer: dict[str, jax.Array], x: jax.Array, last: int
) -> tuple[jax.Array, jax.Array]:
    """(index keys [L, B, T, P, e] of a block's tokens, the attention's input h [L, B, last, D] of its last ones), from x
    [L, B, T, D] of the layers, layer by layer: h of all tokens and layers is never held."""

    def layer(_: None, xs: tuple[Any, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x, norm, indexer = xs
        h = rms_norm(x, norm, model.config)
        return None, (index_keys(indexer, h), h[:, -last:])

    return jax.lax.scan(layer, None, (x, params["layers"]["attn_norm"], indexer))[1]


def queries_of(model: Model, taps: dict[str, jax.Array], position: jax.Array) -> Queries:
    """The tapped queries, or none where the policy asks for none."""
    if "q" in taps:
        return Queries(taps["q"], taps["q_raw"], position)
    config = model.config
    none = jnp.zeros((config.num_layers, position.shape[0], 0, config.num_heads, config.head_size), jnp.float32)
    return Queries(none, none, position[:, :0])


def pad_left(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, positions) int32 [rows, length] that end with each prompt; padding and unused rows have position -1."""
    ids = np.zeros((rows, length), np.int32)
    positions = np.full((rows, length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        positions[row, length - len(prompt) :] = np.arange(len(prompt))
    return ids, positions


def read(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    budget: Budget,
    *,
    learned: Learned = NOTHING,
    room: int = 0,
    block: int = PREFILL_BLOCK,
) -> Reading:
    """The prompts read in blocks through a cache of the budget, which is the longest prompt's where it is a share.

    A budget in tokens is the capacity itself; one of a share is rounded up to a bucket of places, of which only the
    budget is filled, so that texts of many lengths share one program. InputError where a prompt and `room` more tokens
    do not fit the base's positions: kept tokens stand at their true positions, so the cache is bounded, the text is not
    longer than the base's window.
    """
    check_learned(policy, learned)
    longest = check_prompts(model, prompts, room)
    config, rows = model.config, batch_bucket(len(prompts))
    plan = make_plan(policy, budget.of(longest), longest, config.num_layers)
    most = policy.slots(int(plan.keep.max()), config.num_kv_heads)
    capacity = min(most if budget.tokens is not None else bucket(most), bucket(longest + room))
    none = jnp.zeros((rows, config.width), params["embed"].dtype)
    index = learned.index_shape if policy.judged else None
    kept = empty_kept(config, rows, capacity, params["embed"].dtype, index, learned.rule if policy.remembers else None)
    before = Reading(none, kept, np.zeros((rows,), np.int32), plan, len(prompts))
    return read_on(model, params, before, prompts, policy, learned=learned, block=block)


def read_on(
    model: Model,
    params: Params,
    reading: Reading,
    more: Sequence[Sequence[int]],
    policy: Policy,
    *,
    learned: Learned = NOTHING,
    block: int = PREFILL_BLOCK,
) -> Reading:
    """Where the rows stand after `more` tokens of each, read in blocks; `reading.kept` is donated."""
    longest, hidden, kept = max(len(tokens) for tokens in more), reading.hidden, reading.kept
    size = min(block, bucket(longest))
    ids, positions = pad_left(more, len(reading.lengths), -(-longest // size) * size)
    positions = np.where(positions >= 0, positions + reading.lengths[:, None], -1)
    for begin in range(0, ids.shape[1], size):
        part = slice(begin, begin + size)
        hidden, kept = read_block(
            model, params, ids[:, part], positions[:, part], kept, reading.plan, learned, policy=policy
        )
    lengths = reading.lengths.copy()
    lengths[: len(more)] += [len(tokens) for tokens in more]
    return Reading(hidden, kept, lengths, reading.plan, reading.rows)


def stream(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    sampling: Sampling = Sampling(),
    *,
    policy: Policy,
    budget: Budget,
    learned: Learned = NOTHING,
    every: int = generate.DECODE_LIMIT,
    on_read: Callable[[Reading], None] = lambda reading: None,
) -> Iterator[list[list[int]]]:
    """New tokens of each prompt as `generate.stream` gives them, from a cache that keeps `budget`.

    Where the prompts and `max_tokens` fit the budget nothing is ever evicted, and this is `generate.stream` itself; else
    `on_read` is told what was kept of the prompts. Generated tokens compete for the same places.
    """
    longest = max((len(p) for p in prompts), default=0)
    if budget.holds(longest + sampling.max_tokens):
        yield from generate.stream(model, params, prompts, stops, sampling, every=every)
        return
    reading = read(model, params, prompts, policy, budget, learned=learned, room=sampling.max_tokens)
    on_read(reading)
    yield from stream_from(model, params, reading, stops, sampling, policy=policy, learned=learned, every=every)


def stream_from(
    model: Model,
    params: Params,
    reading: Reading,
    stops: Sequence[int],
    sampling: Sampling,
    *,
    policy: Policy,
    learned: Learned = NOTHING,
    every: int = generate.DECODE_LIMIT,
) -> Iterator[list[list[int]]]:
    """New tokens of rows that were read: TAIL of them at a time beside the bounded cache, which then takes them in.

    Taking in is reading them again as one block, at once: the cost of a step or two in TAIL, and prefill and decode
    evict by the same program. `reading.kept` is donated.
    """
    hidden, kept, lengths = reading.hidden, reading.kept, reading.lengths
    tail = min(TAIL, bucket(sampling.max_tokens))
    running, made = lengths > 0, 0
    while made < sampling.max_tokens and running.any():
        steps = min(tail, sampling.max_tokens - made)
        part = dataclasses.replace(sampling, max_tokens=steps, seed=_seed(sampling.seed, made))
        cache = empty_cache(model.config, len(lengths), tail, kept.k)
        at = np.where(running, lengths + made, 0).astype(np.int32)
        new: list[list[int]] = [[] for _ in lengths]
        for piece in generate.stream_from(
            model,
            params,
            hidden,
            at,
            cache,
            stops,
            part,
            segments=[kept.segment()],
            latent=kept.residual(learned),
            every=every,
        ):
            for row, tokens in enumerate(piece):
                new[row].extend(tokens)
            yield piece[: reading.rows]
        made += steps
        running = running & np.asarray([len(tokens) == steps for tokens in new])
        if made < sampling.max_tokens and running.any():
            ids = np.asarray([t if go else [0] * tail for t, go in zip(new, running, strict=True)], np.int32)
            positions = np.where(running[:, None], at[:, None] + np.arange(tail), -1).astype(np.int32)
            hidden, kept = read_block(model, params, ids, positions, kept, reading.plan, learned, policy=policy)


def _seed(seed: int, made: int) -> int:
    """The first tokens' seed is the one given, so that nothing changes where one part is enough."""
    return seed if made == 0 else int(np.random.SeedSequence([seed, made]).generate_state(1)[0])
