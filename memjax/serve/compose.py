"""One answer from several memories: a vote over their answers, a mixture of their next tokens, or buffers read at once.

The first two keep memories apart, and are the first rungs under the best single memory of the composition ladder;
`bank.merge` has the others.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bank.merge import mix_tokens, vote
from memjax.errors import InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Slots
from memjax.memory.cache import Cache
from memjax.models.decoder import Model, Params, forward, unembed
from memjax.models.generate import Sampling
from memjax.serve.engine import Engine
from memjax.serve.together import JOINS, read_together

APART = ("vote", "mix")  # ways for adapters and buffers alike, each read alone
WAYS = (*APART, *JOINS)


@dataclasses.dataclass(frozen=True)
class Composed:
    """An answer and what it was made of: the memories, what each said by itself (a vote) and the winner's share of it."""

    text: str
    how: str
    memories: tuple[str, ...]
    said: tuple[str, ...] = ()
    share: float | None = None


def compose(
    engine: Engine, question: str, memories: Sequence[str], how: str = "vote", sampling: Sampling = Sampling(max_tokens=48)
) -> Composed:
    """The answer of several memories of an engine's bank, each with the same weight.

    how: "vote" decodes an answer from each and gives the commonest, the first of equally common ones; "mix" draws every
    token greedily from the mean of their next-token distributions, one decode step of all memories per token; "shift" and
    "raw" let the base read several buffers at once (see `models.buffers.read_buffers`). InputError for another way, for
    fewer than two memories, for a mix of memories of different rank buckets, or for adapters that are to be read at once;
    BankError for an unknown name, ArtefactError for a damaged one.
    """
    if how not in WAYS:
        raise InputError(f"{how!r} is no way to compose answers; choose one of {', '.join(WAYS)}")
    if len(set(memories)) != len(memories) or len(memories) < 2:
        raise InputError("composing needs two different memories or more; name them")
    for join in JOINS:
        if how == join:
            return Composed(read_together(engine, question, memories, join, sampling), how, tuple(memories))
    if how == "mix":
        return Composed(_mixed(engine, question, memories, sampling.max_tokens), how, tuple(memories))
    shared = f"vote {uuid.uuid4()}"  # all memories' rows go on from one reading of the question
    try:
        said = [engine.ask(question, memory=name, conversation=shared, sampling=sampling).text for name in memories]
    finally:
        engine.prefixes.drop(shared)
    index, share = vote(said)
    return Composed(said[index], how, tuple(memories), tuple(said), share)


def _mixed(engine: Engine, question: str, memories: Sequence[str], max_tokens: int) -> str:
    with engine.probing(question, memories, max_tokens) as probed:
        if len(probed.batches) > 1:
            raise InputError("buffers, or memories of different rank buckets, cannot be mixed token by token; use a vote")
        ((rank, batch),) = probed.batches.items()
        weights = np.zeros(batch.hidden.shape[0], np.float32)
        weights[[row for _, row in probed.rows]] = 1.0
        tokens = mixed_tokens(
            engine.base.model,
            engine.base.params,
            batch.hidden,
            jnp.asarray(batch.position),
            batch.tails,
            jnp.asarray(sorted(engine.base.tokenizer.eos_ids) or [-2], jnp.int32),
            jnp.asarray(weights),
            batch.segments,
            engine.pools.slots(rank),
            jnp.asarray(batch.slot_ids),
            count=max_tokens,
        )
        made = np.asarray(tokens)
    return engine.base.tokenizer.decode(made[made >= 0].tolist()).strip()


@partial(jax.jit, static_argnums=0, static_argnames="count")
def mixed_tokens(
    model: Model,
    params: Params,
    hidden: jax.Array,
    positions: jax.Array,
    cache: Cache,
    stops: jax.Array,
    weights: jax.Array,
    segments: Sequence[Segment] = (),
    slots: Slots | None = None,
    slot_ids: jax.Array | None = None,
    *,
    count: int,
) -> jax.Array:
    """Greedy tokens int32 [count] of the mixture of G rows with these weights [G], -1 from where it stops.

    hidden [G, D] of the last prompt token; positions int32 [G] that the first answer token takes; cache: what each row read
    beside the segments, with room for `count` tokens. Every row is fed the token that all have drawn.
    """

    def going(carry: tuple[Any, ...]) -> jax.Array:
        index, stopped = carry[0], carry[1]
        return (index < count) & ~stopped

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, _, tokens, hidden, position, cache = carry
        token = mix_tokens(unembed(model, params, hidden), weights).argmax().astype(jnp.int32)
        stopped = (token == stops).any()
        tokens = tokens.at[index].set(jnp.where(stopped, -1, token))
        fed = jnp.broadcast_to(token, (hidden.shape[0], 1))
        out = forward(model, params, fed, position[:, None], cache, segments=segments, slots=slots, slot_ids=slot_ids)
        return index + 1, stopped, tokens, out.hidden[:, 0], position + 1, out.cache

    begin = (jnp.int32(0), jnp.bool_(False), jnp.full(count, -1, jnp.int32), hidden, positions, cache)
    return jax.lax.while_loop(going, step, begin)[2]
