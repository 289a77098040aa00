"""LagKV: tokens that differ from the part of the text that follows them (arXiv 2504.04704)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.evict.policies.base import KeyPolicy, View, rank, ranked, scatter


@dataclasses.dataclass(frozen=True)
class LagKV(KeyPolicy):
    """Parts of `lag` tokens after the first `sinks`; a token's rank in its part by how its key and value vary across
    channels, once scaled to the range of the next part. First tokens, the last whole part and what follows it stay.
    """

    name: ClassVar[str] = "lagkv"
    sinks: int = 4
    lag: int = 128

    def score(self, view: View) -> jax.Array:
        """float32 [B, K, S] in [0, 1]; of texts shorter than two parts the place in the text."""
        place, count = rank(view), view.valid.sum(axis=-1, keepdims=True)
        # The parts are counted from the first token, so candidates that are empty go to the end.
        index = jnp.broadcast_to(jnp.arange(place.shape[-1]), place.shape)
        order = scatter(index, jnp.where(view.valid, place, place.shape[-1]), place.shape[-1])
        parts = max((order.shape[-1] - self.sinks) // self.lag, 2)
        short = self.sinks + parts * self.lag - order.shape[-1]

        def ranks(states: jax.Array) -> jax.Array:
            x = jnp.take_along_axis(states.astype(jnp.float32).swapaxes(1, 2), order[..., None], axis=2)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, max(short, 0)), (0, 0)))
            x = x[:, :, self.sinks : self.sinks + parts * self.lag]
            x = x.reshape(*x.shape[:2], parts, self.lag, -1)
            low, high = x[:, :, 1:].min(axis=3, keepdims=True), x[:, :, 1:].max(axis=3, keepdims=True)
            spread = jnp.std((x[:, :, :-1] - low) / (high - low), axis=-1, ddof=1)
            return jax.nn.softmax(spread, axis=-1)

        both = (ranks(view.k) + ranks(view.v)) / 2
        within = ranked(-both) / self.lag
        inside = jnp.clip(place - self.sinks, 0, (parts - 1) * self.lag - 1)
        own = jnp.take_along_axis(within.reshape(*within.shape[:2], -1), inside, axis=-1)
        whole = (count - self.sinks) // self.lag
        stays = (place < self.sinks) | (place >= self.sinks + (whole - 1) * self.lag)
        score = jnp.where(stays, 1.0, own)
        recency = jnp.where(place < self.sinks, 1.0, (place - self.sinks) / jnp.maximum(count - self.sinks, 1))
        return jnp.where(whole < 2, recency, score).astype(jnp.float32)
