"""SnapKV: what the last queries attend to, smoothed over neighbours (arXiv 2404.14469)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.policies.base import Policy, View, above, attention, rank, scatter


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
    """Mean attention of the last `window` queries, average-pooled over `kernel` neighbours, mean over the group's heads.

    The window itself stays: it scores above all others. A neighbour is the next candidate, whatever was evicted between.
    """

    name: ClassVar[str] = "snapkv"
    window: int = 64
    kernel: int = 5

    @property
    def queries(self) -> int | None:
        """The window."""
        return self.window

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S]."""
        looks = view.q_position >= jnp.maximum(view.length - view.window, 0)[:, None]
        weights = jnp.where(looks[:, None, None, :, None], attention(view), 0.0)
        mean = weights.sum(axis=3) / jnp.maximum(looks.sum(axis=1), 1)[:, None, None, None]
        # Neighbours are neighbours among the candidates that are tokens, so that empty places between them do not count.
        place, count = rank(view), view.position.shape[-1]
        mean = jnp.where(view.observing, 0.0, mean.mean(axis=2))
        pooled = jax.lax.reduce_window(
            scatter(mean, jnp.where(view.valid, place, count), count),
            0.0,
            jax.lax.add,
            (1, 1, self.kernel),
            (1, 1, 1),
            ((0, 0), (0, 0), (self.kernel // 2, (self.kernel - 1) // 2)),
        )
        pooled = jnp.take_along_axis(pooled, jnp.maximum(place, 0), axis=-1)
        return above(pooled / self.kernel, view.observing & view.valid)
