"""The indexer as a policy: its learned scores of the last queries, one for all heads of a layer (arXiv 2605.25475)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.indexer import index_scores
from memjax.evict.policies.base import Policy, View, above


@dataclasses.dataclass(frozen=True)
class Indexer(Policy):
    """The largest (or with `mean` the mean) index score that the last `window` queries give; the first `sinks` stay.

    Its parameters come with the view, so it is not among POLICIES: a cache that it judges is read with them, and holds the
    tokens' index keys, with which tokens that were read long ago are scored again by the queries of every block.
    """

    name: ClassVar[str] = "indexer"
    window: int = 128
    sinks: int = 4
    mean: bool = False

    @property
    def queries(self) -> int | None:
        """The window."""
        return self.window

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S], alike in all heads."""
        assert view.learned is not None
        assert view.index is not None
        assert view.h is not None
        scores = index_scores(view.learned, view.q_raw, view.h, view.index)
        position = view.position[:, 0]
        ahead = view.q_position[:, :, None] - position[:, None]
        seen = (position[:, None] >= 0) & (view.q_position[:, :, None] >= 0) & (ahead >= 0) & (ahead < view.reach)
        if self.mean:
            reduced = jnp.where(seen, scores, 0.0).sum(axis=1) / jnp.maximum(seen.sum(axis=1), 1)
        else:
            reduced = jnp.where(seen, scores, -jnp.inf).max(axis=1)
        # What no query of the window can see is no candidate of attention either.
        reduced = jnp.where(seen.any(axis=1), reduced, jnp.finfo(jnp.float32).min)
        score = jnp.broadcast_to(reduced[:, None], view.position.shape)
        return above(score, (view.position < self.sinks) & view.valid)
