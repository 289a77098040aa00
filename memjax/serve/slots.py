"""Resident memories: fixed slots on the device in a few rank buckets, filled from disk, the least recently used first out.

One pool per bucket of ranks (8, 16, 32, 64): an adapter lies in the smallest that holds it, so a step over memories of
rank 8 multiplies by 8 columns and not by 64, as it would if all were padded to the largest. A bank written by one recipe
uses one bucket, and its probes are one batch; each further bucket among a question's candidates is one batch more. A pool
is made, and its programs are compiled, when its first adapter comes. All buckets have slot 0, which is the base.

Buffers have a pool of their own, `BUFFERS` in place of a rank: their slots are keys and values, rotated once as they come.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bank.store import Bank, Entry
from memjax.errors import ArtefactError, BankError, ConfigError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Adapter, Slots, fill_sites, insert, make_slots, pad_rank
from memjax.memory.buffer import Buffer
from memjax.memory.files import read_artefact
from memjax.models.base import Base
from memjax.models.buffers import read_buffer
from memjax.models.decoder import site_shapes
from memjax.models.generate import bucket
from memjax.models.weights import SITE_MODULES
from memjax.sharding import find_mesh

BUCKETS = (8, 16, 32, 64)
BUFFERS = 0  # what stands for the rank in the place of a buffer

insert_donated = jax.jit(insert, donate_argnums=0)


class Place(NamedTuple):
    """Where a memory is resident: the rank of its bucket, `BUFFERS` for a buffer, and its slot there."""

    rank: int
    slot: int


class Shelved(NamedTuple):
    """A resident buffer: k (rotated), v [L, 1, M, K, H], position int32 [M], M being a bucket of its slots and -1 no slot;
    where reading goes on after it; the tokens before it."""

    k: jax.Array
    v: jax.Array
    position: np.ndarray
    following: int
    header: int


def capacity(resident: int, mesh: jax.sharding.Mesh | None) -> int:
    """The slots of a bucket, slot 0 included; on a mesh a few more may stay empty, so that its devices can share them."""
    return resident + 1 if mesh is None else -(-(resident + 1) // mesh.size) * mesh.size


class SlotPools:
    """The memories of a base that are resident on the device, by memory id. Not safe for several threads at once.

    resident: slots of each bucket, slot 0 not counted; rank: the largest rank that is served, and the largest bucket.
    A name that moves never finds another memory's artefact, since nothing here knows names.
    """

    def __init__(self, base: Base, resident: int, rank: int) -> None:
        if resident < 1 or rank < 1:
            raise ConfigError(f"{resident} slots of rank {rank} hold nothing; give at least 1 of each")
        self.buckets = (*(r for r in BUCKETS if r < rank), rank)
        self.resident = resident
        self._base = base
        self._pools: dict[int, Slots] = {}
        self._buffers: dict[int, Shelved] = {}  # by slot
        self._places: dict[str, Place] = {}  # least recently used first
        self._pins: Counter[str] = Counter()
        self._reader: ThreadPoolExecutor | None = None

    def any_rank(self) -> int:
        """A bucket for rows of slot 0 only: one that is there already, if there is one."""
        return next(iter(self._pools), self.buckets[0])

    def slots(self, rank: int | None = None) -> Slots:
        """The slots of a bucket; those of `any_rank` where no rank is named."""
        rank = self.any_rank() if rank is None else rank
        if rank not in self._pools:
            config = self._base.config
            dtype, mesh = self._base.params["embed"].dtype, find_mesh(self._base.params)
            count = capacity(self.resident, mesh)
            self._pools[rank] = make_slots(site_shapes(config), config.num_layers, count, rank, dtype, mesh)
        return self._pools[rank]

    def buffers(self, slots: Sequence[int], rows: int) -> tuple[Segment, np.ndarray]:
        """(the buffers in these slots as a segment of `rows` rows, position of the first token read after each [rows]).

        Rows beyond those named see nothing, and continue at 0.
        """
        held = [self._buffers[slot] for slot in slots]
        width = max(len(one.position) for one in held)
        short = rows - len(held)

        def stack(name: str) -> jax.Array:
            fill = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2]), (0, 0), (0, 0)))
            found = jnp.concatenate([fill(getattr(one, name)) for one in held], axis=1)
            return jnp.pad(found, ((0, 0), (0, short), (0, 0), (0, 0), (0, 0)))

        position = np.full((rows, width), -1, np.int32)
        for row, one in enumerate(held):
            position[row, : len(one.position)] = one.position
        following = np.array([*(one.following for one in held), *[0] * short], np.int32)
        return Segment(stack("k"), stack("v"), jnp.asarray(position)), following

    def header(self, slot: int) -> int:
        """How many tokens of a prompt the base reads itself before the buffer in this slot."""
        return self._buffers[slot].header

    def place(self, memory_id: str) -> Place | None:
        """Where a memory is resident, if it is."""
        return self._places.get(memory_id)

    @contextlib.contextmanager
    def pinned(self, memory_ids: Collection[str]) -> Iterator[None]:
        """Keep these memories, once resident, from being evicted while the block runs; pins of one memory add up."""
        self._pins.update(memory_ids)
        try:
            yield
        finally:
            self._pins.subtract(memory_ids)
            self._pins = +self._pins

    def read(self, bank: Bank, entries: Sequence[Entry]) -> Mapping[str, Future[Adapter | Buffer]]:
        """Begin to read, beside whatever the device computes, the artefacts that are not resident: what `fill` takes.

        Files are checked by hash as they are read, so every byte is looked at once; nothing is gained by mapping them.
        """
        wanted = {entry.id: entry for entry in entries if entry.id not in self._places}
        if not wanted:
            return {}
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="memjax-slots")
        return {i: self._reader.submit(self.load, bank, entry) for i, entry in wanted.items()}

    def fill(
        self, entries: Sequence[Entry], reading: Mapping[str, Future[Adapter | Buffer]]
    ) -> tuple[dict[str, Place], dict[str, ArtefactError]]:
        """({id: place} of the entries, {id: error} of those whose files are damaged), resident together.

        BankError where a bucket has fewer slots, beside pinned ones, than are wanted in it.
        """
        kept = {entry.id for entry in entries}
        places: dict[str, Place] = {}
        damaged: dict[str, ArtefactError] = {}
        for entry in entries:
            place = self._places.pop(entry.id, None)
            if place is None:
                try:
                    artefact = reading[entry.id].result()
                except ArtefactError as error:
                    damaged[entry.id] = error
                    continue
                place = self._insert(artefact, kept)
            self._places[entry.id] = places[entry.id] = place
        return places, damaged

    def evict(self, memory_ids: Collection[str]) -> None:
        """Overwrite the slots of these memories with zeros, pinned or not: nothing of them stays on the device."""
        for memory_id in memory_ids:
            if (place := self._places.pop(memory_id, None)) is None:
                continue
            if place.rank == BUFFERS:
                del self._buffers[place.slot]
                continue
            pool = self._pools[place.rank]
            nothing = lambda tree: {site: jnp.zeros((x.shape[0], *x.shape[2:])) for site, x in tree.items()}
            empty = Adapter(nothing(pool.a), nothing(pool.b), jnp.float32(0))
            self._pools[place.rank] = insert_donated(pool, jnp.int32(place.slot), empty)

    def ids(self) -> tuple[str, ...]:
        """The resident memories, least recently used first."""
        return tuple(self._places)

    def _insert(self, artefact: Adapter | Buffer, kept: Collection[str]) -> Place:
        if isinstance(artefact, Buffer):
            place = self._free(BUFFERS, kept)
            segment, following = read_buffer(self._base.config, artefact)
            short = bucket(artefact.slots) - artefact.slots  # filled up once, not at every question
            k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0), (0, 0))) for x in (segment.k, segment.v))
            position = np.pad(np.asarray(segment.position[0]), (0, short), constant_values=-1)
            self._buffers[place.slot] = Shelved(k, v, position, following, artefact.header)
            return place
        place = self._free(next((r for r in self.buckets if r >= artefact.rank), self.buckets[-1]), kept)
        padded = pad_rank(artefact, place.rank)
        self._pools[place.rank] = insert_donated(self.slots(place.rank), jnp.int32(place.slot), padded)
        return place

    def _free(self, rank: int, kept: Collection[str]) -> Place:
        """A free place of a bucket, the least recently used one that nobody needs if none is; BankError."""
        here = {i: place.slot for i, place in self._places.items() if place.rank == rank}
        if len(here) < self.resident:
            slot = next(s for s in range(1, self.resident + 1) if s not in here.values())
        else:
            free = next((i for i in here if i not in kept and i not in self._pins), None)
            if free is None:
                kind = f"rank {rank}" if rank != BUFFERS else "buffers"
                raise BankError(
                    f"the {self.resident} resident slots of {kind} are all in use; ask for fewer candidates at once"
                )
            slot = self._places.pop(free).slot
        return Place(rank, slot)

    def load(self, bank: Bank, entry: Entry) -> Adapter | Buffer:
        """The artefact of an entry from its files, checked in full; ArtefactError where it is damaged or does not fit."""
        config = self._base.config
        shapes, heads = site_shapes(config), (config.num_kv_heads, config.head_size)
        folder = bank.folder(entry.id)
        memory = read_artefact(folder, shapes, config.num_layers, SITE_MODULES, base_id=self._base.id, heads=heads)
        if memory.id != entry.id:
            raise ArtefactError(f"the files of memory {entry.name!r} are those of another memory; run bank verify")
        if memory.kind == "buffer":
            return Buffer(*memory.artefact)
        adapter = Adapter(*memory.artefact)
        if adapter.rank > self.buckets[-1]:
            raise ArtefactError(
                f"memory {entry.name!r} has rank {adapter.rank}, and the largest slot {self.buckets[-1]}; recompress it"
            )
        return fill_sites(adapter, shapes)
