"""Subjects under test: the ways of answering a question about a context that an evaluation compares, as one interface.

A subject is a column of a result's table. `SUBJECTS` says how each is made, so a new kind of memory is one more function
in that table. All of them decode greedily, in batches of fixed size and bucketed length: few programs are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memjax.bank.retrieve import build_index, search_index
from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.errors import ConfigError, InputError
from memjax.evaluate.niah import prose_lines
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Adapter, side_by_side
from memjax.models.base import Base
from memjax.models.decoder import empty_cache
from memjax.models.generate import (
    Sampling,
    batch_bucket,
    bucket,
    collect,
    common_prefix,
    generate_all,
    prefill,
    read_prompts,
    stream_from,
)
from memjax.serve.engine import Engine
from memjax.write.hypernet.chunks import document_tokens
from memjax.write.hypernet.encode import Hyper, Weigh, encode
from memjax.write.prompts import PromptStyle, ask_tokens, prompt_style, read_tokens

ROWS = 16  # prompts decoded at once
HELD = 1 << 15  # tokens of cache held at once; long prompts are decoded in smaller batches
SHARED = 4  # questions about one context from which on the context is read once for all of them
CHUNK_WORDS = 80  # of a passage that text retrieval puts into the prompt

PLAIN = prompt_style("plain")


@dataclasses.dataclass(frozen=True)
class Query:
    """A question, and the context that it is about (None: about nothing).

    gap: None puts both to the base in its own prompt style. A text stands between context and question in a bare user
    turn without system line, examples or lead, for benchmarks that word their prompts themselves. prefix: how the answer
    begins, already written behind the template's header. chat: False is plain text without a template (with a gap only).
    """

    question: str
    context: str | None = None
    gap: str | None = None
    prefix: str = ""
    chat: bool = True


class Answers(NamedTuple):
    """The texts that answer the queries, in their order, and how many contexts were cut to fit the base's window."""

    texts: list[str]
    truncated: int = 0


