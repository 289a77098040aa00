"""The latent memory: a state of fixed size that takes in evicted tokens and gives back what attention lost with them.

Arrays of one layer; features are given, so that learned, positive and exact ones are read by the same functions. For one
query with kept set S, evicted set E and the share a of softmax mass in E: o_full - o_S = a (o_E - o_S).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

FLOOR = 1e-6  # added to the denominator of `residual`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """a float32 [..., B, K, m, H], sums of feature times value; z float32 [..., B, K, m], of features or their squares."""

    a: jax.Array
    z: jax.Array


def empty_latent(batch: int, heads: int, features: int, size: int) -> Latent:
    """Nothing evicted yet; every sequence starts with it."""
    return Latent(jnp.zeros((batch, heads, features, size), jnp.float32), jnp.zeros((batch, heads, features), jnp.float32))


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
    return Latent(decayed[..., None] * latent.a + rate * a, decayed * latent.z + rate * z)


def residual(latent: Latent, features: jax.Array, *, root: bool = False) -> jax.Array:
    """m(q) = phi(q)'a / (phi(q)^2'z + 1e-6), float32 [B, T, N, H], of query features [B, T, N, m].

    root takes the square root of the denominator's sum, which makes the result independent of the features' scale. Zero
    where nothing was written: the denominator is tiny there.
    """
    phi = _grouped(latent, features)
    top = jnp.einsum("btkgm,bkmh->btkgh", phi, latent.a)
    mass = jnp.einsum("btkgm,bkm->btkg", jnp.square(phi), latent.z)[..., None]
    out = jnp.where(mass > 0, top / (jnp.sqrt(mass + FLOOR) if root else mass + FLOOR), 0.0)
    return jnp.where(jnp.isfinite(out), out, 0.0).reshape(*features.shape[:-1], -1)


def add(out: jax.Array, read: jax.Array, gate: jax.Array | float) -> jax.Array:
    """out + gate * read [B, T, N, H] in out's dtype; a gate of 0 leaves out as it is."""
    return (out.astype(jnp.float32) + gate * read).astype(out.dtype)


def merge_mass(out: jax.Array, lse: jax.Array, latent: Latent, features: jax.Array) -> jax.Array:
    """(Z out + phi(q)'a) / (Z + phi(q)'z) with Z = exp(lse) [B, T, N] of the kept tokens; out [B, T, N, H], its dtype.

    For positive features whose product is the softmax kernel this is attention over kept and evicted tokens, exactly.
    Written as out + share (mean - out), so that a state without mass leaves out as it is.
    """
    phi = _grouped(latent, features)
    top = jnp.einsum("btkgm,bkmh->btkgh", phi, latent.a).reshape(*features.shape[:-1], -1)
    mass = jnp.einsum("btkgm,bkm->btkg", phi, latent.z).reshape(features.shape[:-1])
    some = mass > 0
    log_mass = jnp.log(jnp.where(some, mass, 1.0))
    share = jnp.where(some, jax.nn.sigmoid(log_mass - lse), 0.0)[..., None]
    mean = jnp.where(some[..., None], top / jnp.where(some, mass, 1.0)[..., None], 0.0)
    known = out.astype(jnp.float32)
    return (known + share * (mean - known)).astype(out.dtype)


def _grouped(latent: Latent, features: jax.Array) -> jax.Array:
    """Query features [B, T, N, m] as float32 [B, T, K, N/K, m]: every head of a group reads its key head's state."""
    batch, length, heads, count = features.shape
    groups = latent.z.shape[-2]
    return features.astype(jnp.float32).reshape(batch, length, groups, heads // groups, count)
