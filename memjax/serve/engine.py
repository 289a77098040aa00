"""Answering from a bank: one base prefill of the question, one probe of all candidates over it, then the chosen row."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bank.calibrate import read_gate
from memjax.bank.fusion import Retriever, open_retriever
from memjax.bank.gate import TOKENS, read_ahead
from memjax.bank.route import Router, read_router
from memjax.bank.store import DEFAULT_NAMESPACE, Bank, Entry
from memjax.errors import ArtefactError, BankError, ConfigError, InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Slots
from memjax.memory.cache import select_rows
from memjax.models.base import Base
from memjax.models.decoder import Model, Params, empty_cache, forward, unembed
from memjax.models.encoder import Encoder
from memjax.models.generate import (
    Prefix,
    Sampling,
    batch_bucket,
    bucket,
    check_window,
    common_prefix,
    read_prefix,
    segments_of,
    stream,
    stream_from,
)
from memjax.models.tokenizer import Tokenizer
from memjax.serve.choose import ROUTES, Candidate, Choice, Observed, choose, with_router
from memjax.serve.prefix import Key, Prefixes
from memjax.serve.probe import Batch, Held, Probed, Row, probe, probe_buffers
from memjax.serve.slots import BUFFERS, SlotPools
from memjax.write.prompts import UNLIKE, Message, PromptStyle, abstain_tokens, answer_text, ask_tokens, check_question
from memjax.write.reading import header_tokens, tail_tokens


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """candidates: memories probed per question; resident: slots for them per rank bucket, slot 0 not counted; rank: the
    largest rank that is served; marker: prompt tokens read once per candidate.

    retrieve: bm25 | dense | fusion; auto is fusion where the engine is given an encoder and bm25 where it is not.
    route: which candidate; retrieval | entropy (the lowest) | router; auto is the router where the bank holds one.
    """

    candidates: int = 4
    resident: int = 16
    rank: int = 64
    marker: int = 1
    retrieve: str = "auto"
    route: str = "auto"

    def __post_init__(self) -> None:
        if self.route not in ROUTES:
            raise ConfigError(f"route {self.route!r} is unknown; use one of {', '.join(ROUTES)}")


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer and all that a person may ask about it; seconds: {retrieve, load, prefill, probe, first_token, total}."""

    text: str
    choice: Choice
    prompt_tokens: int
    new_tokens: int
    seconds: dict[str, float]


@partial(jax.jit, static_argnums=0)
def next_token_losses(
    model: Model,
    params: Params,
    ids: jax.Array,
    positions: jax.Array,
    prefix: Segment,
    slots: Slots | None = None,
    slot_ids: jax.Array | None = None,
) -> jax.Array:
    """Negative log-likelihood [B, T - 1] of each next token of ids [B, T] after a shared prefix, float32.

    slots, slot_ids [B]: the adapters that the rows are read under; none: the base itself.
    """
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


def collect_text(
    tokenizer: Tokenizer,
    pieces: Iterator[list[list[int]]],
    seconds: dict[str, float],
    began: float,
    on_text: Callable[[str], None] | None,
) -> tuple[str, int]:
    """(the stripped text of a stream's first row, its tokens); on_text is handed pieces as they come, and `seconds` is
    told the time of the first."""
    decoder = tokenizer.stream_decoder()
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


