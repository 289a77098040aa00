"""AdaKV: the heads of a layer compete for one budget (arXiv 2407.11550)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memjax.evict.policies.base import Policy, View, ranked
from memjax.evict.policies.snapkv import SnapKV


@dataclasses.dataclass(frozen=True)
class AdaKV(Policy):
    """Another policy's scores; the lowest of all heads of a layer go, each head keeping the best `safe` of its share.

    Places are allocated for the most that one head may keep, so that the shapes stay one: fewer tokens, not fewer bytes.
    """

    name: ClassVar[str] = "adakv"
    inner: Policy = dataclasses.field(default_factory=SnapKV)
    safe: float = 0.2

    @property
    def queries(self) -> int | None:
        """What the inner policy reads."""
        return self.inner.queries

    def score(self, view: View) -> jax.Array:
        """The inner policy's."""
        return self.inner.score(view)

    def remember(self, stored: jax.Array, fresh: jax.Array, view: View, decay: jax.Array) -> jax.Array:
        """The inner policy's."""
        return self.inner.remember(stored, fresh, view, decay)

    def recent(self, keep: int) -> int:
        """The inner policy's."""
        return self.inner.recent(keep)

    def budgets(self, keep: float, length: int, num_layers: int) -> np.ndarray:
        """The inner policy's."""
        return self.inner.budgets(keep, length, num_layers)

    def slots(self, keep: int, num_heads: int) -> int:
        """All of the layer's budget, less what is safe for the other heads."""
        return num_heads * keep - (num_heads - 1) * max(1, math.floor(keep * self.safe + 1e-4))

    def per_head(self, score: jax.Array, keep: jax.Array) -> jax.Array:
        """int32 [B, K], summing up to K * keep."""
        batch, heads, count = score.shape
        # The small term keeps a product such as 15 * 0.2, exact in the paper's terms, from falling below in float32.
        safe = jnp.maximum(1, jnp.floor(keep * self.safe + 1e-4)).astype(jnp.int32)
        raised = jnp.where(ranked(score) < safe, jnp.inf, score).reshape(batch, -1)
        return (ranked(raised) < heads * keep).reshape(batch, heads, count).sum(axis=-1, dtype=jnp.int32)
