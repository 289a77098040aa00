"""A part of a text index: which words stand how often in which chunks, and their BM25 (Lucene's variant, as in bm25s).

Parts know nothing of each other. How rare a word is and how long chunks are is counted over all of them when a question is
asked, so a change of the bank makes one part anew and leaves every score what a single index would give.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memjax.bank.mapped import id_bytes, id_strings, map_tensors, save_tensors
from memjax.bank.words import STOP_WORDS, all_words, stem

CHUNK = 160  # words of a chunk that are indexed; about a paragraph
OVERLAP = 40  # words that a chunk shares with the one before
K1, B = 1.5, 0.75


@dataclasses.dataclass(frozen=True)
class Part:
    """The chunks of some memories' texts.

    ids [n]; starts int64 [n], each memory's first chunk; lengths int32 [chunks], in words; words uint64 [w], hashes of the
    words that occur, sorted; first int64 [w + 1]: where each one's postings begin in chunk int32 and count float32 [p].
    holds: a digest of what it was made from, sha256: of its file, where it is in one.
    """

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    words: np.ndarray
    first: np.ndarray
    chunk: np.ndarray
    count: np.ndarray
    holds: str = ""
    sha256: str = ""

    def places(self, hashes: np.ndarray) -> np.ndarray:
        """int64 [t]: which of the part's words each hash is, -1 for none."""
        if not len(self.words):
            return np.full(len(hashes), -1, np.int64)
        at = np.minimum(np.searchsorted(self.words, hashes), len(self.words) - 1)
        return np.where(self.words[at] == hashes, at, -1)

    def impacts(self, mean_length: float) -> Impacts:
        """What each posting adds to which chunk's score, but for its word's weight, by the mean length of chunks."""
        damp = K1 * (1 - B + B * self.lengths / mean_length)
        return Impacts(np.asarray(self.chunk, np.int64), self.count / (self.count + damp[self.chunk]))

    def scores(self, places: np.ndarray, weights: np.ndarray, impacts: Impacts) -> np.ndarray:
        """float32 [n]: BM25 of each memory's best chunk for words at `places` [t] of these weights (idf) [t]."""
        found = np.zeros(len(self.lengths))
        for place, weight in zip(places, weights, strict=True):
            if place < 0:
                continue
            begin, end = int(self.first[place]), int(self.first[place + 1])
            added = weight * impacts.value[begin:end]
            if end - begin == len(found):  # in every chunk, in their order
                found += added
            else:
                found[impacts.chunk[begin:end]] += added
        found = found.astype(np.float32)
        return found if len(found) == len(self.starts) else np.maximum.reduceat(found, self.starts)


class Impacts(NamedTuple):
    """chunk int64 [p] and value float64 [p] of a part's postings, in the types in which they are added up."""

    chunk: np.ndarray
    value: np.ndarray


def word_hash(word: str) -> int:
    """64 bits of a word: two of a million words share one with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def all_impacts(parts: Sequence[Part]) -> list[Impacts]:
    """`Part.impacts` of each part, by the mean length of the chunks of all."""
    chunks, words = (sum(int(count) for count in counts) for counts in zip(*map(_sizes, parts), strict=True))
    return [part.impacts(max(words / max(chunks, 1), 1e-9)) for part in parts]


def _sizes(part: Part) -> tuple[int, int]:
    return len(part.lengths), int(part.lengths.sum())


def bm25_scores(parts: Sequence[Part], impacts: Sequence[Impacts], words: Sequence[str]) -> np.ndarray:
    """float32 [n] over the memories of all parts in their order: 0 where a memory shares no word with the query.

    impacts: `all_impacts` of these parts, which last as long as they do.
    """
    hashes = np.array([word_hash(word) for word in words], np.uint64)
    places = [part.places(hashes) for part in parts]
    df = np.zeros(len(words))  # in how many chunks each word stands, of all parts
    for part, at in zip(parts, places, strict=True):
        if (at >= 0).any():
            df += np.where(at >= 0, part.first[at + 1] - part.first[at], 0)
    chunks = sum(len(part.lengths) for part in parts)
    weights = np.log(1 + (chunks - df + 0.5) / (df + 0.5))
    each = [part.scores(at, weights, made) for part, at, made in zip(parts, places, impacts, strict=True)]
    return np.concatenate([*each, np.zeros(0, np.float32)])


def build_part(pairs: Iterable[tuple[str, str]], chunk: int = CHUNK, overlap: int = OVERLAP, holds: str = "") -> Part:
    """The part of (memory id, text) pairs; texts of one memory follow each other and count as one."""
    tokens = array("i")
    chunks: list[int] = []  # lengths
    owners: list[str] = []
    starts: list[int] = []
    vocabulary: dict[str, int] = {}
    number: dict[str, int | None] = dict.fromkeys(STOP_WORDS)  # of each word met, its token's: stemmed once, not per text
    for owner, text in pairs:
        if not owners or owners[-1] != owner:
            owners.append(owner)
            starts.append(len(chunks))
        words = all_words(text)
        for word in words:
            if word not in number:
                number[word] = vocabulary.setdefault(stem(word), len(vocabulary))
        said = array("i", [token for word in words if (token := number[word]) is not None])
        for begin in range(0, max(len(said) - overlap, 1), chunk - overlap):
            piece = said[begin : begin + chunk]
            tokens += piece
            chunks.append(len(piece))
    if len(set(owners)) != len(owners):
        raise ValueError("texts of one memory must follow each other")
    lengths = np.array(chunks, np.int32)
    hashes = np.array([word_hash(word) for word in vocabulary], np.uint64)
    order = np.argsort(hashes)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    # One number per (word, chunk), so that equal ones are counted by one sort.
    inside = np.repeat(np.arange(len(lengths)), lengths)
    pair, count = np.unique(rank[np.array(tokens, np.int64)] * max(len(lengths), 1) + inside, return_counts=True)
    word, place = np.divmod(pair, max(len(lengths), 1))
    first = np.searchsorted(word, np.arange(len(order) + 1))
    return Part(
        ids=np.array(owners, np.str_),
        starts=np.array(starts, np.int64),
        lengths=lengths,
        words=hashes[order],
        first=first.astype(np.int64),
        chunk=place.astype(np.int32),
        count=count.astype(np.float32),
        holds=holds,
    )


def save_part(part: Part, path: Path) -> Part:
    """Write a part as one safetensors file; the part with the file's hash."""
    arrays = {field: getattr(part, field) for field in _ARRAYS} | {"ids": id_bytes(part.ids)}
    return dataclasses.replace(part, sha256=save_tensors(path, arrays))


def load_part(path: Path, holds: str, sha256: str) -> Part:
    """The part in a file, memory-mapped; the caller has compared its hash."""
    found = map_tensors(path)
    return Part(
        **{name: np.asarray(found[name]) for name in _ARRAYS}, ids=id_strings(found["ids"]), holds=holds, sha256=sha256
    )


_ARRAYS = ("starts", "lengths", "words", "first", "chunk", "count")
