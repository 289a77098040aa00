"""Retrieval by words: which memories' source texts share words with a question, by BM25 (Lucene's variant, by bm25s).

A long text is cut into overlapping chunks and scores as its best chunk does. Only texts of one namespace are indexed
together, so what is in another cannot be found, nor felt in a score. The index is saved beside the bank and
memory-mapped; it is made again when the namespace has changed, something in it has expired, or its files are damaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import unicodedata
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.bank.vectors import ABOUT, FILES, TEXT_ABOUT, keep_files, top
from memjax.errors import BankError
from memjax.ids import file_hash

FORMAT = 1
CHUNK = 160  # words of a chunk that are indexed; about a paragraph
OVERLAP = 40  # words that a chunk shares with the one before

# What says nothing about a text's subject: articles, pronouns, auxiliaries, prepositions, question words.
STOP_WORDS = frozenset(
    """a about an and any are as at be been but by can could did do does for from had has have he her his how i if in
    into is it its me my no not of on or our she should so some such than that the their them then there these they this
    those to was we were what when where which who whom whose why will with would you your
    d ll m re s t ve""".split()
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af])")
_TOKEN = re.compile(r"\d+(?:[.:]\d+)+|[^\W_]+")


def tokenize(text: str) -> list[str]:
    """The words and numbers of a text that count: case, accents, plurals and thousands separators set aside.

    Chinese and Japanese characters and Korean syllables are tokens by themselves, for lack of spaces between words.
    """
    return [_stem(word) for word in _words(text) if word not in STOP_WORDS]


def _words(text: str) -> list[str]:
    """All words and numbers of a text, in small letters and without accents, as they stand."""
    text = text.casefold()
    if not text.isascii():  # of ASCII, nothing below would change anything
        text = unicodedata.normalize("NFKD", text)
        text = "".join(char for char in text if not unicodedata.combining(char))
        text = _IDEOGRAPH.sub(r" \1 ", unicodedata.normalize("NFC", text))
    return _TOKEN.findall(_THOUSANDS.sub("", text))


def _stem(word: str) -> str:
    """An English word without its plural ending, after Harman's S-stemmer (1991)."""
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1]


@dataclasses.dataclass(frozen=True)
class TextIndex:
    """An index of chunks, grouped by memory: ids [n], starts [n] (each memory's first chunk), and BM25 over the chunks.

    version and valid_until say which state of which namespace it was made from; see `store.Snapshot`.
    """

    ids: np.ndarray
    starts: np.ndarray
    bm25: Any  # bm25s.BM25, or None if there is not a single word
    version: int = 0
    valid_until: float | None = None

    def scores(self, query: str) -> np.ndarray:
        """float32 [n]: the BM25 score of each memory's best chunk; 0 where it shares no word with the query."""
        if self.bm25 is not None:
            wanted = [self.bm25.vocab_dict[token] for token in tokenize(query) if token in self.bm25.vocab_dict]
            if wanted:
                scores = self.bm25.get_scores_from_ids(wanted)
                return scores if len(scores) == len(self.starts) else np.maximum.reduceat(scores, self.starts)
        return np.zeros(len(self.ids), np.float32)

    def search(self, query: str, k: int, fill: bool = False) -> list[tuple[str, float]]:
        """See `search_index`."""
        return search_index(self, query, k, fill)


def build_index(texts: Iterable[str], ids: Iterable[str], chunk: int = CHUNK, overlap: int = OVERLAP) -> TextIndex:
    """Index texts under their memories' ids. Texts of one memory must follow each other; they count as one."""
    return _build(zip(ids, texts, strict=True), chunk, overlap)


