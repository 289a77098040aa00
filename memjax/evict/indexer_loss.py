"""What an indexer is trained on: its softmax over a text's tokens follows what the base attends to from behind the text.

KL of attention, averaged over heads, to the scores' softmax (arXiv 2605.25475, section 3.3), layer by layer on frozen
inputs; an indexer with a score for each key head follows the attention of the queries that read that head. Queries are
taken CHUNK at a time, so no array grows with the square of the length.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from memjax.evict.compact import SINKS, layer_traits
from memjax.evict.indexer import index_keys, index_scores, score_heads, token_scores
from memjax.evict.lesson import CHUNK, Lessons, study
from memjax.evict.policies.base import ranked
from memjax.models.config import ModelConfig
from memjax.models.decoder import Model, Params, rms_norm

RECALLS = (0.1, 0.25, 0.5)  # shares of a text that are kept, at which the teacher's mass is counted


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compared. reduce: the largest weight and score of each token, then one distribution per text ("max"), or one
    per query ("mean"). judges: whose index scores they are: the text's last `window` queries ("window"), which is what the
    policy will judge by, or those that ask ("asked", the paper's; the policy then judges by other queries than it learnt
    from). The first `sinks` tokens are not compared: they stay anyway.
    """

    reduce: Literal["max", "mean"] = "max"
    judges: Literal["window", "asked"] = "window"
    window: int = 128
    sinks: int = SINKS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """What the loss reads beside the batch and does not train: the frozen base."""

    params: Params
    model: Model = dataclasses.field(metadata={"static": True})
    target: Target = dataclasses.field(metadata={"static": True})


