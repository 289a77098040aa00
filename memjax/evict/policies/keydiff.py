"""KeyDiff: keys unlike the mean key stay (arXiv 2504.15364)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.policies.base import KeyPolicy, View


@dataclasses.dataclass(frozen=True)
class KeyDiff(KeyPolicy):
    """The negative cosine between a key and the mean direction of its head's keys; in blocks, of the union each time."""

    name: ClassVar[str] = "keydiff"

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S]."""
        k = view.k.astype(jnp.float32).swapaxes(1, 2)
        direction = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
        valid = view.valid[..., None]
        anchor = jnp.where(valid, direction, 0.0).sum(axis=2, keepdims=True) / jnp.maximum(
            valid.sum(axis=2, keepdims=True), 1
        )
        length = jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-8)
        return -(direction * (anchor / length)).sum(axis=-1)
