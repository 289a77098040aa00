"""The one step that every mode of eviction shares: candidates of all layers are scored, split and moved together."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import InputError
from memjax.evict.latent import absorb, state_of
from memjax.evict.learned import NOTHING, Learned
from memjax.evict.policies import Policy, View
from memjax.evict.policies.base import ranked, scatter
from memjax.kernels.segment_attention import Segment
from memjax.memory.latent import Latent, Residual, Rule
from memjax.models.config import ModelConfig
from memjax.models.generate import Prefix
from memjax.models.rope import frequencies

SINKS = 4  # the first tokens, which stay (StreamingLLM)
DECAY = 0.99  # what is left of a stored score after one more block


@dataclasses.dataclass(frozen=True)
class Budget:
    """Tokens that each head may keep: a number of them, or a share of the text's length. One of the two is set.

    A share s of N tokens keeps floor(s N), and at least 1: kvpress' rule with s = 1 - ratio.
    """

    tokens: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.share is None):
            raise InputError("a budget is a number of tokens or a share of the text; give one of the two")
        if (self.tokens is not None and self.tokens < 1) or (self.share is not None and not 0 < self.share <= 1):
            raise InputError("a budget keeps at least 1 token and at most 100% of the text, for example 512 or 25%")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget written as `512` or `25%`. Raises InputError."""
        number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
        if number is None or (not number[2] and "." in number[1]):
            raise InputError(f"{text!r} is no budget; give tokens or a share of the text, for example 512 or 25%")
        return cls(share=float(number[1]) / 100) if number[2] else cls(tokens=int(number[1]))

    def of(self, length: int) -> float:
        """Tokens kept of a text of `length`, not yet rounded down."""
        # By the decimal digits: 29 % of 100 tokens are 29, where 0.29 * 100 is a little less.
        return float(self.tokens) if self.tokens is not None else float(Fraction(str(self.share)) * length)

    def holds(self, length: int) -> bool:
        """Whether nothing of `length` tokens has to go."""
        return int(self.of(length)) >= length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run keeps. All data, so that another plan of the same capacity needs no other program.

    keep int32 [L], tokens per head; sinks, recent int32 []: the first and last tokens that stay whatever their score;
    window int32 []: the last tokens whose queries observe; decay float32 [] of stored scores.
    """

    keep: jax.Array
    sinks: jax.Array
    recent: jax.Array
    window: jax.Array
    decay: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """The bounded cache: per layer and head its own tokens, in the order of the text, empty places last.

    k (rotated), v [L, B, C, K, H]; position int32 [L, B, K, C], -1 where empty; score float32 [L, B, K, C], -inf where
    none is known yet; length int32 [B], tokens read so far: the position of the next one, whatever was kept. index
    float32 [L, B, C, P, e]: the tokens' index keys, where an indexer judges them; all heads of a layer keep the same then,
    and P is 1, or the indexer has a score for each, and P is K.
    latent: the state [L, B, ...] that took in what is no longer kept, where the policy remembers.
    """

    k: jax.Array
    v: jax.Array
    position: jax.Array
    score: jax.Array
    length: jax.Array
    index: jax.Array | None = None
    latent: Latent | None = None

    @property
    def capacity(self) -> int:
        """C, the places per head."""
        return self.k.shape[2]

    @property
    def bytes(self) -> int:
        """What its arrays take, empty places, positions, scores, index keys and latent memory included."""
        held = (self.k, self.v, self.position, self.score, self.index, self.latent)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(held))

    def segment(self) -> Segment:
        """As attention reads it."""
        return Segment(self.k, self.v, self.position.swapaxes(2, 3))

    def residual(self, learned: Learned) -> Residual | None:
        """The latent memory as `forward` reads it, None without one."""
        if self.latent is None:
            return None
        assert learned.memory is not None
        assert learned.rule is not None
        return Residual(self.latent, learned.memory, learned.rule)

    def prefix(self, learned: Learned = NOTHING) -> Prefix:
        """The only row's, as a prefix that any number of rows may continue at the text's true positions."""
        if self.k.shape[1] != 1:
            raise InputError(f"a prefix is one text, but {self.k.shape[1]} rows were read; cut one row at a time")
        return Prefix(self.segment(), self.length[0], self.residual(learned))

    def tokens(self) -> np.ndarray:
        """Tokens held per row [B], mean over layers and heads."""
        return np.asarray((self.position >= 0).sum(axis=3).mean(axis=(0, 2)))


def empty_kept(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    index: tuple[int, int] | None = None,
    rule: Rule | None = None,
) -> Kept:
    """Nothing read, nothing kept; index keys (P, e) for each place, if there are any; a latent memory of the rule, if there
    is one."""
    heads = (config.num_layers, batch, config.num_kv_heads, capacity)
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_size)
    return Kept(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.full(heads, -1, jnp.int32),
        jnp.full(heads, -jnp.inf, jnp.float32),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((config.num_layers, batch, capacity, *index), jnp.float32) if index else None,
        state_of(config, rule, batch) if rule else None,
    )


class Split(NamedTuple):
    """Which candidates stay: places int32 [B, K, C] of them in the order of the text, the last ones not `held` [B, K, C]
    where there are fewer; kept bool [B, K, S], the same as a mask: what is a token and not kept is evicted."""

    places: jax.Array
    held: jax.Array
    kept: jax.Array


def split(score: jax.Array, valid: jax.Array, keep: jax.Array, capacity: int) -> Split:
    """The `keep` [B, K] best of the scores [B, K, S], never an invalid one, in `capacity` places.

    One stable sort decides both sides, so they are exact complements also where scores tie; two top-k calls are not.
    """
    # Bounded from below, so that a token always comes before an empty place.
    worth = jnp.where(valid, jnp.maximum(score, jnp.finfo(score.dtype).min), -jnp.inf)
    kept = valid & (ranked(worth) < jnp.minimum(keep, capacity)[..., None])
    into = jnp.where(kept, jnp.cumsum(kept, axis=-1) - 1, capacity)
    index = jnp.broadcast_to(jnp.arange(score.shape[-1], dtype=jnp.int32), score.shape)
    places = scatter(index, into, capacity)
    return Split(places, jnp.arange(capacity) < kept.sum(axis=-1, keepdims=True), kept)


def layer_traits(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(how far back each layer's attention looks int32 [L], its rotations per token float32 [L, H/2])."""
    local = np.asarray(config.local or (False,) * config.num_layers)
    reach = np.where(local, config.window or 0, np.iinfo(np.int32).max // 2).astype(np.int32)
    far = frequencies(config.rope_theta, config.head_size, config.rope_scaling)
    near = far if config.rope_local_theta is None else frequencies(config.rope_local_theta, config.head_size, None)
    return reach, np.where(local[:, None], near, far).astype(np.float32)


class Candidates(NamedTuple):
    """What competes, in all layers or in one: k, v [L, B, S, K, H], position and stored score [L, B, K, S]; index keys
    [L, B, S, P, e] where there is an indexer."""

    k: jax.Array
    v: jax.Array
    position: jax.Array
    score: jax.Array
    index_keys: jax.Array | None = None


class Queries(NamedTuple):
    """The last T queries of all layers: rotated and not [L, B, T, N, H], position int32 [B, T]; T may be 0. h [L, B, T, D]:
    the attention's input that they were made of, where there is an indexer."""

    q: jax.Array
    q_raw: jax.Array
    position: jax.Array
    h: jax.Array | None = None


def moved(chosen: Split, found: Candidates) -> Candidates:
    """The candidates that stay at their places of the bounded cache, of one layer or of all."""
    places, held = chosen.places, chosen.held
    rows, keys = places.swapaxes(-1, -2)[..., None], found.index_keys
    return Candidates(
        jnp.take_along_axis(found.k, rows, axis=-3),
        jnp.take_along_axis(found.v, rows, axis=-3),
        jnp.where(held, jnp.take_along_axis(found.position, places, axis=-1), -1),
        jnp.where(held, jnp.take_along_axis(found.score, places, axis=-1), -jnp.inf),
        # Of an indexer with one score for all heads of a layer the first one's places are those of all.
        None if keys is None else jnp.take_along_axis(keys, rows[..., : keys.shape[-2], :], axis=-3),
    )


def compact(
    config: ModelConfig,
    found: Candidates,
    queries: Queries,
    length: jax.Array,
    plan: Plan,
    policy: Policy,
    capacity: int,
    learned: Learned = NOTHING,
    latent: Latent | None = None,
) -> Kept:
    """The bounded cache of what the policy keeps of the candidates, one layer after the other.

    `length` [B] counts the tokens read, these included; learned: what a learned policy reads. Tokens that a
    local layer can no longer reach go first. latent: the state before, where the policy remembers; what is evicted is
    written into it, except what no later query could have seen in a full cache.
    """
    reach, frequency = layer_traits(config)

    def layer(_: None, xs: tuple[Any, ...]) -> tuple[None, tuple[Candidates, Latent | None]]:
        k, v, position, stored, index, q, q_raw, h, indexer, memory, latent, place, keep, reach, frequency = xs
        view = View(
            k,
            v,
            position,
            q,
            q_raw,
            queries.position,
            length,
            keep,
            plan.window,
            reach,
            frequency,
            place,
            scale=config.query_scale,
            softcap=config.attn_softcap,
            learned=indexer,
            index=index,
            h=h,
        )
        known = policy.remember(stored, policy.score(view).astype(jnp.float32), view, plan.decay)
        newest = position >= (length - plan.recent)[:, None, None]
        score = jnp.where(newest | (position < plan.sinks), jnp.inf, known)
        score = jnp.where(position <= (length - reach)[:, None, None], jnp.finfo(jnp.float32).min, score)
        score = jnp.where(view.valid, score, -jnp.inf)
        chosen = split(score, view.valid, policy.per_head(score, keep), capacity)
        # What observes has no score of its own yet: it stood above all others only while it observed.
        known = jnp.where(view.observing, -jnp.inf, known)
        if latent is not None:
            assert learned.rule is not None
            lost = view.valid & ~chosen.kept & (position > (length - reach)[:, None, None])
            latent = absorb(learned.rule, memory, latent, k, v, lost, config.query_scale)
        return None, (moved(chosen, Candidates(k, v, position, known, index)), latent)

    places = jnp.arange(config.num_layers, dtype=jnp.int32)
    indexer = learned.indexer if policy.judged else None
    traits = (places, plan.keep, jnp.asarray(reach), jnp.asarray(frequency))
    memory = learned.memory if policy.remembers else None
    given = (*found, queries.q, queries.q_raw, queries.h, indexer, memory, latent, *traits)
    _, (kept, latent) = jax.lax.scan(layer, None, given)
    return Kept(kept.k, kept.v, kept.position, kept.score, length, kept.index_keys, latent)
