"""What a policy is: scores from a view of one layer's candidates, and how it shares a budget out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 128  # queries whose weights over all candidates are held at once
RECENT = 128  # the last tokens that stay in block prefill: a token is judged once its neighbours have been read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What a policy may look at: the tokens of one layer that compete for a place, and the queries that came last.

    k (rotated), v [B, S, K, H]: the candidates, in the order of the text, empty ones anywhere; position int32 [B, K, S],
    -1 where empty. q (rotated), q_raw (before it, after the query norm) [B, T, N, H] of the last T tokens, q_position
    int32 [B, T], -1 for padding. length int32 [B], tokens read so far: the position of the next one. keep int32 [],
    the tokens that a head keeps here; window int32 [], the last tokens, whose queries observe the others; reach int32
    [], how far back this layer's attention looks; frequency float32 [H/2], its rotations per token; layer int32 [].
    scale and softcap are those of the attention's logits.
    For a learned policy also its parameters of this layer, `learned`, the candidates' index keys [B, S, P, e], and h
    [B, T, D], the attention's input after the norm of the tokens whose queries these are.
    """

    k: jax.Array
    v: jax.Array
    position: jax.Array
    q: jax.Array
    q_raw: jax.Array
    q_position: jax.Array
    length: jax.Array
    keep: jax.Array
    window: jax.Array
    reach: jax.Array
    frequency: jax.Array
    layer: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    learned: dict[str, jax.Array] | None = None
    index: jax.Array | None = None
    h: jax.Array | None = None

    @property
    def valid(self) -> jax.Array:
        """Candidates that are tokens, bool [B, K, S]."""
        return self.position >= 0

    @property
    def observing(self) -> jax.Array:
        """Candidates among the last `window` tokens, bool [B, K, S]."""
        return self.position >= (self.length - self.window)[:, None, None]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which tokens are worth a place in the cache. Subclasses are frozen dataclasses of their settings."""

    name: ClassVar[str]
    judged: ClassVar[bool] = False  # by an indexer, whose parameters come with the view
    remembers: ClassVar[bool] = False  # what it evicts goes into a latent memory

    @property
    def queries(self) -> int | None:
        """How many of the last queries `score` reads: 0 none, None all that there are."""
        return 0

    def score(self, view: View) -> jax.Array:
        """The worth of every candidate, float32 [B, K, S], higher is kept; of empty ones anything finite."""
        raise NotImplementedError

    def remember(self, stored: jax.Array, fresh: jax.Array, view: View, decay: jax.Array) -> jax.Array:
        """Scores [B, K, S] after another block, from the stored ones (-inf: none yet) and `score` of the same view.

        Here the larger of the fresh one and the decayed stored one: attention that was paid once counts for a while. A
        policy whose score only reads the keys and positions takes the fresh one.
        """
        return jnp.maximum(decay * stored, fresh)

    def budgets(self, keep: float, length: int, num_layers: int) -> np.ndarray:
        """Tokens kept per head in each layer [L] int32, at least 1, of a text of `length` tokens; their mean is `keep`."""
        return np.full((num_layers,), max(1, int(keep)), np.int32)

    def recent(self, keep: int) -> int:
        """How many of the last tokens stay whatever their score, where a text is read in blocks."""
        return max(1, min(RECENT, keep // 2))

    def slots(self, keep: int, num_heads: int) -> int:
        """Places that one head needs where its layer keeps `keep` tokens per head."""
        return keep

    def per_head(self, score: jax.Array, keep: jax.Array) -> jax.Array:
        """Tokens that each head keeps, int32 [B, K], of the scores [B, K, S] and the layer's budget per head."""
        return jnp.broadcast_to(keep, score.shape[:2])


class KeyPolicy(Policy):
    """A policy that reads keys, values and positions only: its scores are made anew from the candidates each time."""

    def remember(self, stored: jax.Array, fresh: jax.Array, view: View, decay: jax.Array) -> jax.Array:
        """The fresh scores."""
        return fresh


def attention(view: View) -> jax.Array:
    """Softmax weights of the view's queries over its candidates, float32 [B, K, N/K, T, S]; padding gets zeros."""
    batch, length, heads, size = view.q.shape
    groups = view.k.shape[2]
    q = (view.q * view.scale).reshape(batch, length, groups, heads // groups, size)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, view.k.astype(q.dtype), preferred_element_type=jnp.float32)
    if view.softcap is not None:
        logits = view.softcap * jnp.tanh(logits / view.softcap)
    ahead = view.q_position[:, None, :, None] - view.position[:, :, None, :]
    seen = (view.position[:, :, None, :] >= 0) & (ahead >= 0) & (ahead < view.reach)
    logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def fold_attention(view: View, fold: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """fold(total, weights) over all queries, from zeros: float32 [B, K, S] of `attention`'s [B, K, N/K, T, S].

    Never holds the weights of more than CHUNK queries.
    """
    length = view.q.shape[1]
    padded = -length % CHUNK if length > CHUNK else 0
    q = jnp.pad(view.q, ((0, 0), (padded, 0), (0, 0), (0, 0)))
    at = jnp.pad(view.q_position, ((0, 0), (padded, 0)), constant_values=-1)
    count = max(q.shape[1] // CHUNK, 1)
    parts = (
        q.reshape(q.shape[0], count, -1, *q.shape[2:]).swapaxes(0, 1),
        at.reshape(q.shape[0], count, -1).swapaxes(0, 1),
    )

    def step(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return fold(total, attention(dataclasses.replace(view, q=part[0], q_position=part[1]))), None

    return jax.lax.scan(step, jnp.zeros(view.position.shape, jnp.float32), parts)[0]


def rank(view: View) -> jax.Array:
    """Which of its head's candidates each is, in the order of the text, int32 [B, K, S]; -1 before the first."""
    return jnp.cumsum(view.valid, axis=-1, dtype=jnp.int32) - 1


def ranked(score: jax.Array) -> jax.Array:
    """How many of the last axis come before each, the highest first and the earlier of two equal ones: int32 [..., S]."""
    order = jnp.argsort(-score, axis=-1, stable=True)
    index = jnp.broadcast_to(jnp.arange(score.shape[-1], dtype=jnp.int32), score.shape)
    return scatter(index, order, score.shape[-1])  # the inverse of the permutation, without a second sort


def scatter(values: jax.Array, into: jax.Array, count: int) -> jax.Array:
    """[..., count] with values [..., S] at the places `into` [..., S]; those at `count` or beyond are dropped."""
    flat = into.reshape(-1, into.shape[-1])
    row = jnp.arange(flat.shape[0])[:, None]
    out = jnp.zeros((flat.shape[0], count), values.dtype).at[row, flat].set(values.reshape(flat.shape), mode="drop")
    return out.reshape(*into.shape[:-1], count)


def above(score: jax.Array, marked: jax.Array) -> jax.Array:
    """The scores [B, K, S] with the marked candidates one above all others of the row, as kvpress pads what must stay."""
    top = jnp.where(marked, -jnp.inf, score).max(axis=(1, 2), keepdims=True)
    return jnp.where(marked, jnp.where(jnp.isfinite(top), top, 0.0) + 1.0, score)