def indexer_loss(
    teacher: Teacher, trained: Params, lessons: Lessons, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean over layers and texts of the KL in nats; metrics: it, `weight` (texts), and `recall_25`, see `recall`."""
    kl, share = compare(teacher, trained, lessons)
    weight = lessons["asks"].any(axis=1).astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    mean = lambda each: (each.mean(axis=0) * weight).sum() / count
    return mean(kl), {"kl": mean(kl), "recall_25": mean(share[1]), "weight": weight.sum()}


def compare(teacher: Teacher, trained: Params, lessons: Lessons) -> tuple[jax.Array, jax.Array]:
    """(KL float32 [L, B], `recall` at RECALLS [R, L, B]) of an indexer's parameters [L, …] on lessons."""
    model, target = teacher.model, teacher.target
    asked = target.judges == "asked"
    behind = ("q", "lse", "x", "q_raw") if asked else ("q", "lse")
    read = study(model, teacher.params, lessons, ("x", "q_raw"), behind)
    reach, _ = layer_traits(model.config)
    norm = jax.lax.stop_gradient(teacher.params["layers"]["attn_norm"])

    def layer(_: None, xs: tuple[Any, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        trained, text, behind, norm, reach = xs
        return None, _layer(model.config, target, trained, text, behind, norm, reach, lessons)

    _, (kl, share) = jax.lax.scan(layer, None, (trained, read.text, read.behind, norm, jnp.asarray(reach)))
    return kl, share.swapaxes(0, 1)


def _layer(
    config: ModelConfig,
    target: Target,
    trained: Params,
    text: dict[str, jax.Array],
    behind: dict[str, jax.Array],
    norm: jax.Array,
    reach: jax.Array,
    lessons: Lessons,
) -> tuple[jax.Array, jax.Array]:
    """(KL [B], recall [R, B]) of one layer, means over the P scores that the indexer gives a token."""
    at, places, asks = lessons["at"], lessons["places"], lessons["asks"]
    heads, every = score_heads(trained), at[:, None]
    allowed = (at >= target.sinks)[:, None]
    h = rms_norm(text["x"], norm, config)
    judged = None
    if target.judges == "asked":
        judged, keys = (behind["q_raw"], rms_norm(behind["x"], norm, config)), index_keys(trained, h)
    else:
        score = window_scores(target, trained, text["q_raw"], h, at, reach)
    rows = target.reduce == "mean" and judged is not None

    def step(total: tuple[jax.Array, ...], part: tuple[Any, ...]) -> tuple[tuple[jax.Array, ...], None]:
        most, best, kl, count = total
        q, lse, place, asks, judges = part
        paid = attention_paid(config, q, lse, text["k"], place, at, asks & (place >= 0), reach)
        paid = paid if heads > 1 else paid.mean(axis=1, keepdims=True)
        paid = jnp.where(allowed[:, :, None], paid, 0.0)
        counted = asks[:, None] & (paid.sum(axis=-1) > 0)
        each = _normalised(paid) if target.reduce == "mean" else paid
        seen = jnp.where(asks, place, -1)
        if judges is not None:
            raw, own = judges
            given = index_scores(trained, raw, own, keys)
            if rows:
                kl = kl + jnp.where(counted, kl_of(each, given, allowed[:, :, None]), 0.0).sum(axis=2)
            best = jnp.maximum(best, token_scores(given, seen, every, reach, mean=False))
        folded = jnp.where(counted[..., None], each, 0.0)
        most = most + folded.sum(axis=2) if target.reduce == "mean" else jnp.maximum(most, folded.max(axis=2))
        return (most, best, kl, count + counted.sum(axis=2)), None

    zeros = jnp.zeros((at.shape[0], heads, at.shape[1]), jnp.float32)
    first = (zeros, jnp.full(zeros.shape, jnp.finfo(jnp.float32).min), zeros[..., 0], zeros[..., 0])
    parts = jax.tree.map(_chunked, (behind["q"], behind["lse"], places, asks, judged))
    # Recomputed in the backward pass: the weights of all queries at once would be what chunks are there to avoid.
    (most, best, kl, count), _ = jax.lax.scan(jax.checkpoint(step), first, parts)
    teacher = _normalised(most)
    if judged is not None:
        score = best
    kl = kl / jnp.maximum(count, 1.0) if rows else kl_of(teacher, score, allowed)
    return kl.mean(axis=1), recall(teacher, jax.lax.stop_gradient(score), allowed).mean(axis=-1)


def window_scores(
    target: Target, trained: Params, q_raw: jax.Array, h: jax.Array, at: jax.Array, reach: jax.Array
) -> jax.Array:
    """What the policy will say of texts [B, P, S]: scores by their last `window` queries; q_raw, h of a layer."""
    last = min(target.window, at.shape[1])
    scores = index_scores(trained, q_raw[:, -last:], h[:, -last:], index_keys(trained, h))
    return token_scores(scores, at[:, -last:], at[:, None], reach, mean=target.reduce == "mean")


def attention_paid(
    config: ModelConfig,
    q: jax.Array,
    lse: jax.Array,
    k: jax.Array,
    q_position: jax.Array,
    position: jax.Array,
    counts: jax.Array,
    reach: jax.Array,
) -> jax.Array:
    """The attention that queries pay the keys, mean over a key head's queries, float32 [B, K, T, S]: exp(logit - lse), of
    one layer.

    q [B, T, N, H] and k [B, S, K, H] rotated, lse [B, T, N] over all that the queries saw, so the weights are those of the
    forward pass whatever else was seen; rows that do not count and keys that are not seen are 0, never exp(-inf) times 0.
    """
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    logits = jnp.einsum(
        "btkgh,bskh->bktgs",
        (q * config.query_scale).reshape(batch, length, groups, heads // groups, size),
        k.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    if config.attn_softcap is not None:
        logits = config.attn_softcap * jnp.tanh(logits / config.attn_softcap)
    ahead = q_position[:, :, None] - position[:, None]
    seen = (position[:, None] >= 0) & (ahead >= 0) & (ahead < reach) & counts[..., None]
    whole = jnp.where(jnp.isfinite(lse), lse, 0.0).reshape(batch, length, groups, heads // groups, 1).swapaxes(1, 2)
    weights = jnp.exp(jnp.where(seen[:, None, :, None], logits - whole, -jnp.inf))
    return weights.mean(axis=3)


def kl_of(teacher: jax.Array, score: jax.Array, allowed: jax.Array) -> jax.Array:
    """KL(teacher || softmax(score)) over the allowed of the last axis, float32; 0 where the teacher has no mass."""
    score = jnp.where(allowed, score, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(allowed, score, jnp.finfo(jnp.float32).min).max(axis=-1, keepdims=True))
    total = jnp.where(allowed, jnp.exp(score - top), 0.0).sum(axis=-1, keepdims=True)
    log_student = score - top - jnp.log(jnp.maximum(total, jnp.finfo(jnp.float32).tiny))
    held = allowed & (teacher > 0)
    log_teacher = jnp.log(jnp.where(held, teacher, 1.0))
    return jnp.where(held, teacher * (log_teacher - jnp.where(held, log_student, 0.0)), 0.0).sum(axis=-1)


def recall(teacher: jax.Array, score: jax.Array, allowed: jax.Array) -> jax.Array:
    """Of the teacher's mass [..., S], the part on the tokens that score best over that on the tokens which it itself puts
    first, where the shares RECALLS of the allowed are kept: float32 [R, ...]."""
    count = allowed.sum(axis=-1)
    own, found = (ranked(jnp.where(allowed, x, -jnp.inf)) for x in (teacher, score))

    def at(share: float) -> jax.Array:
        keep = jnp.maximum((share * count).astype(jnp.int32), 1)[..., None]
        best, got = (jnp.where(allowed & (place < keep), teacher, 0.0).sum(axis=-1) for place in (own, found))
        return got / jnp.maximum(best, jnp.finfo(jnp.float32).tiny)

    return jnp.stack([at(share) for share in RECALLS])


def _normalised(weights: jax.Array) -> jax.Array:
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def _chunked(x: jax.Array) -> jax.Array:
    """[B, A, …] as chunks [A / CHUNK, B, CHUNK, …], filled up with zeros: padding asks nothing."""
    batch, length = x.shape[:2]
    size = min(length, CHUNK)
    x = jnp.pad(x, [(0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)
