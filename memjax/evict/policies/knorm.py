"""Key norms: tokens whose keys are short attract attention (arXiv 2406.11430)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.policies.base import KeyPolicy, View


@dataclasses.dataclass(frozen=True)
class Knorm(KeyPolicy):
    """The negative length of the key."""

    name: ClassVar[str] = "knorm"

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S], also of bfloat16 keys: their rounded norms would tie."""
        return -jnp.linalg.norm(view.k.astype(jnp.float32), axis=-1).swapaxes(1, 2)
