"""Expected attention: what queries that have not come yet would attend to (arXiv 2510.00636)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.policies.base import Policy, View, above


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Attention of a Gaussian query, fitted to those seen before rotation and turned by the mean of `future` rotations.

    score = (softmax(mu.k s + s^2 k' Sigma k / 2), mean over the group + epsilon) * |v|; the first `sinks` tokens give
    no query and stay. In blocks the Gaussian is that of the block's queries.
    """

    name: ClassVar[str] = "expected_attention"
    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    @property
    def queries(self) -> int | None:
        """All."""
        return None

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S]."""
        batch, _, groups, size = view.k.shape
        q = view.q_raw.astype(jnp.float32)
        weight = (view.q_position >= self.sinks).astype(jnp.float32)
        total = jnp.maximum(weight.sum(axis=1), 1.0)
        mean = jnp.einsum("bt,btnh->bnh", weight, q) / total[:, None, None]
        centered = (q - mean[:, None]) * jnp.sqrt(weight)[:, :, None, None]
        covariance = jnp.einsum("btni,btnj->bnij", centered, centered) / total[:, None, None, None]
        turn = self._mean_rotation(view)
        mean = jnp.einsum("bij,bnj->bni", turn, mean).reshape(batch, groups, -1, size)
        covariance = jnp.einsum("bij,bnjk,blk->bnil", turn, covariance, turn)
        covariance = covariance.reshape(batch, groups, -1, size, size)
        k = view.k.astype(jnp.float32)
        logits = jnp.einsum("bkgh,bskh->bkgs", mean, k) * view.scale
        turned = jnp.einsum("bkgij,bskj->bkgsi", covariance, k)
        logits += jnp.einsum("bkgsi,bski->bkgs", turned, k) * (view.scale**2 / 2)
        counts = view.position >= self.sinks
        logits = jnp.where(counts[:, :, None], logits, -jnp.inf)
        top = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
        weights /= jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        score = (weights.mean(axis=2) + self.epsilon) * jnp.linalg.norm(view.v.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        return above(score, (view.position < self.sinks) & view.valid)

    def _mean_rotation(self, view: View) -> jax.Array:
        """The mean of the next rotations as matrices [B, H, H]."""
        angle = (view.length[:, None] + jnp.arange(self.future)).astype(jnp.float32)[..., None] * view.frequency
        cos, sin = (jax.vmap(jnp.diag)(part(angle).mean(axis=1)) for part in (jnp.cos, jnp.sin))
        return jnp.block([[cos, -sin], [sin, cos]])
