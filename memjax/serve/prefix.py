"""Base caches of prompts that outlive a request: a conversation's history is read once, and each turn only adds to it.

What is held is always what the base alone has read. A key holds the base's id, the namespace's salt and the
conversation, so that two namespaces never meet here, not even in the time that a prompt takes (arXiv 2603.10726).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.kernels.segment_attention import Segment
from memjax.memory.cache import Cache
from memjax.models.base import Base
from memjax.models.decoder import empty_cache
from memjax.models.generate import PREFILL_BLOCK, Prefix, bucket, check_window, pad_prompts, prefill

CAPACITY = 256  # tokens of the smallest cache: a conversation outgrows it a few times, and each time compiles anew


class Key(NamedTuple):
    """What a held prefix is found by."""

    base_id: str
    salt: str
    conversation: str


class Held(NamedTuple):
    """What the base has read: the tokens, and its cache of them (one row)."""

    tokens: tuple[int, ...]
    cache: Cache


class Prefixes:
    """The last few conversations' prefixes. Not safe for several threads at once."""

    def __init__(self, base: Base, limit: int = 8) -> None:
        self._base = base
        self._limit = limit
        self._held: dict[Key, Held] = {}  # least recently used first
        self.tokens_read = 0  # how many tokens the base had to read, ever

    def read(self, key: Key, tokens: Sequence[int]) -> Prefix:
        """The base's cache of `tokens`, of which only those are read that the conversation's prefix does not hold.

        What it holds beyond the common beginning is dropped. A prefix that was given out for this key before is used up.
        """
        check_window(self._base.model, len(tokens), 0)
        held, shared = extend(self._base, self._held.pop(key, None), tokens)
        self.tokens_read += len(tokens) - shared
        self._held[key] = held
        while len(self._held) > self._limit:
            del self._held[next(iter(self._held))]
        cache = held.cache
        return Prefix(Segment(cache.k, cache.v, cache.position), jnp.int32(len(tokens)))

    def drop(self, conversation: str) -> None:
        """Forget a conversation, in whatever namespace."""
        for key in [key for key in self._held if key.conversation == conversation]:
            del self._held[key]

    def keep_only(self, salt: str) -> None:
        """Forget what was read under any other salt: it was of a namespace that has been emptied since."""
        for key in [key for key in self._held if key.salt != salt]:
            del self._held[key]

    def __len__(self) -> int:
        return len(self._held)


def extend(base: Base, held: Held | None, tokens: Sequence[int]) -> tuple[Held, int]:
    """(the base's cache of `tokens`, how many of them were held): the common beginning stays, the rest is read."""
    wanted = max(CAPACITY, bucket(len(tokens)))
    if held is None:
        held = Held((), empty_cache(base.config, 1, wanted, base.params["embed"]))
    shared = 0
    while shared < min(len(held.tokens), len(tokens)) and held.tokens[shared] == tokens[shared]:
        shared += 1
    cache = held.cache
    if wanted > cache.capacity:
        cache = _grow(cache, wanted)
    if shared < len(held.tokens):
        cache = cut(cache, jnp.int32(shared))
    for begin in range(shared, len(tokens), PREFILL_BLOCK):
        part = tokens[begin : min(begin + PREFILL_BLOCK, len(tokens))]
        ids, positions = pad_prompts([part], 1, bucket(len(part)))
        positions[positions >= 0] += begin
        _, cache = prefill(base.model, base.params, ids, positions, cache)
    return Held(tuple(tokens), cache), shared


@jax.jit
def cut(cache: Cache, length: jax.Array) -> Cache:
    """The cache of the first `length` tokens of each row: later places are empty."""
    kept = jnp.arange(cache.capacity) < length
    return Cache(cache.k, cache.v, jnp.where(kept, cache.position, -1), jnp.minimum(cache.next, length))


def _grow(cache: Cache, capacity: int) -> Cache:
    more = capacity - cache.capacity
    wide = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
    position = jnp.pad(cache.position, ((0, 0), (0, more)), constant_values=-1)
    return Cache(jnp.pad(cache.k, wide), jnp.pad(cache.v, wide), position, cache.next)
