"""The probe: the end of a prompt read once by the base and once with every candidate, and what its rows leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from memjax.bank.gate import First, first_token
from memjax.bank.store import Entry
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Slots
from memjax.memory.cache import Cache
from memjax.models.decoder import Model, Params, unembed
from memjax.models.generate import prefill
from memjax.serve.slots import Place


class Held(NamedTuple):
    """A candidate that is resident: its entry, its retrieval score, its place."""

    entry: Entry
    score: float
    place: Place


class Row(NamedTuple):
    """What rows go on from, mostly one: hidden [B, D], position [B] of the next token, tails, what else they see, slots."""

    hidden: jax.Array
    position: np.ndarray
    tails: Cache
    segments: tuple[Segment, ...]
    slots: Slots | None
    slot_ids: jax.Array | None


class Batch(NamedTuple):
    """A probe batch that was read: what its rows tell [G], hidden [G, D], tail caches, and where its rows go on.

    segments: what the rows see beside their tails; position int32 [G]: that of the first answer token; slot_ids int32 [G]:
    None for buffers, which are read by the base. Row 0 of a batch of adapters is the base.
    """

    first: First
    hidden: jax.Array
    tails: Cache
    segments: tuple[Segment, ...]
    position: np.ndarray
    slot_ids: np.ndarray | None


class Probed(NamedTuple):
    """One batch per rank bucket, one of `BUFFERS`, and where each candidate's row is: (rank, row); adapters come first."""

    batches: dict[int, Batch]
    rows: list[tuple[int, int]]

    def base(self) -> tuple[int, int]:
        """Where the base's own row is."""
        return next(iter(self.batches)), 0


@partial(jax.jit, static_argnums=0, donate_argnames=("cache",))
def probe(
    model: Model,
    params: Params,
    ids: jax.Array,
    positions: jax.Array,
    cache: Cache,
    prefix: Segment,
    slots: Slots | None,
    slot_ids: jax.Array | None,
) -> tuple[First, jax.Array, Cache]:
    """(what the first answer token of each row tells [G], hidden [G, D], tail caches) over one shared, read-only prefix.

    ids, positions [G, marker]: the last prompt tokens, read once per row with that row's slot (arXiv 2605.28889 section
    7); slot 0 is the base, and row 0 must be of it.
    """
    hidden, cache = prefill(model, params, ids, positions, cache, (prefix,), slots, slot_ids)
    logits = unembed(model, params, hidden)
    return first_token(logits, logits[0]), hidden, cache


@partial(jax.jit, static_argnums=0, donate_argnames=("cache",))
def probe_buffers(
    model: Model,
    params: Params,
    ids: jax.Array,
    positions: jax.Array,
    cache: Cache,
    segments: Sequence[Segment],
    alone: jax.Array,
) -> tuple[First, jax.Array, Cache]:
    """`probe` for buffers: the base reads ids [G, T] behind each row's own segment; alone [1, D]: its state without any."""
    hidden, cache = prefill(model, params, ids, positions, cache, segments)
    return first_token(unembed(model, params, hidden), unembed(model, params, alone[0])), hidden, cache