def _build(pairs: Iterable[tuple[str, str]], chunk: int = CHUNK, overlap: int = OVERLAP) -> TextIndex:
    vocabulary: dict[str, int] = {}
    number: dict[str, int | None] = dict.fromkeys(STOP_WORDS)  # of each word met, its token's: stemmed once, not per text
    chunks: list[array[int]] = []
    owners: list[str] = []
    starts: list[int] = []
    for owner, text in pairs:
        if not owners or owners[-1] != owner:
            owners.append(owner)
            starts.append(len(chunks))
        words = _words(text)
        for word in words:
            if word not in number:
                number[word] = vocabulary.setdefault(_stem(word), len(vocabulary))
        tokens = array("i", [token for word in words if (token := number[word]) is not None])
        for begin in range(0, max(len(tokens) - overlap, 1), chunk - overlap):
            chunks.append(tokens[begin : begin + chunk])
    if len(set(owners)) != len(owners):
        raise ValueError("texts of one memory must follow each other")
    bm25 = None
    if vocabulary:
        bm25 = _load_bm25s().BM25(method="lucene")
        bm25.index((chunks, vocabulary), show_progress=False)
    return TextIndex(np.array(owners, dtype=np.str_), np.array(starts, np.int64), bm25)


def search_index(index: TextIndex, query: str, k: int, fill: bool = False) -> list[tuple[str, float]]:
    """The k memories whose texts match the query best, as (id, score), best first; ties go to the first indexed.

    Fewer than k if there are fewer, or if fewer share a word with the query; with `fill`, others follow with score 0.
    """
    scores = index.scores(query)
    return top(index.ids, scores, k if fill else min(k, int(np.count_nonzero(scores > 0))))


def search(bank: Bank, query: str, k: int, namespace: str = DEFAULT_NAMESPACE) -> list[tuple[str, float]]:
    """The k memories of a namespace whose texts match the query best; see `open_index` and `search_index`."""
    return search_index(open_index(bank, namespace), query, k)


def open_index(bank: Bank, namespace: str = DEFAULT_NAMESPACE, held: TextIndex | None = None) -> TextIndex:
    """The index of a namespace's texts as they are now.

    That is `held`, what a long-running process got before, if it still is; else the one saved beside the bank; else a
    new one, which is saved for whoever asks next. One that cannot be saved is used all the same.
    """
    version, now = bank.namespace_version(namespace), bank.now()
    folder = bank.keys_folder(namespace)
    for index in (held, None if _is_fresh(held, version, now) else load_index(folder)):
        if index is not None and _is_fresh(index, version, now):
            return index
    with bank.snapshot(namespace) as snapshot:
        index = _build(snapshot.texts)
        index = dataclasses.replace(index, version=snapshot.version, valid_until=snapshot.valid_until)

    def write(new: Path) -> None:
        save_index(index, new)
        keep_files(folder, new, ABOUT, index.version, FILES)

    with contextlib.suppress(BankError):
        bank.install_keys(index.version, write, namespace)
    return index


def _is_fresh(index: TextIndex | None, version: int, now: float) -> bool:
    """Whether an index shows a namespace as it is: made at this version, and nothing in it has expired since."""
    return index is not None and index.version == version and (index.valid_until is None or now < index.valid_until)


def save_index(index: TextIndex, folder: Path) -> None:
    """Write an index into an empty folder, as NumPy arrays and JSON."""
    np.save(folder / "ids.npy", index.ids, allow_pickle=False)
    np.save(folder / "starts.npy", index.starts, allow_pickle=False)
    if index.bm25 is not None:
        index.bm25.save(folder)
    about = {
        "format": FORMAT,
        "version": index.version,
        "valid_until": index.valid_until,
        "words": index.bm25 is not None,
        "files": {path.name: file_hash(path) for path in sorted(folder.iterdir())},
    }
    (folder / TEXT_ABOUT).write_text(json.dumps(about))


def load_index(folder: Path) -> TextIndex | None:
    """The index saved in a folder, memory-mapped; None if there is none, or it is damaged or of another format."""
    try:
        about = json.loads((folder / TEXT_ABOUT).read_text())
        # A tenth of a second for 100,000 texts, against answers from damaged numbers.
        if about["format"] != FORMAT or about["files"] != {
            path.name: file_hash(path) for path in folder.iterdir() if path.name not in (TEXT_ABOUT, *FILES)
        }:
            return None
        ids, starts = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in ("ids.npy", "starts.npy"))
        bm25 = _load_bm25s().BM25.load(folder, mmap=True) if about["words"] else None
        return TextIndex(ids, starts, bm25, int(about["version"]), about["valid_until"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # it is made again from the texts


def _load_bm25s() -> ModuleType:
    """bm25s, quiet. Imported only here: its import runs a JAX program, which must not precede `jax.distributed`."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
