"""StreamingLLM: the first tokens and the last ones (arXiv 2309.17453); positions stay those of the text."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.policies.base import KeyPolicy, View, rank


@dataclasses.dataclass(frozen=True)
class Streaming(KeyPolicy):
    """1 for the first `sinks` candidates and for as many of the last as fill the budget, else 0."""

    name: ClassVar[str] = "streaming"
    sinks: int = 4

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S] of zeros and ones."""
        place = rank(view)
        evicted = jnp.maximum(view.valid.sum(axis=-1, keepdims=True) - view.keep, 0)
        return ((place < self.sinks) | (place >= self.sinks + evicted)).astype(jnp.float32)
