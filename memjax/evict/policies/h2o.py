"""H2O: tokens that all queries so far paid attention to (arXiv 2306.14048)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.policies.base import Policy, View, fold_attention


@dataclasses.dataclass(frozen=True)
class H2O(Policy):
    """The attention received per query that could see the token, mean over the heads of its group.

    kvpress' "observed attention". Over blocks it stays the mean over every query since the token was read. The paper
    also sums over all queries, and keeps the last half of the budget whatever its scores.
    """

    name: ClassVar[str] = "h2o"

    @property
    def queries(self) -> int | None:
        """All."""
        return None

    def recent(self, keep: int) -> int:
        """Half of the budget."""
        return max(1, keep // 2)

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S]."""
        total = fold_attention(view, lambda total, weights: total + weights.sum(axis=3).mean(axis=2))
        return total / jnp.maximum(_seen_by(view, view.q_position), 1)

    def remember(self, stored: jax.Array, fresh: jax.Array, view: View, decay: jax.Array) -> jax.Array:
        """The mean over all queries: what is stored weighs as many as came before this view's."""
        new = _seen_by(view, view.q_position)
        old = jnp.where(jnp.isfinite(stored), (view.length[:, None, None] - view.position) - new, 0)
        old = jnp.maximum(old, 0).astype(jnp.float32)
        kept = jnp.where(jnp.isfinite(stored), stored, 0.0)
        return (old * kept + new * fresh) / jnp.maximum(old + new, 1)


def _seen_by(view: View, q_position: jax.Array) -> jax.Array:
    """How many of the view's queries could see each candidate, int32 [B, K, S]."""
    first = jnp.where(q_position >= 0, q_position, jnp.iinfo(jnp.int32).max).min(axis=1)[:, None, None]
    return jnp.maximum(view.length[:, None, None] - jnp.maximum(view.position, first), 0)
