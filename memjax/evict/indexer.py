"""The indexer: one small learned score per token and layer, from the layer's own queries (arXiv 2605.25475, section 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memjax.errors import ConfigError
from memjax.models.config import ModelConfig

NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """heads: index heads; size: numbers per index head and per token's index key. per_head: a score for each key head,
    from an index head of its own, instead of one for all of a layer; each then keeps its own tokens. With one term there
    is nothing to weigh, and a ReLU would only make ties of what is below zero, so both are left out.
    """

    heads: int
    size: int
    per_head: bool = False

    @classmethod
    def of(cls, config: ModelConfig, per_head: bool = False) -> IndexerConfig:
        """The paper's shape for a base: half as many heads as the queries have, a sixteenth of their size, 8 at least.

        Heads of 128 are the smallest that the paper shows. A LayerNorm makes zero of one number and signs of two. For each
        key head: as many heads, of its size.
        """
        if per_head:
            return cls(config.num_kv_heads, config.head_size, True)
        return cls(max(config.num_heads // 2, 1), max(config.head_size // 16, 8))


def abstract_indexer(config: ModelConfig, index: IndexerConfig) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`, float32, stacked over layers.

    q [L, N H, n e]: its input is as wide as the concatenated queries, which need not be the model's width; k [L, D, e];
    w [L, D, n], signed weights of the heads, of which an indexer per head has none; norms over e with scale and bias.
    ConfigError for one per head with another number of heads than the base has keys'.
    """
    if index.per_head and index.heads != config.num_kv_heads:
        raise ConfigError(f"an indexer per head of this base has {config.num_kv_heads} heads, not {index.heads}")
    layers, queries = config.num_layers, config.num_heads * config.head_size
    shapes = {
        "q": (queries, index.heads * index.size),
        "k": (config.width, index.size),
        "k_bias": (index.size,),
        "w": (config.width, index.heads),
        "w_bias": (index.heads,),
        "q_norm": (index.size,),
        "q_norm_bias": (index.size,),
        "k_norm": (index.size,),
        "k_norm_bias": (index.size,),
    }
    if index.per_head:
        shapes = {name: shape for name, shape in shapes.items() if name not in ("w", "w_bias")}
    return {name: jax.ShapeDtypeStruct((layers, *shape), jnp.float32) for name, shape in shapes.items()}


def init_indexer(config: ModelConfig, index: IndexerConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh parameters: maps normal with variance 1 / inputs, norms one, biases zero."""
    abstract = abstract_indexer(config, index)
    keys = jax.random.split(key, len(abstract))

    def init(name: str, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if name.endswith("_bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name.endswith("_norm"):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.random.normal(key, leaf.shape, leaf.dtype) / leaf.shape[1] ** 0.5

    return {name: init(name, leaf, k) for (name, leaf), k in zip(abstract.items(), keys, strict=True)}


def score_heads(params: dict[str, jax.Array]) -> int:
    """P, how many scores a token has: 1, or as many as there are key heads."""
    return 1 if "w" in params else params["q"].shape[-1] // params["k_norm"].shape[-1]


def index_keys(params: dict[str, jax.Array], h: jax.Array) -> jax.Array:
    """Index keys [B, S, P, e] float32 of one layer, from its attention's input after the norm, h [B, S, D].

    They carry no position: stored beside the cache they score again against later queries. A token has one key; it stands
    P times where every key head keeps tokens of its own.
    """
    key = _layer_norm(h.astype(jnp.float32) @ params["k"] + params["k_bias"], params["k_norm"], params["k_norm_bias"])
    return jnp.repeat(key[:, :, None], score_heads(params), axis=2)


def index_scores(params: dict[str, jax.Array], q_raw: jax.Array, h: jax.Array, keys: jax.Array) -> jax.Array:
    """I[t, s] = sum over heads j of w[t, j] relu(Q[t, j] . K[s]), float32 [B, P, T, S], of one layer.

    q_raw [B, T, N, H]: queries before rotation, after the base's query norm; h [B, T, D]: the attention's input after the
    norm; keys [B, S, P, e] of `index_keys`. P is 1, one score for all key heads of the layer; or each key head p has its
    own, I[p, t, s] = Q[t, p] . K[s] / sqrt(e).
    """
    batch, length = h.shape[:2]
    size = keys.shape[-1]
    q = q_raw.astype(jnp.float32).reshape(batch, length, -1) @ params["q"]
    q = _layer_norm(q.reshape(batch, length, -1, size), params["q_norm"], params["q_norm_bias"])
    if "w" not in params:
        return jnp.einsum("btpe,bspe->bpts", q, keys) * size**-0.5
    weight = (h.astype(jnp.float32) @ params["w"] + params["w_bias"]) * (q.shape[2] * size) ** -0.5
    return jnp.einsum("btj,btjs->bts", weight, jax.nn.relu(jnp.einsum("btje,bse->btjs", q, keys[:, :, 0])))[:, None]


def token_scores(
    scores: jax.Array, q_position: jax.Array, position: jax.Array, reach: jax.Array, *, mean: bool
) -> jax.Array:
    """One score per token, float32 [B, P, S]: the largest, or the mean, of those that the queries which see it give it.

    scores [B, P, T, S] of `index_scores`; q_position [B, T] and position [B, P, S] int32, -1 where there is no token; reach
    int32 [], how far back a query looks. The smallest float32 for what no query sees. Training and the policy reduce
    alike by this one function (arXiv 2605.25475, section 3.2 of the reference code).
    """
    at = q_position[:, None, :, None]
    ahead = at - position[:, :, None]
    seen = (position[:, :, None] >= 0) & (at >= 0) & (ahead >= 0) & (ahead < reach)
    if mean:
        reduced = jnp.where(seen, scores, 0.0).sum(axis=2) / jnp.maximum(seen.sum(axis=2), 1)
    else:
        reduced = jnp.where(seen, scores, -jnp.inf).max(axis=2)
    # What no query can see is no candidate of attention either.
    return jnp.where(seen.any(axis=2), reduced, jnp.finfo(jnp.float32).min)


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(axis=-1, keepdims=True) + NORM_EPS) * scale + bias
