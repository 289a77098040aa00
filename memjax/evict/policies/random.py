"""Random eviction: the floor that every policy must beat."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from memjax.evict.policies.base import KeyPolicy, View


@dataclasses.dataclass(frozen=True)
class Random(KeyPolicy):
    """A number in [0, 1) drawn once per layer, head and position: in every block the token has the same one."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S], from the seed, the layer, the head and the position alone."""
        key = jax.random.fold_in(jax.random.key(self.seed), view.layer)
        heads = jax.vmap(lambda head: jax.random.fold_in(key, head))(jax.numpy.arange(view.position.shape[1]))
        draw = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)), in_axes=(None, 0))
        return jax.vmap(jax.vmap(draw), in_axes=(None, 0))(heads, view.position)
