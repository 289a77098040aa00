"""Writing the latent memory: evicted tokens go into a state of fixed size, which `memory.latent` reads.

Arrays of one layer. A token is written once, when it leaves the cache, and by nothing but true sums: no means of several
tokens are multiplied (arXiv 2605.25475, section 4, and its alternatives).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from memjax.memory.latent import Latent, Rule, features_of, log_features
from memjax.models.config import ModelConfig

GATE_WIDTH = 32
RATE = -6.907  # softplus of it is 1e-3; the delta rule, which takes a sigmoid above it, mends half of an error at first
# Attention's own kernel (1) has no estimate in few features where keys are long: sums vanish, and gradients with them.
KERNEL = 0.09
MASS = 2.0  # logarithm of what evicted mass counts more at first, of softer features, which underrate their best match
GATE = -4.0  # logit of the gate at the start: near to plain eviction, but with a gradient


def empty_latent(
    batch: int, heads: int, features: int, size: int, layers: int | None = None, slots: bool = False
) -> Latent:
    """Nothing evicted yet; every sequence starts with it. layers: with a leading axis of as many; slots: of centroids."""
    lead = (batch, heads) if layers is None else (layers, batch, heads)
    sums = jnp.zeros((*lead, features, size), jnp.float32)
    keys = jnp.zeros_like(sums) if slots else None
    return Latent(sums, jnp.zeros((*lead, features), jnp.float32), jnp.zeros(lead, jnp.int32), keys)


def state_of(config: ModelConfig, rule: Rule, batch: int) -> Latent:
    """The empty state [L, B, ...] of a base under a rule."""
    heads = (batch, config.num_kv_heads)
    return empty_latent(*heads, rule.places, config.head_size, config.num_layers, slots=rule.merge == "slots")


def abstract_memory(config: ModelConfig, rule: Rule) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`, float32, stacked over layers; none for centroids.

    phi [L, H, m], shared by all heads, keys and queries; gate, decay, rate [L], before sigmoid, sigmoid and softplus; for
    mass scale [L], the logarithm of what evicted mass counts, and norm [L], see `log_features`; for a gate of each query
    its two maps.
    """
    if rule.merge == "slots":
        return {}
    layers, size = config.num_layers, config.head_size
    shapes: dict[str, tuple[int, ...]] = {"phi": (size, rule.features), "gate": ()}
    shapes |= {"scale": (), "norm": ()} if rule.merge == "mass" else {"decay": (), "rate": ()}
    if rule.gate == "query":
        shapes |= {"gate_in": (size + 2, GATE_WIDTH), "gate_in_bias": (GATE_WIDTH,), "gate_out": (GATE_WIDTH,)}
    return {name: jax.ShapeDtypeStruct((layers, *shape), jnp.float32) for name, shape in shapes.items()}