class Engine:
    """A base, a bank and the adapters resident on the device. Not safe for use by several threads at once."""

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
        self.pools = SlotPools(base, config.resident, config.rank)
        self.prefixes = Prefixes(base)
        self._header: Prefix | None = None  # see `reading_header`
        self._abstain = next(iter(abstain_tokens(base.tokenizer, style)), None)
        self._index: Retriever | None = None
        self._version = -1  # of the namespace, when slots and prefixes were last compared with it

    def ask(
        self,
        question: str,
        *,
        memory: str | None = None,
        gate: bool = True,
        history: Sequence[Message] = (),
        conversation: str | None = None,
        sampling: Sampling = Sampling(max_tokens=48),
        on_text: Callable[[str], None] | None = None,
        every: int = 8,
    ) -> Answer:
        """Answer a question from the bank, or from the base alone where no memory is fit for it.

        memory: read from this one and no other, without a gate. gate=False: read from the best candidate whatever the
        gate says. history: the messages before; conversation: a name under which the base's cache of them is kept for the
        next turn. on_text is handed pieces of the answer as they come. InputError for an empty question or one that
        does not fit the base's window, BankError where `memory` is unknown, ArtefactError where it is damaged; a damaged
        candidate is left out and named in the choice.
        """
        began = time.perf_counter()
        seconds: dict[str, float] = {}
        tokens = self._prompt(question, history)
        check_window(self.base.model, len(tokens), sampling.max_tokens)
        self._clear_gone()
        found = self._candidates(question, memory)
        seconds["retrieve"] = time.perf_counter() - began
        with self.pools.pinned({entry.id for entry, _ in found}):
            held, prefix, damaged = self._load(found, tokens, conversation, memory is not None, seconds)
            probed = self._probe(prefix, tokens, held, question, history, sampling.max_tokens)
            router, how = self._route()
            seen = with_router(_observed(held, probed, self._abstain), router)
            choice, best = choose(
                seen,
                how,
                read_gate(self.base, self.bank, self.namespace),
                named=memory is not None,
                use_gate=gate,
                damaged=damaged,
                mean_entropy=lambda index: self._ahead(probed, index)[0],
            )
            seconds["probe"] = time.perf_counter() - began - sum(seconds.values())
            row = self._row(probed, *(probed.base() if best is None else probed.rows[best]))
            pieces = stream_from(
                self.base.model,
                self.base.params,
                row.hidden,
                row.position,
                row.tails,
                self.base.tokenizer.eos_ids,
                sampling,
                segments=row.segments,
                slots=row.slots,
                slot_ids=row.slot_ids,
                every=every,
            )
            text, made = collect_text(self.base.tokenizer, pieces, seconds, began, on_text)
        seconds["total"] = time.perf_counter() - began
        return Answer(text, choice, len(tokens), made, seconds)

    def observe(self, question: str, *, memory: str | None = None, ahead: bool = False) -> Observed:
        """What a probe tells of a question's candidates (or of the one named), without choosing or answering.

        ahead: read a few tokens on with each, for `mean_entropy` and `said`. Damaged candidates are left out.
        """
        tokens = self._prompt(question)
        self._clear_gone()
        found = self._candidates(question, memory)
        with self.pools.pinned({entry.id for entry, _ in found}):
            held, prefix, _ = self._load(found, tokens, None, memory is not None, {})
            probed = self._probe(prefix, tokens, held, question, (), TOKENS)
            seen = _observed(held, probed, self._abstain)
            if ahead:
                more = self._all_ahead(probed)
                told = [
                    dataclasses.replace(c, mean_entropy=m, said=said)
                    for c, (m, said) in zip(seen.candidates, more, strict=True)
                ]
                seen = dataclasses.replace(seen, candidates=tuple(told))
        return with_router(seen, self._route()[0])

    def retrieved(self, questions: Sequence[str]) -> list[tuple[str, ...]]:
        """The names of each question's candidates, best first, before the base reads anything."""
        return [tuple(entry.name for entry, _ in self._candidates(question, None)) for question in questions]

    @contextlib.contextmanager
    def probing(self, question: str, memories: Sequence[str], room: int) -> Iterator[Probed]:
        """The question read by the base and by these memories, resident while this is open, with room to decode on.

        BankError where a name is unknown, ArtefactError where a memory is damaged.
        """
        tokens = self._prompt(question)
        check_window(self.base.model, len(tokens), room)
        self._clear_gone()
        found = [(self.bank.get(name, self.namespace), 0.0) for name in memories]
        with self.pools.pinned({entry.id for entry, _ in found}):
            held, prefix, _ = self._load(found, tokens, None, True, {})
            yield self._probe(prefix, tokens, held, question, (), room)

    def remember(self, history: Sequence[Message], conversation: str) -> None:
        """Let the base read what the next prompt of a conversation is sure to begin with, answers included.

        So history is always base cache, whichever memory an answer was read from (arXiv 2605.28889 section 7).
        """
        starts = [ask_tokens(self.base.tokenizer, self.style, q, history) for q in UNLIKE]
        shared = starts[0][: common_prefix(starts)]
        if shared and len(shared) < self.base.config.max_positions:
            self._prefix(shared, conversation)

    def answer_losses(self, tokens: Sequence[int], answer: str, memories: Sequence[str | None]) -> list[float]:
        """Mean negative log-likelihood (nats per token) of `answer` after a prompt, under each memory (None: the base).

        As in `ask`, the base reads the prompt but for its last `marker` tokens. InputError where a memory is a buffer,
        which is read in another prompt's place.
        """
        marker, base = self.config.marker, self.base
        gold = base.tokenizer.encode(answer_text(base.tokenizer, self.style, answer))
        entries = [None if name is None else self.bank.get(name, self.namespace) for name in memories]
        wanted = list({entry.id: entry for entry in entries if entry is not None}.values())
        places, damaged = self.pools.fill(wanted, self.pools.read(self.bank, wanted))
        for error in damaged.values():
            raise error
        if any(place.rank == BUFFERS for place in places.values()):
            raise InputError("losses of answers are measured under adapters only; leave memories that are buffers out")
        prefix = read_prefix(base.model, base.params, tokens[:-marker])
        fed = [*tokens[-marker:], *gold]
        ids = np.zeros((len(memories), bucket(len(fed))), np.int32)
        positions = np.full(ids.shape, -1, np.int32)
        ids[:, : len(fed)] = fed
        positions[:, : len(fed)] = int(prefix.length) + np.arange(len(fed))
        losses = np.zeros(len(memories))
        ranks: set[int | None] = {place.rank for place in places.values()} or {None}
        for rank in ranks:  # one program per rank bucket; a memory's row counts in its own
            found = [None if e is None or places[e.id].rank != rank else places[e.id].slot for e in entries]
            slot_ids = np.asarray([slot or 0 for slot in found], np.int32)
            slots = self.pools.slots(rank)
            each = next_token_losses(base.model, base.params, ids, positions, prefix.segment, slots, slot_ids)
            mean = np.asarray(each)[:, marker - 1 : len(fed) - 1].mean(axis=1)
            counts = [e is None or slot is not None for e, slot in zip(entries, found, strict=True)]
            losses = np.where(counts, mean, losses)
        return [float(x) for x in losses]

    def _prompt(self, question: str, history: Sequence[Message] = ()) -> list[int]:
        check_question(question)
        return ask_tokens(self.base.tokenizer, self.style, question, history)

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
        self,
        found: Sequence[tuple[Entry, float]],
        tokens: Sequence[int],
        conversation: str | None,
        named: bool,
        seconds: dict[str, float],
    ) -> tuple[list[Held], Prefix, tuple[str, ...]]:
        """(what could be made resident, the base's cache of the prompt, names of damaged ones).

        Artefacts are read from disk while the device reads the prompt.
        """
        began = time.perf_counter()
        entries = [entry for entry, _ in found]
        reading = self.pools.read(self.bank, entries)
        prefix = self._prefix(tokens[: -self.config.marker], conversation)
        places, damaged = self.pools.fill(entries, reading)
        for entry in entries:
            place = places.get(entry.id)
            if place and place.rank == BUFFERS and self.pools.header(place.slot) != int(self.reading_header().length):
                error = ArtefactError(f"memory {entry.name!r} was written with another prompt style; write it again")
                damaged[entry.id] = error
                del places[entry.id]
        if named and damaged:
            raise next(iter(damaged.values()))
        seconds["load"] = time.perf_counter() - began
        jax.block_until_ready(prefix)
        seconds["prefill"] = time.perf_counter() - began - seconds["load"]
        held = [Held(entry, score, places[entry.id]) for entry, score in found if entry.id in places]
        return held, prefix, tuple(entry.name for entry in entries if entry.id in damaged)

    def _prefix(self, tokens: Sequence[int], conversation: str | None) -> Prefix:
        if conversation is None:
            return read_prefix(self.base.model, self.base.params, tokens)
        return self.prefixes.read(Key(self.base.id, self.bank.salt(self.namespace), conversation), tokens)

    def _clear_gone(self) -> None:
        """Overwrite the slots of memories that the namespace has got rid of since the last question."""
        version = self.bank.namespace_version(self.namespace)
        if version == self._version:
            return
        self.pools.evict([i for i in self.pools.ids() if self.bank.find_id(i, self.namespace) is None])
        self.prefixes.keep_only(self.bank.salt(self.namespace))
        self._version = version

    def _probe(
        self,
        prefix: Prefix,
        tokens: Sequence[int],
        held: Sequence[Held],
        question: str,
        history: Sequence[Message],
        room: int,
    ) -> Probed:
        """The prompt's end read by the base and with every adapter, and the question behind every buffer."""
        model, params, last = self.base.model, self.base.params, tokens[-self.config.marker :]
        by_rank: dict[int, list[int]] = {}
        for index, one in enumerate(held):
            by_rank.setdefault(one.place.rank, []).append(index)
        buffers = by_rank.pop(BUFFERS, [])
        where: list[tuple[int, int]] = [(0, 0)] * len(held)
        batches = {}
        for rank, members in (by_rank or {self.pools.any_rank(): []}).items():
            # One shape whatever was found: rows without a candidate probe the base once more.
            rows = batch_bucket(max(len(members), self.config.candidates) + 1)
            slot_ids = np.zeros((rows,), np.int32)
            for row, index in enumerate(members, start=1):
                slot_ids[row], where[index] = held[index].place.slot, (rank, row)
            ids = np.tile(np.asarray(last, np.int32), (rows, 1))
            positions = np.tile(int(prefix.length) + np.arange(len(last), dtype=np.int32), (rows, 1))
            tails = empty_cache(model.config, rows, bucket(max(room, TOKENS) + len(last)), params["embed"])
            slots = self.pools.slots(rank)
            first, hidden, tails = probe(model, params, ids, positions, tails, prefix.segment, slots, slot_ids)
            after = np.full((rows,), len(tokens), np.int32)
            batches[rank] = Batch(first, hidden, tails, segments_of(prefix), after, slot_ids)
        if buffers:
            alone = next(iter(batches.values())).hidden[:1]
            tail = tail_tokens(self.base.tokenizer, self.style, question, history)
            batches[BUFFERS] = self._probe_buffers([held[i] for i in buffers], tail, alone, room)
            for row, index in enumerate(buffers):
                where[index] = (BUFFERS, row)
        return Probed(batches, where)

    def _probe_buffers(self, held: Sequence[Held], tail: Sequence[int], alone: jax.Array, room: int) -> Batch:
        """The question's tokens read by the base behind the header and each buffer; alone [1, D]: the base's own state."""
        base = self.base
        rows = batch_bucket(max(len(held), self.config.candidates))
        segment, following = self.pools.buffers([one.place.slot for one in held], rows)
        check_window(base.model, int(following.max()) + len(tail), room)
        length = bucket(len(tail))
        used = (np.arange(length) < len(tail)) & (np.arange(rows) < len(held))[:, None]
        ids = np.where(used, np.pad(np.asarray(tail, np.int32), (0, length - len(tail))), 0)
        positions = np.where(used, following[:, None] + np.arange(length), -1).astype(np.int32)
        tails = empty_cache(base.config, rows, length + bucket(max(room, TOKENS)), base.params["embed"])
        segments = (self.reading_header().segment, segment)
        first, hidden, tails = probe_buffers(base.model, base.params, ids, positions, tails, segments, alone)
        return Batch(first, hidden, tails, segments, (following + len(tail)).astype(np.int32), None)

    def reading_header(self) -> Prefix:
        """The base's cache of what every reading prompt begins with, read once."""
        if self._header is None:
            base = self.base
            self._header = read_prefix(base.model, base.params, header_tokens(base.tokenizer, self.style))
        return self._header

    def _row(self, probed: Probed, rank: int, row: int) -> Row:
        """One row of a batch, for programs of one row."""
        batch, one = probed.batches[rank], jnp.asarray([row])
        own = lambda s: s if s.k.shape[1] == 1 else Segment(s.k[:, one], s.v[:, one], s.position[one])
        return Row(
            batch.hidden[one],
            batch.position[[row]],
            select_rows(batch.tails, one),
            tuple(own(segment) for segment in batch.segments),
            None if batch.slot_ids is None else self.pools.slots(rank),
            None if batch.slot_ids is None else jnp.asarray(batch.slot_ids[[row]]),
        )

    def _ahead(self, probed: Probed, index: int) -> tuple[float, tuple[int, ...]]:
        """(mean entropy, tokens) of a candidate's first few answer tokens; what was probed stays as it is."""
        return self._read_on(self._row(probed, *probed.rows[index]))[0]

    def _all_ahead(self, probed: Probed) -> list[tuple[float, tuple[int, ...]]]:
        """`_ahead` of every candidate, all rows of a batch at once."""
        found = {}
        for rank, batch in probed.batches.items():
            plain = batch.slot_ids is None
            slots, ids = (None, None) if plain else (self.pools.slots(rank), jnp.asarray(batch.slot_ids))
            found[rank] = self._read_on(Row(batch.hidden, batch.position, batch.tails, batch.segments, slots, ids))
        return [found[rank][row] for rank, row in probed.rows]

    def _read_on(self, row: Row) -> list[tuple[float, tuple[int, ...]]]:
        stops = jnp.asarray(sorted(self.base.tokenizer.eos_ids) or [-2], jnp.int32)
        found = read_ahead(
            self.base.model,
            self.base.params,
            row.hidden,
            jnp.asarray(row.position),
            row.tails,
            stops,
            row.segments,
            row.slots,
            row.slot_ids,
        )
        return list(zip(np.asarray(found.entropy).tolist(), map(tuple, np.asarray(found.tokens).tolist()), strict=True))

    def _route(self) -> tuple[Router | None, str]:
        """(the router, if it is to be used, the way of routing)."""
        wanted = self.config.route
        if wanted not in ("auto", "router"):
            return None, wanted
        router = read_router(self.base, self.bank, self.namespace)
        if router is None and wanted == "router":
            raise BankError(
                f"bank {self.bank.path} has no router for its memories as they are now; run: memjax train router"
            )
        return router, "retrieval" if router is None else "router"


def as_json(answer: Answer) -> dict[str, Any]:
    """The answer as plain values for `--json`."""
    return dataclasses.asdict(answer)


def _observed(held: Sequence[Held], probed: Probed, abstain: int | None) -> Observed:
    """The candidates with what their rows tell; waits for the device. abstain: the token that an abstention begins with."""
    told = {rank: (jax.device_get(b.first), np.asarray(b.hidden, np.float32)) for rank, b in probed.batches.items()}
    candidates, states = [], []
    for one, (rank, row) in zip(held, probed.rows, strict=True):
        first, hidden = told[rank]
        numbers = (float(one.score), float(first.entropy[row]), float(first.margin[row]), float(first.kl[row]))
        abstains = abstain is not None and int(first.token[row]) == abstain
        candidates.append(Candidate(one.entry.name, one.entry.id, *numbers, abstains=abstains))
        states.append(hidden[row])
    first, hidden = next(iter(told.values()))
    return Observed(tuple(candidates), float(first.entropy[0]), np.stack([hidden[0], *states]))