@dataclasses.dataclass(frozen=True)
class Subject:
    """`answers(queries, max_tokens)`, and `compress(context)` where the subject makes something of a context beforehand."""

    name: str
    answers: Callable[[Sequence[Query], int], Answers]
    compress: Callable[[str], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """What subjects are made of.

    truncate: cut contexts in the middle where prompt and answer exceed the window, instead of refusing them; pooled: text
    retrieval searches the contexts of all queries together, as a bank would, not only the query's own; passages: how
    many it puts into the prompt; bank: what the bank subject asks; hyper: what writes adapters for the subject
    `internalize`, of chunks of up to `chunk` tokens (0: its own) that share `overlap` and are summed as `weigh` says;
    progress: told the subject, how many queries of a call are answered, and how many there are.
    """

    base: Base
    style: PromptStyle
    truncate: bool = False
    rows: int = ROWS
    pooled: bool = True
    passages: int = 3
    bank: Bank | None = None
    namespace: str = DEFAULT_NAMESPACE
    hyper: Hyper | None = None
    chunk: int = 0
    overlap: int = 16
    weigh: Weigh = "sum"
    progress: Callable[[str, int, int], None] = lambda name, done, total: None


def make_subjects(names: Sequence[str], setup: Setup) -> list[Subject]:
    """The subjects of these names. ConfigError for an unknown or repeated name, or a bank that is not given."""
    for name in names:
        if name not in SUBJECTS:
            raise ConfigError(f"subject {name!r} is unknown; use {', '.join(SUBJECTS)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError("name at least one subject, and each only once")
    return [SUBJECTS[name](setup) for name in names]


def _in_context(setup: Setup) -> Subject:
    return Subject("in_context", lambda queries, max_tokens: _prompted(setup, "in_context", queries, max_tokens))


def _no_context(setup: Setup) -> Subject:
    def answers(queries: Sequence[Query], max_tokens: int) -> Answers:
        bare = [dataclasses.replace(query, context=None) for query in queries]
        return _prompted(setup, "no_context", bare, max_tokens)

    return Subject("no_context", answers)


def _retrieval(setup: Setup) -> Subject:
    """The best passages of the contexts by BM25 stand in the prompt, best first."""

    def answers(queries: Sequence[Query], max_tokens: int) -> Answers:
        return _prompted(setup, "retrieval", with_passages(queries, setup.passages, setup.pooled), max_tokens)

    return Subject("retrieval", answers)


def _bank(setup: Setup) -> Subject:
    """A bank's memories, by retrieval and gate as `memjax ask` does; contexts are not shown."""
    if setup.bank is None:
        raise ConfigError("subject 'bank' needs a bank; give --bank DIR")
    engine = Engine(setup.base, setup.bank, setup.style, namespace=setup.namespace)

    def answers(queries: Sequence[Query], max_tokens: int) -> Answers:
        texts = []
        for query in queries:
            texts.append(engine.ask(query.question, sampling=Sampling(max_tokens=max_tokens)).text)
            setup.progress("bank", len(texts), len(queries))
        return Answers(texts)

    return Subject("bank", answers)


def _internalize(setup: Setup) -> Subject:
    """A context becomes an adapter in one pass of a hypernetwork, of any rank, and is not shown."""
    base, hyper = setup.base, setup.hyper
    if hyper is None:
        raise ConfigError("subject 'internalize' needs a hypernetwork; give it as hyper")

    def write(context: str) -> Adapter:
        longest = setup.chunk or hyper.max_chunk
        tokens = document_tokens(base.tokenizer, setup.style, context)
        overlap = min(setup.overlap, longest - 1)
        return encode(base, hyper, tokens, max_chunk=longest, overlap=overlap, weigh=setup.weigh)

    def answers(queries: Sequence[Query], max_tokens: int) -> Answers:
        texts = [""] * len(queries)
        alone = [i for i, query in enumerate(queries) if not query.context]
        told = _prompted(setup, "internalize", [queries[i] for i in alone], max_tokens).texts if alone else []
        for i, text in zip(alone, told, strict=True):
            texts[i] = text
        # Neighbours of one context, and of like length: each is written once, and ranks of a batch are alike.
        place = lambda i: (len(queries[i].context or ""), queries[i].context or "")
        rest = sorted(set(range(len(queries))) - set(alone), key=place)
        written: dict[str, Adapter] = {}
        for begin in range(0, len(rest), setup.rows):
            part = rest[begin : begin + setup.rows]
            contexts = [queries[i].context or "" for i in part]
            written = {context: written.get(context) or write(context) for context in dict.fromkeys(contexts)}
            bare = [query_tokens(base, setup.style, dataclasses.replace(queries[i], context=None)) for i in part]
            made = answer_with(base, [written[context] for context in contexts], bare, max_tokens, setup.rows)
            for i, tokens in zip(part, made, strict=True):
                texts[i] = base.tokenizer.decode(tokens).strip()
            setup.progress("internalize", len(alone) + begin + len(part), len(queries))
        return Answers(texts)

    return Subject("internalize", answers, write)


# Name -> how the subject is made. What is added here is at once a column of every evaluation.
SUBJECTS: dict[str, Callable[[Setup], Subject]] = {
    "in_context": _in_context,
    "no_context": _no_context,
    "retrieval": _retrieval,
    "bank": _bank,
    "internalize": _internalize,
}


def query_tokens(base: Base, style: PromptStyle, query: Query) -> list[int]:
    """The prompt's ids, up to where the answer goes on."""
    tokenizer = base.tokenizer
    if query.gap is None:
        tokens = (
            ask_tokens(tokenizer, style, query.question)
            if query.context is None
            else read_tokens(tokenizer, style, query.context, query.question)
        )
    else:
        text = query.question if query.context is None else f"{query.context}{query.gap}{query.question}"
        tokens = ask_tokens(tokenizer, PLAIN, text) if query.chat else [*tokenizer.prefix_ids, *tokenizer.encode(text)]
    return [*tokens, *tokenizer.encode(query.prefix)] if query.prefix else tokens


def fit_window(base: Base, style: PromptStyle, query: Query, room: int, truncate: bool) -> tuple[list[int], bool]:
    """(ids of the prompt, whether its context was cut) such that `room` more tokens fit the base's window.

    A context is cut in the middle, since both ends of a text are likelier to matter (LongBench, arXiv 2308.14508).
    InputError where a prompt does not fit and `truncate` is off or cannot help.
    """
    window = base.config.max_positions
    tokens = query_tokens(base, style, query)
    over = len(tokens) + room - window
    if over <= 0:
        return tokens, False
    what = f"a prompt of {len(tokens)} tokens with {room} for the answer exceeds the base's window of {window}"
    if not truncate or not query.context:
        way_out = "pass --truncate to cut contexts in the middle" if query.context else "shorten the question"
        raise InputError(f"{what}; {way_out} or use a base with a longer window")
    ids = base.tokenizer.encode(query.context)
    kept = len(ids)
    while over > 0:
        # The seam may tokenise anew, so what was cut is measured, not computed.
        kept -= over
        if kept < 1:
            raise InputError(f"{what}, even without its context; use a base with a longer window")
        head = (kept + 1) // 2
        cut = base.tokenizer.decode(ids[:head]) + base.tokenizer.decode(ids[len(ids) - (kept - head) :])
        tokens = query_tokens(base, style, dataclasses.replace(query, context=cut))
        over = len(tokens) + room - window
    return tokens, True


def _prompted(setup: Setup, name: str, queries: Sequence[Query], max_tokens: int) -> Answers:
    base = setup.base
    fitted = [fit_window(base, setup.style, query, max_tokens, setup.truncate) for query in queries]
    texts = complete(
        base,
        [tokens for tokens, _ in fitted],
        max_tokens,
        groups=[query.context for query in queries],
        rows=setup.rows,
        progress=lambda done: setup.progress(name, done, len(queries)),
    )
    return Answers(texts, sum(cut for _, cut in fitted))


def complete(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    groups: Sequence[Hashable] | None = None,
    rows: int = ROWS,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers of prompts, stripped, `rows` at a time or fewer where the prompts are long.

    groups: prompts of one group (not None) begin alike: where there are `SHARED` of them, their beginning is read once.
    progress is told how many are answered.
    """
    by_group: dict[Hashable, list[int]] = {}
    for index in range(len(prompts)):
        by_group.setdefault(None if groups is None else groups[index], []).append(index)
    alike = [members for group, members in by_group.items() if group is not None and len(members) >= SHARED]
    mixed = [i for group, members in by_group.items() if group is None or len(members) < SHARED for i in members]
    # Neighbours of like length: little padding, and few lengths to compile.
    mixed.sort(key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    done = 0
    for members in filter(None, [*alike, mixed]):
        asked = [prompts[i] for i in members]
        longest = max(len(tokens) for tokens in asked) - common_prefix(asked) + max_tokens

        def further(count: int, before: int = done) -> None:
            progress(before + count)

        made = generate_all(
            base.model,
            base.params,
            asked,
            base.tokenizer.eos_ids,
            Sampling(max_tokens),
            rows=max(1, min(rows, 1 << (max(HELD // longest, 1).bit_length() - 1))),
            progress=further,
        )
        for i, tokens in zip(members, made, strict=True):
            texts[i] = base.tokenizer.decode(tokens).strip()
        done += len(members)
    return texts


def answer_with(
    base: Base, adapters: Sequence[Adapter], prompts: Sequence[Sequence[int]], max_tokens: int, rows: int = ROWS
) -> list[list[int]]:
    """Greedy answers to up to `rows` prompts, each with an adapter of its own, of any ranks.

    As a bank's engine does, the base reads all but a prompt's last token, and the adapter is on from there.
    """
    # Filled up to one number of rows, and to one of few ranks: batches share their compiled programs.
    fill = lambda given: [*given, *[given[-1]] * (batch_bucket(rows) - len(given))]
    rank = batch_bucket(max(adapter.rank for adapter in adapters))
    slots = side_by_side(fill(adapters), rank)
    asked, ids = fill(prompts), jnp.arange(slots.capacity, dtype=jnp.int32)
    _, read, lengths = read_prompts(base.model, base.params, [prompt[:-1] for prompt in asked], 0)
    segments = (Segment(read.k, read.v, read.position),)
    last = np.asarray([prompt[-1:] for prompt in asked], np.int32)
    cache = empty_cache(base.config, len(asked), bucket(1 + max_tokens), base.params["embed"])
    hidden, cache = prefill(base.model, base.params, last, lengths[:, None], cache, segments, slots, ids)
    pieces = stream_from(
        base.model,
        base.params,
        hidden,
        lengths + 1,
        cache,
        base.tokenizer.eos_ids,
        Sampling(max_tokens),
        segments=segments,
        slots=slots,
        slot_ids=ids,
        rows=len(prompts),
    )
    return collect(pieces)


def with_passages(queries: Sequence[Query], count: int, pooled: bool) -> list[Query]:
    """The queries with the best `count` passages of all contexts (or of their own) in place of their context."""
    held: dict[str, list[str]] = {}
    for query in queries:
        if query.context and query.context not in held:
            held[query.context] = prose_lines(query.context, CHUNK_WORDS) if query.context.strip() else []
    everything = _searcher([passage for passages in held.values() for passage in passages]) if pooled else None
    own = {} if pooled else {context: _searcher(passages) for context, passages in held.items()}
    made = []
    for query in queries:
        search = everything or own.get(query.context or "")
        found = search(query.question, count) if search else []
        made.append(dataclasses.replace(query, context="\n".join(found) or None))
    return made


def _searcher(passages: Sequence[str]) -> Callable[[str, int], list[str]] | None:
    if not passages:
        return None
    # Names of memories may not repeat, and a passage may: it stands under its number.
    index = build_index(passages, [str(i) for i in range(len(passages))])
    return lambda question, count: [passages[int(i)] for i, _ in search_index(index, question, count, fill=True)]