def init_memory(config: ModelConfig, rule: Rule, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh parameters: a nearly closed gate (open for mass, which is attention itself where its features are the kernel),
    decay 0.99, rate 1e-3 (the reference code's), maps normal, those of mass for a kernel much softer than attention's."""
    abstract = abstract_memory(config, rule)
    begin = {"gate": -GATE if rule.merge == "mass" else GATE, "decay": 4.595, "rate": RATE, "scale": MASS, "norm": KERNEL}

    def init(name: str, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if name in begin:
            return jnp.full(leaf.shape, begin[name], leaf.dtype)
        if name in ("gate_in_bias", "gate_out"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        drawn = jax.random.normal(key, leaf.shape, leaf.dtype)
        return drawn * (KERNEL**0.5 if rule.merge == "mass" and name == "phi" else leaf.shape[1] ** -0.5)

    keys = jax.random.split(key, max(len(abstract), 1))
    return {name: init(name, leaf, k) for (name, leaf), k in zip(abstract.items(), keys, strict=False)}


def absorb(
    rule: Rule, params: dict[str, jax.Array], latent: Latent, k: jax.Array, v: jax.Array, evicted: jax.Array, scale: float
) -> Latent:
    """The state after one eviction event under a rule: k (rotated), v [B, S, K, H]; evicted bool [B, K, S]; all others
    count nothing. scale is that of the attention's logits."""
    if rule.merge == "slots":
        return cluster(latent, k, v, evicted)
    keys = k.swapaxes(1, 2)
    if rule.merge == "mass":
        return write(latent, jnp.exp(log_features(params, keys, scale)), v, evicted, squared=False)
    phi = features_of(rule, params, keys)
    decay, rate = jax.nn.sigmoid(params["decay"]), jax.nn.softplus(params["rate"])
    if rule.merge == "delta":
        return write_delta(latent, phi, v, evicted, decay=decay, rate=jax.nn.sigmoid(params["rate"] - RATE))
    return write(latent, phi, v, evicted, decay=decay, rate=rate)


def write(
    latent: Latent,
    features: jax.Array,
    v: jax.Array,
    evicted: jax.Array,
    *,
    decay: jax.Array | float = 1.0,
    rate: jax.Array | float = 1.0,
    squared: bool = True,
) -> Latent:
    """The state after one eviction event: a <- decay a + rate sum phi(k) v', z likewise of phi(k)^2 or phi(k).

    features [B, K, S, m] of the candidates' keys, v [B, S, K, H], evicted bool [B, K, S]: all others count nothing. The
    decay is applied once per event and only where something is evicted. squared is the paper's normaliser, which stays
    positive whatever the features' sign; positive features with mass take the plain sum (arXiv 2605.25475, 2404.07143).
    """
    phi = jnp.where(evicted[..., None], features.astype(jnp.float32), 0.0)
    any_lost = evicted.any(axis=-1)[..., None]
    decayed = jnp.where(any_lost, decay, 1.0)
    a = jnp.einsum("bksm,bskh->bkmh", phi, v.astype(jnp.float32))
    z = (jnp.square(phi) if squared else phi).sum(axis=2)
    count = latent.count + evicted.sum(axis=-1, dtype=jnp.int32)
    return Latent(decayed[..., None] * latent.a + rate * a, decayed * latent.z + rate * z, count, latent.k)


def write_delta(
    latent: Latent, features: jax.Array, v: jax.Array, evicted: jax.Array, *, decay: jax.Array, rate: jax.Array
) -> Latent:
    """The state after one event by the delta rule, token after token in the order of the text: a <- a + rate phi (v -
    a'phi)' with unit features, so that a key that comes again replaces its value (Gated DeltaNet, arXiv 2412.06464)."""
    any_lost = evicted.any(axis=-1)[..., None, None]
    a = jnp.where(any_lost, decay, 1.0) * latent.a

    def step(a: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        phi, v, lost = token
        error = v - jnp.einsum("bkmh,bkm->bkh", a, phi)
        changed = a + rate * jnp.einsum("bkm,bkh->bkmh", phi, error)
        return jnp.where(lost[..., None, None], changed, a), None

    tokens = (jnp.moveaxis(features, 2, 0), v.astype(jnp.float32).swapaxes(0, 1), jnp.moveaxis(evicted, 2, 0))
    a, _ = jax.lax.scan(step, a, tokens)
    return Latent(a, latent.z, latent.count + evicted.sum(axis=-1, dtype=jnp.int32), latent.k)


def cluster(latent: Latent, k: jax.Array, v: jax.Array, evicted: jax.Array) -> Latent:
    """The state after one event where places are centroids: each evicted token joins the nearest one.

    Empty places are given to evicted tokens at even distances first; where there are as many, each token has its own. k, v
    [B, S, K, H], evicted bool [B, K, S]. Nothing is learned; sums of keys and values and counts are exact.
    """
    assert latent.k is not None
    keys, values = (x.astype(jnp.float32).swapaxes(1, 2) for x in (k, v))
    held = latent.z > 0
    free = jnp.cumsum(~held, axis=-1) - 1  # which of the empty places each is
    spare, lost = (~held).sum(axis=-1, keepdims=True), evicted.sum(axis=-1, keepdims=True)
    # The empty place j of E takes the evicted token of rank j n / E, or of rank j where tokens are fewer.
    rank = jnp.where(lost > spare, free * lost // jnp.maximum(spare, 1), free)
    order = jnp.argsort(~evicted, axis=-1, stable=True)
    seed = jnp.take_along_axis(order, jnp.clip(rank, 0, keys.shape[2] - 1), axis=-1)
    seeded = ~held & (rank < lost)
    size = jnp.where(held, latent.z, 1.0)[..., None]
    centres = jnp.where(held[..., None], latent.k / size, jnp.take_along_axis(keys, seed[..., None], axis=2))
    near = 2 * jnp.einsum("bksh,bkmh->bksm", keys, centres) - jnp.square(centres).sum(axis=-1)[:, :, None]
    near = jnp.where((held | seeded)[:, :, None], near, -jnp.inf)
    joins = jax.nn.one_hot(near.argmax(axis=-1), centres.shape[2], dtype=jnp.float32) * evicted[..., None]
    return Latent(
        latent.a + jnp.einsum("bksm,bksh->bkmh", joins, values),
        latent.z + joins.sum(axis=2),
        latent.count + evicted.sum(axis=-1, dtype=jnp.int32),
        latent.k + jnp.einsum("bksm,bksh->bkmh", joins, keys),
    )
