"""Answering from a bank: one base prefill of the question, one probe of all candidates over it, then the chosen row."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bank.add import read_gate
from memjax.bank.fusion import Retriever, open_retriever
from memjax.bank.gate import Gate, entropy
from memjax.bank.store import DEFAULT_NAMESPACE, Bank, Entry
from memjax.errors import ArtefactError, BankError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Adapter, Slots, fill_sites, insert, make_slots, pad_rank
from memjax.memory.cache import Cache, select_rows
from memjax.memory.files import read_artefact
from memjax.models.base import Base
from memjax.models.decoder import Model, Params, empty_cache, forward, site_shapes, unembed
from memjax.models.encoder import Encoder
from memjax.models.generate import (
    Prefix,
    Sampling,
    batch_bucket,
    bucket,
    check_window,
    prefill,
    read_prefix,
    segments_of,
    stream,
    stream_from,
)
from memjax.models.weights import SITE_MODULES
from memjax.write.prompts import Message, PromptStyle, answer_text, ask_tokens

insert_donated = jax.jit(insert, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """candidates: memories probed per question; resident: slots for them, slot 0 not counted; rank: the slots' rank.

    retrieve: bm25 | dense | fusion; auto is fusion where the engine is given an encoder and bm25 where it is not.
    """

    candidates: int = 4
    resident: int = 16
    rank: int = 16
    marker: int = 1
    retrieve: str = "auto"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A memory that was probed: its retrieval score and the entropy (nats) of the first answer token under it."""

    name: str
    id: str
    score: float
    entropy: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was decided before the first token was given out.

    memory: the name read from, None where the base answers alone; reason: why; gate: the threshold's record, if any.
    """

    memory: str | None
    reason: str
    entropy: float | None
    threshold: float | None
    base_entropy: float
    candidates: tuple[Candidate, ...]
    damaged: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer and all that a person may ask about it; seconds: {retrieve, load, prefill, probe, first_token, total}."""

    text: str
    choice: Choice
    prompt_tokens: int
    new_tokens: int
    seconds: dict[str, float]


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
) -> tuple[jax.Array, jax.Array, Cache]:
    """(entropy [G], hidden [G, D], tail caches) of the first answer token of each row over one shared, read-only prefix.

    ids, positions [G, marker]: the last prompt tokens, read once per row with that row's slot (arXiv 2605.28889 section
    7); slot 0 is the base.
    """
    hidden, cache = prefill(model, params, ids, positions, cache, (prefix,), slots, slot_ids)
    return entropy(unembed(model, params, hidden)), hidden, cache


@partial(jax.jit, static_argnums=0)
def next_token_losses(
    model: Model,
    params: Params,
    ids: jax.Array,
    positions: jax.Array,
    prefix: Segment,
    slots: Slots,
    slot_ids: jax.Array,
) -> jax.Array:
    """Negative log-likelihood [B, T - 1] of each next token of ids [B, T] after a shared prefix, float32."""
    out = forward(model, params, ids, positions, segments=(prefix,), slots=slots, slot_ids=slot_ids)
    logp = jax.nn.log_softmax(unembed(model, params, out.hidden[:, :-1]), axis=-1)
    return -jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]


def base_first_token(base: Base, style: PromptStyle, question: str) -> float:
    """Seconds to the first token of the base alone on the same prompt, compiled beforehand: the measure for `ask`'s own."""
    tokens = ask_tokens(base.tokenizer, style, question)
    sampling = Sampling(max_tokens=2)
    took = 0.0
    for _ in range(2):
        began = time.perf_counter()
        next(stream(base.model, base.params, [tokens], base.tokenizer.eos_ids, sampling))
        took = time.perf_counter() - began
    return took


