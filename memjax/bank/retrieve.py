"""Retrieval by words: which memories' source texts share words with a question, by BM25.

A long text is cut into overlapping chunks and scores as its best chunk does. Only texts of one namespace are indexed
together, so what is in another cannot be found, nor felt in a score. The index lies beside the bank in parts (`postings`),
memory-mapped. A memory belongs to the part that its id begins like, so that a change makes one part anew, whatever the
size of the bank; parts that are damaged are made again from the texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memjax.bank.entries import Snapshot
from memjax.bank.keys import PART_FILE, part_file
from memjax.bank.postings import CHUNK, OVERLAP, Impacts, Part, all_impacts, bm25_scores, build_part, load_part, save_part
from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.bank.vectors import ABOUT, FILES, TEXT_ABOUT, keep_files, top
from memjax.bank.words import tokenize
from memjax.errors import BankError
from memjax.ids import file_hash, text_hash

FORMAT = 2
PART = 16_384  # memories of a part, from which on there are sixteen times as many parts


@dataclasses.dataclass(frozen=True)
class TextIndex:
    """An index of memories' texts in parts {what their ids begin with: part}, in order of these beginnings.

    version and valid_until say which state of which namespace it was made from; see `store.Snapshot`.
    """

    parts: Mapping[str, Part]
    version: int = 0
    valid_until: float | None = None

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """str [n], those of all parts, one after the other."""
        return np.concatenate([part.ids for part in self.parts.values()] or [np.zeros(0, np.str_)])

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
    of which only the parts are made anew that have changed, and which is saved for whoever asks next. One that cannot be
    saved is used all the same.
    """
    version, now = bank.namespace_version(namespace), bank.now()
    if held is not None and _is_fresh(held, version, now):
        return held
    folder = bank.keys_folder(namespace)
    old = load_parts(folder)
    saved = _whole(folder, old)
    if saved is not None and _is_fresh(saved, version, now):
        return saved
    with bank.snapshot(namespace) as snapshot:
        index = _renewed(snapshot, {**(held.parts if held else {}), **old}, part)

    def write(new: Path) -> None:
        _save(index, new, folder)
        keep_files(folder, new, ABOUT, index.version, FILES)

    with contextlib.suppress(BankError):
        bank.install_keys(index.version, write, namespace)
    return index


def _renewed(snapshot: Snapshot, old: Mapping[str, Part], size: int) -> TextIndex:
    """The index of a snapshot, with those of the `old` parts in it that hold what they should."""
    digits = part_digits(len(snapshot.rows), max(map(len, old), default=None), size)
    groups: dict[str, list[tuple[str, str]]] = {}
    for memory_id, source in snapshot.rows:
        groups.setdefault(memory_id[:digits], []).append((memory_id, source))
    parts = {}
    for name, rows in groups.items():
        holds = text_hash("".join(f"{memory_id} {source}\n" for memory_id, source in rows))
        known = old.get(name)
        parts[name] = (
            known
            if known is not None and known.holds == holds
            else build_part(((i, snapshot.text(source)) for i, source in rows), holds=holds)
        )
    return TextIndex(parts, snapshot.version, snapshot.valid_until)


def part_digits(count: int, held: int | None = None, size: int = PART) -> int:
    """How many hex digits of an id tell its part, for `count` memories; as `held` unless parts are then far from `size`."""
    if held is not None and size // 64 < count / 16**held <= 2 * size:
        return held
    digits = 0
    while count > size * 16**digits:
        digits += 1
    return digits


def _is_fresh(index: TextIndex, version: int, now: float) -> bool:
    """Whether an index shows a namespace as it is: made at this version, and nothing in it has expired since."""
    return index.version == version and (index.valid_until is None or now < index.valid_until)


def save_index(index: TextIndex, folder: Path) -> None:
    """Write an index into an empty folder: a safetensors file for each part, and JSON about them."""
    _save(index, folder, None)


def _save(index: TextIndex, folder: Path, old: Path | None) -> None:
    """Write an index into an empty folder; parts whose file lies in `old` unchanged are hard-linked."""
    about = {}
    for name, part in index.parts.items():
        path = folder / part_file(name)
        if part.sha256 and old is not None:
            with contextlib.suppress(OSError):
                os.link(old / path.name, path)
        if not path.exists() or file_hash(path) != part.sha256:
            path.unlink(missing_ok=True)
            part = save_part(part, path)
        about[name] = {"holds": part.holds, "sha256": part.sha256}
    told = {"format": FORMAT, "version": index.version, "valid_until": index.valid_until, "parts": about}
    (folder / TEXT_ABOUT).write_text(json.dumps(told))


def load_index(folder: Path) -> TextIndex | None:
    """The index saved in a folder, memory-mapped; None if there is none, or it is damaged or of another format."""
    return _whole(folder, load_parts(folder))


def _whole(folder: Path, parts: Mapping[str, Part]) -> TextIndex | None:
    """The index of the parts that were found in a folder, if they are all that it should hold."""
    about = _about(folder)
    try:
        present = {path.name for path in folder.iterdir()} - {TEXT_ABOUT, *FILES}
        if list(parts) != list(about["parts"]) or present != {part_file(name) for name in parts}:
            return None
        return TextIndex(parts, int(about["version"]), about["valid_until"])
    except (OSError, KeyError, TypeError, ValueError):
        return None  # what is left of it is used, the rest made again from the texts


def load_parts(folder: Path) -> dict[str, Part]:
    """The parts of an index in a folder that are there and whole."""
    parts = {}
    for name, told in _about(folder).get("parts", {}).items():
        path = folder / part_file(name)
        # A tenth of a second for 100,000 texts, against answers from damaged numbers.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if file_hash(path) == told["sha256"]:
                parts[name] = load_part(path, told["holds"], told["sha256"])
    return parts


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / TEXT_ABOUT).read_text())
        names = about["parts"].keys()
        whole = about["format"] == FORMAT and all(PART_FILE.fullmatch(part_file(name)) for name in names)
        return about if whole else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
