"""KVzip: what the base attends to while it repeats the text (arXiv 2505.23416), in kvpress' definition.

No `Policy` of a bounded cache, since it reads a text again after it was read: the reference of one-shot eviction for what
a costlier judgement finds. One budget for all layers and heads, so any head may keep everything: fewer tokens, not fewer
bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import InputError
from memjax.evict.compact import SINKS, Budget, Candidates, Kept, layer_traits, moved, split
from memjax.evict.once import Dense
from memjax.evict.policies.base import View, fold_attention, ranked
from memjax.kernels.segment_attention import Segment
from memjax.memory.cache import Cache
from memjax.models.decoder import Model, Params, forward
from memjax.models.generate import bucket, common_prefix, pad_prompts
from memjax.models.tokenizer import Tokenizer

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_ASKED = ("Why?", "is it 7")  # two contents that end differently: what both prompts end with is the template's


@dataclasses.dataclass(frozen=True)
class RepeatPrompt:
    """Tokens that ask for a text again: for its first part, for a later one (`lead` tokens of the part before follow), and
    those between either and the repeated part, with which the template begins an answer."""

    first: tuple[int, ...]
    later: tuple[int, ...]
    answer: tuple[int, ...]
    lead: int = 8

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> RepeatPrompt:
        """kvpress' words, behind them what the tokenizer's chat template puts behind a user's turn."""
        one, two = (tokenizer.encode_chat([{"role": "user", "content": text}]) for text in _ASKED)
        alike = common_prefix([one[::-1], two[::-1]])
        return cls(tuple(tokenizer.encode(FIRST)), tuple(tokenizer.encode(LATER)), tuple(one[len(one) - alike :]))


@dataclasses.dataclass(frozen=True)
class KVzip:
    """A token's worth: the largest attention that any query of the repeated text pays it in a head of its group.

    The text is repeated in parts of `chunk` tokens, or fewer where the base's window has no room for so many behind it;
    each softmax is over the first tokens, the part and its repetition.
    """

    name: ClassVar[str] = "kvzip"
    chunk: int = 2048

    def score(
        self, model: Model, params: Params, dense: Dense, ids: Sequence[int], prompt: RepeatPrompt, header: int = 0
    ) -> jax.Array:
        """Scores float32 [L, 1, K, S] of the one context `ids` that `dense` holds; its first tokens score above all others.

        The first `header` tokens, which belong to the template, are not repeated and score 0. InputError where the
        base's window has no room behind the text.
        """
        if dense.cache.position.shape[0] != 1:
            raise InputError(f"{self.name} repeats one text at a time; read each context by itself")
        around = max(len(prompt.first), len(prompt.later) + prompt.lead) + len(prompt.answer)
        room = model.config.max_positions - len(ids) - around
        if room < prompt.lead:
            raise InputError(
                f"{self.name} repeats a text behind itself, but behind {len(ids)} tokens the base's window has room for "
                f"{max(room, 0)} more; shorten the text"
            )
        chunk = min(self.chunk, room)
        size = bucket(min(chunk, len(ids) - header) + around)
        total = jnp.zeros((model.config.num_layers, 1, model.config.num_kv_heads, dense.cache.capacity), jnp.float32)
        for begin in range(header, len(ids), chunk):
            part = ids[begin : begin + chunk]
            asked = prompt.first if begin == header else (*prompt.later, *ids[begin - min(prompt.lead, chunk) : begin])
            tokens, at = pad_prompts([[*asked, *prompt.answer, *part]], 1, size)
            at = np.where(at >= 0, at + len(ids), -1)
            bounds = np.asarray([begin, begin + len(part)], np.int32)
            total = _part_scores(model, params, dense.cache, tokens, at, bounds, total)
        sinks = dense.cache.position[None, :, None] < SINKS
        return jnp.where(sinks, total.max() + 1.0, total)

    def cut(self, dense: Dense, score: jax.Array, budget: Budget) -> Kept:
        """What stays of the context: of all layers' and heads' tokens together, as many as the budget has for each."""
        length = int(dense.length[0])
        heads = score.shape[0] * score.shape[2]
        # The removed are rounded down, as kvpress does.
        removed = int(heads * (length - min(Fraction(str(budget.of(length))), Fraction(length))))
        kept = _per_head(dense.cache, score, np.int32(max(heads * length - removed, 1)))
        return _cut(dense, score, kept, capacity=min(bucket(int(kept.max())), dense.cache.capacity))


@partial(jax.jit, static_argnums=0)
def _part_scores(
    model: Model,
    params: Params,
    cache: Cache,
    ids: jax.Array,
    positions: jax.Array,
    bounds: jax.Array,
    total: jax.Array,
) -> jax.Array:
    """`total` [L, 1, K, S] with the scores of the part [begin, end) of `bounds` written, which ids [1, T] repeat."""
    config = model.config
    out = forward(model, params, ids, positions, segments=[Segment(cache.k, cache.v, cache.position)], taps=("q", "k"))
    inside = (cache.position >= bounds[0]) & (cache.position < bounds[1])
    sinks = (cache.position >= 0) & (cache.position < jnp.minimum(SINKS, bounds[0]))
    read = jnp.concatenate([jnp.where(inside | sinks, cache.position, -1), positions], axis=1)
    place = jnp.broadcast_to(read[:, None], (1, config.num_kv_heads, read.shape[1]))
    none = jnp.int32(0)

    def layer(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        held, own, q, reach, frequency = xs
        k = jnp.concatenate([held, own.astype(held.dtype)], axis=1)
        view = View(
            k, k, place, q, q, positions, none[None], none, none, reach, frequency, none,
            scale=config.query_scale, softcap=config.attn_softcap,
        )  # fmt: skip
        return None, fold_attention(view, lambda most, weights: jnp.maximum(most, weights.max(axis=(2, 3))))

    reach, frequency = layer_traits(config)
    xs = (cache.k, out.taps["k"], out.taps["q"], jnp.asarray(reach), jnp.asarray(frequency))
    _, most = jax.lax.scan(layer, None, xs)
    return jnp.where(inside[None, :, None], most[..., : cache.capacity], total)


@jax.jit
def _per_head(cache: Cache, score: jax.Array, keep: jax.Array) -> jax.Array:
    """Tokens that each head keeps, int32 [L, 1, K], of the `keep` best of all."""
    worth = jnp.where(cache.position[None, :, None] >= 0, score, -jnp.inf)
    return (ranked(worth.reshape(-1)) < keep).reshape(score.shape).sum(axis=-1, dtype=jnp.int32)


@partial(jax.jit, static_argnames=("capacity",))
def _cut(dense: Dense, score: jax.Array, keep: jax.Array, *, capacity: int) -> Kept:
    cache = dense.cache
    position = jnp.broadcast_to(cache.position[None, :, None], score.shape)
    chosen = split(score, position >= 0, keep, capacity)
    kept = moved(chosen, Candidates(cache.k, cache.v, position, score))
    return Kept(kept.k, kept.v, kept.position, kept.score, dense.length)