class Engine:
    """A base, a bank and the adapters resident on the device. Not safe for use by several threads at once.

    Slots hold the least recently used memories' adapters by id, so a name that moves never finds another's adapter.
    """

    def __init__(
        self,
        base: Base,
        bank: Bank,
        style: PromptStyle,
        config: EngineConfig = EngineConfig(),
        namespace: str = DEFAULT_NAMESPACE,
        encoder: Encoder | None = None,
    ) -> None:
        self.base, self.bank, self.style, self.config, self.namespace = base, bank, style, config, namespace
        self.encoder = encoder
        shapes = site_shapes(base.config)
        dtype = base.params["embed"].dtype
        self._slots = make_slots(shapes, base.config.num_layers, config.resident + 1, config.rank, dtype)
        self._resident: dict[str, int] = {}  # memory id -> slot, least recently used first
        self._index: Retriever | None = None
        self._version = -1  # of the namespace, when the slots were last compared with it

    def ask(
        self,
        question: str,
        *,
        memory: str | None = None,
        gate: bool = True,
        history: Sequence[Message] = (),
        sampling: Sampling = Sampling(max_tokens=48),
        on_text: Callable[[str], None] | None = None,
        every: int = 8,
    ) -> Answer:
        """Answer a question from the bank, or from the base alone where no memory is fit for it.

        memory: read from this one and no other, without a gate. gate=False: read from the best candidate whatever the
        entropy. on_text is handed pieces of the answer as they come. BankError where `memory` is unknown, ArtefactError
        where it is damaged; a damaged candidate is left out and named in the choice.
        """
        began = time.perf_counter()
        seconds: dict[str, float] = {}
        tokens = ask_tokens(self.base.tokenizer, self.style, question, history)
        check_window(self.base.model, len(tokens), sampling.max_tokens)
        self._clear_gone()
        found = self._candidates(question, memory)
        seconds["retrieve"] = time.perf_counter() - began
        slots, damaged = self._load(found, pinned=memory is not None)
        seconds["load"] = time.perf_counter() - began - seconds["retrieve"]

        marker = self.config.marker
        prefix = read_prefix(self.base.model, self.base.params, tokens[:-marker])
        jax.block_until_ready(prefix)
        seconds["prefill"] = time.perf_counter() - began - seconds["retrieve"] - seconds["load"]
        entropies, hidden, tails = self._probe(prefix, tokens[-marker:], [s for _, _, s in slots], sampling.max_tokens)
        seconds["probe"] = time.perf_counter() - began - sum(seconds.values())
        choice, row = self._choose(slots, entropies, damaged, memory, gate)
        slot = slots[row - 1][2] if row else 0

        # The decoded row is handed to a program of one row: its tail, its hidden state, its slot.
        one = jnp.asarray([row])
        pieces = stream_from(
            self.base.model,
            self.base.params,
            hidden[one],
            np.asarray([len(tokens)], np.int32),
            select_rows(tails, one),
            self.base.tokenizer.eos_ids,
            sampling,
            segments=segments_of(prefix),
            slots=self._slots,
            slot_ids=jnp.asarray([slot], jnp.int32),
            every=every,
        )
        text, made = self._collect(pieces, seconds, began, on_text)
        seconds["total"] = time.perf_counter() - began
        return Answer(text, choice, len(tokens), made, seconds)

    def answer_losses(self, tokens: Sequence[int], answer: str, memories: Sequence[str | None]) -> list[float]:
        """Mean negative log-likelihood (nats per token) of `answer` after a prompt, under each memory (None: the base).

        As in `ask`, the base reads the prompt but for its last `marker` tokens.
        """
        marker, base = self.config.marker, self.base
        gold = base.tokenizer.encode(answer_text(base.tokenizer, self.style, answer))
        entries = [None if name is None else self.bank.get(name, self.namespace) for name in memories]
        wanted = {entry.id for entry in entries if entry is not None}
        slot_ids = np.asarray([0 if e is None else self._slot_of(e, wanted) for e in entries], np.int32)
        prefix = read_prefix(base.model, base.params, tokens[:-marker])
        fed = [*tokens[-marker:], *gold]
        ids = np.zeros((len(memories), bucket(len(fed))), np.int32)
        positions = np.full(ids.shape, -1, np.int32)
        ids[:, : len(fed)] = fed
        positions[:, : len(fed)] = int(prefix.length) + np.arange(len(fed))
        losses = next_token_losses(base.model, base.params, ids, positions, prefix.segment, self._slots, slot_ids)
        return [float(x) for x in np.asarray(losses)[:, marker - 1 : len(fed) - 1].mean(axis=1)]

    def _candidates(self, question: str, memory: str | None) -> list[tuple[Entry, float]]:
        if memory is not None:
            return [(self.bank.get(memory, self.namespace), 0.0)]
        kind, held = self.config.retrieve, self._index
        self._index = open_retriever(self.bank, kind, self.encoder, self.namespace, held)
        # Memories that share no word with the question fill the list: the gate, not the wording, decides about them.
        hits = self._index.search(question, self.config.candidates, fill=True)
        entries = [(self.bank.find_id(hit_id, self.namespace), score) for hit_id, score in hits]
        return [(entry, score) for entry, score in entries if entry is not None]

    def _load(
        self, found: Sequence[tuple[Entry, float]], *, pinned: bool
    ) -> tuple[list[tuple[Entry, float, int]], tuple[str, ...]]:
        """((entry, score, slot) of what could be made resident, names of damaged ones)."""
        if len(found) > self.config.resident:
            raise BankError(f"{len(found)} candidates do not fit {self.config.resident} resident slots; ask for fewer")
        wanted = {entry.id for entry, _ in found}
        loaded, damaged = [], []
        for entry, score in found:
            try:
                loaded.append((entry, score, self._slot_of(entry, wanted)))
            except ArtefactError:
                if pinned:
                    raise
                damaged.append(entry.name)
        return loaded, tuple(damaged)

    def _slot_of(self, entry: Entry, wanted: set[str]) -> int:
        slot = self._resident.pop(entry.id, None)
        if slot is None:
            adapter = self._read(entry)
            if len(self._resident) < self.config.resident:
                slot = next(s for s in range(1, self.config.resident + 1) if s not in self._resident.values())
            else:
                slot = self._resident.pop(next(i for i in self._resident if i not in wanted))
            self._slots = insert_donated(self._slots, jnp.int32(slot), adapter)
        self._resident[entry.id] = slot
        return slot

    def _clear_gone(self) -> None:
        """Overwrite the slots of memories that the namespace has got rid of since the last question."""
        version = self.bank.namespace_version(self.namespace)
        if version == self._version:
            return
        nothing = lambda tree: {site: np.zeros(x[:, 0].shape, np.float32) for site, x in tree.items()}
        for gone in [i for i in self._resident if self.bank.find_id(i, self.namespace) is None]:
            empty = Adapter(nothing(self._slots.a), nothing(self._slots.b), 0.0)
            self._slots = insert_donated(self._slots, jnp.int32(self._resident.pop(gone)), empty)
        self._version = version

    def _read(self, entry: Entry) -> Adapter:
        config = self.base.config
        shapes = site_shapes(config)
        memory = read_artefact(self.bank.folder(entry.id), shapes, config.num_layers, SITE_MODULES, base_id=self.base.id)
        if memory.id != entry.id:
            raise ArtefactError(f"the files of memory {entry.name!r} are those of another memory; run bank verify")
        return pad_rank(fill_sites(Adapter(*memory.artefact), shapes), self.config.rank)

    def _probe(
        self, prefix: Prefix, last: Sequence[int], slots: Sequence[int], room: int
    ) -> tuple[np.ndarray, jax.Array, Cache]:
        model, params = self.base.model, self.base.params
        # One shape whatever was found: rows without a candidate probe the base once more.
        rows = (
            batch_bucket(self.config.candidates + 1)
            if len(slots) <= self.config.candidates
            else batch_bucket(len(slots) + 1)
        )
        slot_ids = np.zeros((rows,), np.int32)
        slot_ids[1 : len(slots) + 1] = slots
        ids = np.tile(np.asarray(last, np.int32), (rows, 1))
        positions = np.tile(int(prefix.length) + np.arange(len(last), dtype=np.int32), (rows, 1))
        tails = empty_cache(model.config, rows, bucket(room + len(last)), params["embed"].dtype)
        entropies, hidden, tails = probe(model, params, ids, positions, tails, prefix.segment, self._slots, slot_ids)
        return np.asarray(entropies), hidden, tails

    def _choose(
        self,
        slots: Sequence[tuple[Entry, float, int]],
        entropies: np.ndarray,
        damaged: tuple[str, ...],
        memory: str | None,
        use_gate: bool,
    ) -> tuple[Choice, int]:
        """(choice, row of the probe batch to go on with)."""
        candidates = tuple(
            Candidate(entry.name, entry.id, float(score), float(entropies[row]))
            for row, (entry, score, _) in enumerate(slots, start=1)
        )
        plain = float(entropies[0])
        if not candidates:
            return Choice(None, "the bank has no memory for this", None, None, plain, (), damaged), 0
        best = max(range(len(candidates)), key=lambda i: candidates[i].score)
        chosen = candidates[best]
        calibrated: Gate | None = read_gate(self.base, self.bank, self.namespace)
        threshold = calibrated.threshold if calibrated else None
        if memory is not None:
            name, reason = chosen.name, "named by the caller"
        elif not use_gate:
            name, reason = chosen.name, "best by retrieval; the gate is off"
        elif threshold is None:
            name, reason = chosen.name, "best by retrieval; no gate has been calibrated"
        elif chosen.entropy < threshold:
            name, reason = chosen.name, "best by retrieval, and sure enough for the gate"
        else:
            name, reason = None, "no memory is sure enough for the gate"
        choice = Choice(name, reason, chosen.entropy, threshold, plain, candidates, damaged)
        return choice, best + 1 if name is not None else 0

    def _collect(
        self,
        pieces: Iterator[list[list[int]]],
        seconds: dict[str, float],
        began: float,
        on_text: Callable[[str], None] | None,
    ) -> tuple[str, int]:
        decoder = self.base.tokenizer.stream_decoder()
        text, made = "", 0
        for new in pieces:
            seconds.setdefault("first_token", time.perf_counter() - began)
            piece = "".join(decoder.push(token) for token in new[0])
            piece = piece if text else piece.lstrip()
            made += len(new[0])
            text += piece
            if on_text and piece:
                on_text(piece)
        rest = decoder.flush()
        if on_text and rest:
            on_text(rest)
        return (text + rest).strip(), made


def as_json(answer: Answer) -> dict[str, Any]:
    """The answer as plain values for `--json`."""
    return dataclasses.asdict(answer)
