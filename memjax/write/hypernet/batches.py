"""Documents and questions in batches of one shape: chunks packed into rows, a row for each question, nothing recompiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from memjax.errors import ConfigError, DataError

NEVER = -1e9  # the log-probability of what fills the place of a class


@dataclasses.dataclass(frozen=True)
class Example:
    """A document in wrapped chunks (none: no document), and what is to be said to one prompt with its adapter.

    fed: the prompt and all but the last token of the answer; target int32, logp float32 [n, k]: the teacher's most likely
    tokens at each of the answer's n tokens, end of answer included; prompt: tokens of the prompt; exact: whether it counts
    among those whose whole answer is right or wrong.
    """

    chunks: tuple[Sequence[int], ...]
    fed: Sequence[int]
    target: np.ndarray
    logp: np.ndarray
    prompt: int
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """A batch is `groups` parts, each with `rows` rows of `width` context tokens, with up to `slots` chunks in a row, and
    `documents` documents of up to `chunks` chunks, with up to `questions` of each; a question with its answer takes up to
    `query` tokens, of which up to `answer` are the answer's, its end included, with `top_k` classes each. Groups are what
    is accumulated over and divided among devices.
    """

    groups: int = 1
    rows: int = 10
    width: int = 320
    slots: int = 8
    documents: int = 16
    chunks: int = 8
    query: int = 32
    answer: int = 8
    top_k: int = 16
    questions: int = 1

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1:
            raise ConfigError(f"every size of a batch is at least 1; got {self}")


def one_hot(tokens: Sequence[int], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """(target, logp [n, k]) that put all probability on the given tokens: cross-entropy as a case of the divergence."""
    target, logp = np.zeros((len(tokens), top_k), np.int32), np.full((len(tokens), top_k), NEVER, np.float32)
    target[:, 0], logp[:, 0] = tokens, 0.0
    return target, logp


def make_batch(examples: Iterable[Example], shape: BatchShape, marker: int = 0) -> dict[str, np.ndarray]:
    """The batch of these examples, as many as fit; groups take turns, document by document.

    Neighbours with the same chunks (one object) are questions of one document, which is written once for all of them.
    marker: how many tokens of a prompt are read with the adapter on, with the answer (0: all, as in the paper).

    With U groups, P rows of W tokens, S slots, G documents of K chunks, Q questions of all of them, A answer tokens and k
    classes, int32 unless said: tokens, owner (slot in its row, -1 is padding), positions (in its chunk, or -1) [U, P, W];
    index [U, G, K] of chunks (row times S plus slot, or -1); document [U, Q] (-1: nothing is asked in this row); before,
    before_places [U, Q, H]: what is read with the adapter off, where there is a marker; inputs, places [U, Q, T]: the rest;
    at [U, Q, A]: where in T answer tokens are predicted; target and float32 logp [U, Q, A, k]; float32 weight [U, Q, A], 1
    for a token that is there; bool exact [U, Q]. A document whose chunks find no room is left out, and so are questions of
    one beyond `shape.questions`. DataError for one that would never fit.
    """
    u, p, g, n = shape.groups, shape.rows, shape.documents, shape.answer
    t, q = marker + n - 1 if marker else shape.query, g * shape.questions
    ints = lambda *sizes, fill=0: np.full((u, *sizes), fill, np.int32)
    batch = {
        "tokens": ints(p, shape.width),
        "owner": ints(p, shape.width, fill=-1),
        "positions": ints(p, shape.width, fill=-1),
        "index": ints(g, shape.chunks, fill=-1),
        "document": ints(q, fill=-1),
        "inputs": ints(q, t),
        "places": ints(q, t, fill=-1),
        "at": ints(q, n),
        "target": ints(q, n, shape.top_k),
        "logp": np.full((u, q, n, shape.top_k), NEVER, np.float32),
        "weight": np.zeros((u, q, n), np.float32),
        "exact": np.zeros((u, q), bool),
    }
    if marker:
        before = max(shape.query - marker, 1)
        batch |= {"before": ints(q, before), "before_places": ints(q, before, fill=-1)}
    used = np.zeros((u, p), np.int64)
    held = np.zeros((u, p), np.int64)
    for number, asked in enumerate(_by_document(examples)):
        group, place = number % u, number // u
        if place >= g:
            break
        for example in asked:
            _check(example, shape, marker)
        found = _room(asked[0], used[group], held[group], shape)
        if found is None:
            continue
        for order, (row, chunk) in enumerate(zip(found, asked[0].chunks, strict=True)):
            at = slice(used[group, row], used[group, row] + len(chunk))
            batch["tokens"][group, row, at] = chunk
            batch["owner"][group, row, at] = held[group, row]
            batch["positions"][group, row, at] = np.arange(len(chunk))
            batch["index"][group, place, order] = row * shape.slots + held[group, row]
            used[group, row] += len(chunk)
            held[group, row] += 1
        for order, example in enumerate(asked[: shape.questions]):
            _put_question(batch, (group, place * shape.questions + order), example, place, marker)
    return batch


def _by_document(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples, those of one document together: neighbours that share their chunks; what has none stands alone."""
    asked: list[Example] = []
    for example in examples:
        if asked and not (example.chunks and example.chunks is asked[0].chunks):
            yield asked
            asked = []
        asked.append(example)
    if asked:
        yield asked


def _put_question(batch: dict[str, np.ndarray], row: tuple[int, int], example: Example, place: int, marker: int) -> None:
    """Writes a question of the document in `place` into its row of the batch."""
    length, answer = len(example.fed), len(example.target)
    off = example.prompt - marker if marker else 0
    batch["document"][row] = place
    if marker:
        batch["before"][row][:off] = example.fed[:off]
        batch["before_places"][row][:off] = np.arange(off)
    batch["inputs"][row][: length - off] = example.fed[off:]
    batch["places"][row][: length - off] = np.arange(off, length)
    batch["at"][row][:answer] = np.arange(length - answer, length) - off
    batch["target"][row][:answer] = example.target
    batch["logp"][row][:answer] = example.logp
    batch["weight"][row][:answer] = 1.0
    batch["exact"][row] = example.exact


def _room(example: Example, used: np.ndarray, held: np.ndarray, shape: BatchShape) -> list[int] | None:
    """The row of each chunk, first fit; None where they do not all fit."""
    used, held, rows = used.copy(), held.copy(), []
    for chunk in example.chunks:
        free = np.flatnonzero((used + len(chunk) <= shape.width) & (held < shape.slots))
        if not len(free):
            return None
        rows.append(int(free[0]))
        used[free[0]] += len(chunk)
        held[free[0]] += 1
    return rows


def _check(example: Example, shape: BatchShape, marker: int) -> None:
    longest, answer = max((len(chunk) for chunk in example.chunks), default=0), len(example.target)
    needed = (longest, len(example.chunks), len(example.fed), answer)
    if any(size > room for size, room in zip(needed, (shape.width, shape.chunks, shape.query, shape.answer), strict=True)):
        raise DataError(
            f"a document of {len(example.chunks)} chunks of up to {longest} tokens with a question of {len(example.fed)}, "
            f"{answer} of them the answer's, never fits {shape.chunks} chunks of {shape.width}, {shape.query} and "
            f"{shape.answer}; enlarge shape"
        )
    if not marker <= example.prompt:
        raise DataError(f"the adapter is on for {marker} tokens of a prompt of {example.prompt}; lower marker")
    if example.target.shape[1] != shape.top_k:
        raise DataError(f"an example has {example.target.shape[1]} classes not top_k={shape.top_k}; make them equal")
