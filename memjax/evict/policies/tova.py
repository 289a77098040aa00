"""TOVA: what the last query attends to, the same set for all heads (arXiv 2401.06104)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.policies.base import Policy, View, above, attention


@dataclasses.dataclass(frozen=True)
class Tova(Policy):
    """The attention of the last query, mean over all heads; the last token stays."""

    name: ClassVar[str] = "tova"

    @property
    def queries(self) -> int | None:
        """The last one."""
        return 1

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S], alike in all heads."""
        last = dataclasses.replace(view, q=view.q[:, -1:], q_position=view.q_position[:, -1:])
        mean = attention(last).mean(axis=(1, 2, 3))[:, None]
        newest = view.position == (view.length - 1)[:, None, None]
        return above(jnp.broadcast_to(mean, view.position.shape), newest)
