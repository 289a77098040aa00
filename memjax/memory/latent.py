"""The latent memory as it is read: a state of fixed size that gives back what attention lost with the tokens it took in.

For one query with kept set S, evicted set E and the share a of softmax mass in E: o_full - o_S = a (o_E - o_S). Features
are given to `residual` and `merge_mass`, so that learned, positive and exact ones are read by the same functions;
`read_latent` chooses among them by a `Rule`. `evict.latent` writes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

FLOOR = 1e-6  # added to the denominator of `residual`
STEEPEST = 60.0  # exponents of positive features: beyond that float32 holds no sum of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """a float32 [..., B, K, m, H], sums of feature times value; z float32 [..., B, K, m], of features or their squares;
    count int32 [..., B, K], tokens taken in. k float32 [..., B, K, m, H], sums of keys, where places are centroids."""

    a: jax.Array
    z: jax.Array
    count: jax.Array
    k: jax.Array | None = None

    @property
    def bytes(self) -> int:
        """What its arrays take: the part of a budget that they stand for."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a latent memory is written and read. merge: "add", the paper's quotient with squared features, behind a gate
    (arXiv 2605.25475); "root", with the square root of its denominator; "delta", unit features written by the delta rule;
    "mass", positive features whose mass stands against the kept softmax's; "slots", centroids of evicted keys with their
    member counts, read inside the softmax and not learned. features: m. gate: one number per layer, or one of each query
    and of how much is kept and evicted. constant: one more feature that is always 1, which stores the plain mean (not for
    "mass" and "slots").
    """

    merge: Literal["add", "root", "delta", "mass", "slots"] = "mass"
    features: int = 64
    gate: Literal["layer", "query"] = "layer"
    constant: bool = False

    @property
    def places(self) -> int:
        """m of the state, the constant feature included."""
        return self.features + (self.constant and self.merge in ("add", "root", "delta"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """What `forward` reads: a state and the parameters of its rule, with a leading layer axis or of one layer."""

    latent: Latent
    params: dict[str, jax.Array]
    rule: Rule = dataclasses.field(metadata={"static": True})


def read_latent(
    residual: Residual, q: jax.Array, out: jax.Array, lse: jax.Array, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """out [B, T, N, H], in its dtype, with what one layer's memory gives back to the queries q [B, T, N, H] (rotated).

    lse float32 [B, T, N] of the kept tokens; scale and softcap are those of the attention's logits. Where nothing was
    written, or the gate is 0, out is returned as it is, bit for bit.
    """
    rule, params, latent = residual.rule, residual.params, residual.latent
    if rule.merge == "slots":
        return merge_slots(out, lse, latent, q, scale=scale, softcap=softcap)
    gate = gate_of(rule, params, latent, q, lse)
    if rule.merge == "mass":
        log_phi = log_features(params, q, scale)
        top = jax.lax.stop_gradient(log_phi.max(axis=-1, keepdims=True))
        phi = jnp.exp(log_phi - top)
        return merge_mass(out, lse - top[..., 0] - params["scale"], latent, phi, gate)
    phi = features_of(rule, params, q)
    if rule.merge == "delta":
        read = jnp.einsum("btkgm,bkmh->btkgh", _grouped(latent, phi), latent.a).reshape(*q.shape[:-1], -1)
        return add(out, read, gate)
    return add(out, residual_of(latent, phi, root=rule.merge == "root"), gate)


def features_of(rule: Rule, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Linear features float32 [..., m] of keys or queries [..., H]; of unit length for the delta rule."""
    phi = x.astype(jnp.float32) @ params["phi"]
    if rule.constant:
        phi = jnp.concatenate([phi, jnp.ones_like(phi[..., :1])], axis=-1)
    if rule.merge == "delta":
        phi = phi * jax.lax.rsqrt(jnp.square(phi).sum(axis=-1, keepdims=True) + FLOOR)
    return phi


def log_features(params: dict[str, jax.Array], x: jax.Array, scale: float) -> jax.Array:
    """Logarithms of positive features [..., m]: exp(w x - c |x|^2 / 2) / sqrt(m) of x in units of the attention's scale.

    For w normal with variance c their products have exp(c scale q k) as their mean (Performer, arXiv 2009.14794, lemma 1):
    attention's own kernel at c = 1, plain sums at c = 0. w and c (`norm`) are learned.
    """
    x = x.astype(jnp.float32) * scale**0.5
    exponent = x @ params["phi"] - params["norm"] * jnp.square(x).sum(axis=-1, keepdims=True) / 2
    return jnp.clip(exponent - 0.5 * jnp.log(params["phi"].shape[-1]), -STEEPEST, STEEPEST)


