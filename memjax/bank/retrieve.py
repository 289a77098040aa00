"""Retrieval by words: which memories' source texts share words with a question, by BM25.

A long text is cut into overlapping chunks and scores as its best chunk does. Only texts of one namespace are indexed
together, so what is in another cannot be found, nor felt in a score. The index lies in parts (`parts`) beside the bank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from memjax.bank.parts import (
    PART,
    Kind,
    State,
    all_ids,
    find_parts,
    install_parts,
    load_parts,
    save_parts,
    shares,
    top,
    whole,
)
from memjax.bank.postings import CHUNK, OVERLAP, Impacts, Part, all_impacts, bm25_scores, build_part, load_part, save_part
from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.bank.words import tokenize

WORDS = Kind("words", 3, load_part, save_part)


@dataclasses.dataclass(frozen=True)
class TextIndex:
    """An index of memories' texts in parts {what their ids begin with: part}; the rest as in `parts.State`."""

    parts: Mapping[str, Part]
    version: int = 0
    valid_until: float | None = None

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """str [n], those of all parts, one after the other."""
        return all_ids(self.parts)

    @property
    def state(self) -> State[Part]:
        """The parts, and what they were made from."""
        return State(self.parts, self.version, self.valid_until)

    def scores(self, query: str) -> np.ndarray:
        """float32 [n]: the BM25 score of each memory's best chunk; 0 where it shares no word with the query."""
        words = tokenize(query)
        if not words or not self.parts:
            return np.zeros(len(self.ids), np.float32)
        return bm25_scores(list(self.parts.values()), self._impacts, words)

    @functools.cached_property
    def _impacts(self) -> list[Impacts]:
        return all_impacts(list(self.parts.values()))

    def search(self, query: str, k: int, fill: bool = False) -> list[tuple[str, float]]:
        """See `search_index`."""
        return search_index(self, query, k, fill)


def build_index(texts: Iterable[str], ids: Iterable[str], chunk: int = CHUNK, overlap: int = OVERLAP) -> TextIndex:
    """Index texts under their memories' ids. Texts of one memory must follow each other; they count as one."""
    return TextIndex({"": build_part(zip(ids, texts, strict=True), chunk, overlap)})


def search_index(index: TextIndex, query: str, k: int, fill: bool = False) -> list[tuple[str, float]]:
    """The k memories whose texts match the query best, as (id, score), best first; ties go to the first indexed.

    Fewer than k if there are fewer, or if fewer share a word with the query; with `fill`, others follow with score 0.
    """
    scores = index.scores(query)
    return top(index.ids, scores, k if fill else min(k, int(np.count_nonzero(scores > 0))))


def search(bank: Bank, query: str, k: int, namespace: str = DEFAULT_NAMESPACE) -> list[tuple[str, float]]:
    """The k memories of a namespace whose texts match the query best; see `open_index` and `search_index`."""
    return search_index(open_index(bank, namespace), query, k)


def open_index(
    bank: Bank, namespace: str = DEFAULT_NAMESPACE, held: TextIndex | None = None, part: int = PART
) -> TextIndex:
    """The index of a namespace's texts as they are now.

    That is `held`, what a long-running process got before, if it still is; else the one saved beside the bank; else one
    of which only the parts are made anew that have changed, and which is saved for whoever asks next.
    """
    now, old = find_parts(WORDS, bank, namespace, held.state if held else None)
    if held is not None and now is not None and now.parts is held.parts:
        return held
    if now is None:
        with bank.snapshot(namespace) as snapshot:
            made = {
                name: build_part(((i, snapshot.text(source)) for i, source in share.rows), holds=share.holds)
                if share.part is None
                else share.part
                for name, share in shares(snapshot.rows, old, part).items()
            }
        now = State(made, snapshot.version, snapshot.valid_until)
        install_parts(WORDS, bank, namespace, now, snapshot.rows)
    return TextIndex(*now)


def save_index(index: TextIndex, folder: Path) -> None:
    """Write an index into an empty folder: a safetensors file for each part, and JSON about them."""
    save_parts(WORDS, index.state, folder)


def load_index(folder: Path) -> TextIndex | None:
    """The index saved in a folder, memory-mapped; None if there is none, or it is damaged or of another format."""
    state = whole(WORDS, folder, load_parts(WORDS, folder))
    return None if state is None else TextIndex(*state)
