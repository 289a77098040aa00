"""The indexer as a policy: its learned scores of the last queries, one for all heads of a layer or one for each (arXiv
2605.25475)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.indexer import index_scores, token_scores
from memjax.evict.policies.base import Policy, View, above


@dataclasses.dataclass(frozen=True)
class Indexer(Policy):
    """The largest (or with `mean` the mean) index score that the last `window` queries give; the first `sinks` stay.

    Its parameters come with the view, so it is among LEARNED_POLICIES: a cache that it judges is read with them, and holds
    the tokens' index keys, with which tokens that were read long ago are scored again by the queries of every block.
    """

    name: ClassVar[str] = "indexer"
    judged: ClassVar[bool] = True
    window: int = 128
    sinks: int = 4
    mean: bool = False

    @property
    def queries(self) -> int | None:
        """The window."""
        return self.window

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S], alike in all heads but by an indexer that has a score for each."""
        assert view.learned is not None
        assert view.index is not None
        assert view.h is not None
        scores = index_scores(view.learned, view.q_raw, view.h, view.index)
        position = view.position[:, : scores.shape[1]]  # all heads of a layer hold the same tokens where P is 1
        reduced = token_scores(scores, view.q_position, position, view.reach, mean=self.mean)
        score = jnp.broadcast_to(reduced, view.position.shape)
        return above(score, (view.position < self.sinks) & view.valid)