def gate_of(rule: Rule, params: dict[str, jax.Array], latent: Latent, q: jax.Array, lse: jax.Array) -> jax.Array:
    """The gate in [0, 1], float32 [] or [B, T, N, 1]."""
    if rule.gate == "layer":
        return jax.nn.sigmoid(params["gate"])
    count = jnp.log1p(latent.count.astype(jnp.float32))
    count = jnp.repeat(count, q.shape[2] // count.shape[-1], axis=-1)[:, None, :, None]
    told = jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]
    seen = jnp.concatenate([q.astype(jnp.float32), told, jnp.broadcast_to(count, told.shape)], axis=-1)
    inner = jax.nn.gelu(seen @ params["gate_in"] + params["gate_in_bias"])
    return jax.nn.sigmoid(inner @ params["gate_out"][:, None] + params["gate"])


def residual_of(latent: Latent, features: jax.Array, *, root: bool = False) -> jax.Array:
    """m(q) = phi(q)'a / (phi(q)^2'z + 1e-6), float32 [B, T, N, H], of query features [B, T, N, m].

    root takes the square root of the denominator's sum, which makes the result independent of the features' scale. Zero
    where nothing was written: the denominator is tiny there.
    """
    phi = _grouped(latent, features)
    top = jnp.einsum("btkgm,bkmh->btkgh", phi, latent.a)
    mass = jnp.einsum("btkgm,bkm->btkg", jnp.square(phi), latent.z)[..., None]
    some = mass > 0
    safe = jnp.where(some, mass, 1.0)
    out = jnp.where(some, top / (jnp.sqrt(safe + FLOOR) if root else safe + FLOOR), 0.0)
    return jnp.where(jnp.isfinite(out), out, 0.0).reshape(*features.shape[:-1], -1)


def add(out: jax.Array, read: jax.Array, gate: jax.Array | float) -> jax.Array:
    """out + gate * read [B, T, N, H] in out's dtype; a gate of 0 leaves out as it is."""
    return (out.astype(jnp.float32) + gate * read).astype(out.dtype)


def merge_mass(
    out: jax.Array, lse: jax.Array, latent: Latent, features: jax.Array, gate: jax.Array | float = 1.0
) -> jax.Array:
    """(Z out + phi(q)'a) / (Z + phi(q)'z) with Z = exp(lse) [B, T, N] of the kept tokens; out [B, T, N, H], its dtype.

    For positive features whose product is the softmax kernel this is attention over kept and evicted tokens, exactly.
    Written as out + gate * share (mean - out), so that a state without mass leaves out as it is.
    """
    phi = _grouped(latent, features)
    top = jnp.einsum("btkgm,bkmh->btkgh", phi, latent.a).reshape(*features.shape[:-1], -1)
    mass = jnp.einsum("btkgm,bkm->btkg", phi, latent.z).reshape(features.shape[:-1])
    some = mass > 0
    mean = jnp.where(some[..., None], top / jnp.where(some, mass, 1.0)[..., None], 0.0)
    return _shared(out, mean, some, jnp.log(jnp.where(some, mass, 1.0)) - lse, gate)


def merge_slots(
    out: jax.Array, lse: jax.Array, latent: Latent, q: jax.Array, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """Attention over kept tokens and centroids, each of which counts as many times as it has members (a bias log n).

    That is `merge_mass` with exp(scale q c) as features of the centroids c = k / z: exact where every centroid is one
    token. out, lse as there; q [B, T, N, H].
    """
    assert latent.k is not None
    held = latent.z > 0
    size = jnp.where(held, latent.z, 1.0)
    centres, values = latent.k / size[..., None], latent.a / size[..., None]
    logits = scale * jnp.einsum("btkgh,bkmh->btkgm", _grouped(latent, q), centres)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(held[:, None, :, None], logits + jnp.log(size)[:, None, :, None], -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    some = jnp.isfinite(top)
    weights = jnp.exp(logits - jnp.where(some, top, 0.0))
    total = jnp.where(some, weights.sum(axis=-1, keepdims=True), 1.0)
    mean = jnp.einsum("btkgm,bkmh->btkgh", weights / total, values)
    flat = lambda x: x.reshape(*q.shape[:-1], -1)
    log_mass = flat(jnp.where(some, top, 0.0) + jnp.log(total))[..., 0]
    return _shared(out, flat(mean), flat(some)[..., 0], log_mass - lse, 1.0)


def _shared(out: jax.Array, mean: jax.Array, some: jax.Array, log_odds: jax.Array, gate: jax.Array | float) -> jax.Array:
    """out + gate * sigmoid(log_odds) (mean - out) where there is `some` mass [B, T, N], in out's dtype."""
    share = jnp.where(some, jax.nn.sigmoid(log_odds), 0.0)[..., None]
    known = out.astype(jnp.float32)
    return (known + gate * share * (mean - known)).astype(out.dtype)


def _grouped(latent: Latent, features: jax.Array) -> Any:
    """Query features [B, T, N, m] as float32 [B, T, K, N/K, m]: every head of a group reads its key head's state."""
    batch, length, heads, count = features.shape
    groups = latent.z.shape[-2]
    return features.astype(jnp.float32).reshape(batch, length, groups, heads // groups, count)
