"""Retrieval by meaning: unit vectors of text chunks, searched exactly by one matrix product.

Each chunk of a text has one key; a memory scores as its best chunk does (max pooling). The keys of a namespace lie in
one safetensors file beside its text index, memory-mapped. They are made again only for texts that the file does not
hold, for another encoder, or where the file is damaged; a text's hash says which keys are its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.errors import BankError
from memjax.ids import file_hash, text_hash

if TYPE_CHECKING:
    from memjax.models.encoder import Encoder

FORMAT = 1
CHUNK = 90  # words of a chunk: what fits into the 128 tokens that sentence encoders are trained on
OVERLAP = 20  # words that a chunk shares with the one before
KEYS, ABOUT = "keys.safetensors", "keys.json"
FILES = (KEYS, ABOUT)
TEXT_ABOUT = "index.json"  # what describes the text index beside the keys; see `retrieve`
STALE = -1  # the version of keys that were taken over and are no namespace's
# A word with the space after it; an ideograph is a word, and so is each piece of what has no spaces for long.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]\s*|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]{1,24}\s*"
)
_DTYPES = {"F32": np.float32, "I64": np.int64, "U8": np.uint8}


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Keys of chunks, grouped by memory, with the encoder that made them.

    ids [n]; starts int64 [n], each memory's first key; keys float32 [m, width], unit rows; sources uint8 [t, 32], the
    sha256 of each text, and source_starts int64 [t], each text's first key. version and valid_until say which state of
    which namespace they were made from; see `store.Snapshot`.
    """

    encoder: Encoder
    ids: np.ndarray
    starts: np.ndarray
    keys: np.ndarray
    sources: np.ndarray
    source_starts: np.ndarray
    version: int = 0
    valid_until: float | None = None

    def scores(self, query: str) -> np.ndarray:
        """float32 [n]: the largest cosine of the query with a chunk of each memory."""
        from memjax.models.encoder import encode

        if not len(self.ids):
            return np.zeros(0, np.float32)
        return np.maximum.reduceat(self.keys @ encode(self.encoder, [query])[0], self.starts)

    def search(self, query: str, k: int, fill: bool = True) -> list[tuple[str, float]]:
        """The k memories nearest in meaning, as (id, cosine), best first; any text has some cosine, so `fill` is moot."""
        return top(self.ids, self.scores(query), k)


def top(ids: np.ndarray, scores: np.ndarray, k: int) -> list[tuple[str, float]]:
    """The k best of scores [n], as (id, score), best first; ties go to the first."""
    n = len(ids)
    k = min(k, n)
    if k < 1:
        return []
    cut = np.partition(scores, n - k)[n - k]
    best = np.concatenate([np.flatnonzero(scores > cut), np.flatnonzero(scores == cut)])
    best = best[np.argsort(-scores[best], kind="stable")][:k]
    return [(str(ids[i]), float(scores[i])) for i in best]


def chunks(text: str, words: int = CHUNK, overlap: int = OVERLAP) -> list[str]:
    """The text in pieces of `words` words that overlap; one piece, perhaps empty, where it is short."""
    starts = [m.start() for m in _WORD.finditer(text)]
    ends = [*starts[1:], len(text)]
    made = []
    for begin in range(0, max(len(starts) - overlap, 1), words - overlap):
        stop = min(begin + words, len(starts))
        made.append(text[starts[begin] : ends[stop - 1]].strip() if starts else "")
    return made


def source(text: str) -> bytes:
    """What a text's keys are found by: the 32 bytes of `ids.text_hash`."""
    return bytes.fromhex(text_hash(text))


def build_vectors(texts: Iterable[str], ids: Iterable[str], encoder: Encoder, known: Sequence[Vectors] = ()) -> Vectors:
    """Keys of texts under their memories' ids; texts of one memory must follow each other and count as one.

    known: earlier vectors, whose keys are taken over where the text and the encoder are the same.
    """
    return _build(zip(ids, texts, strict=True), encoder, known)


def _build(pairs: Iterable[tuple[str, str]], encoder: Encoder, known: Sequence[Vectors] = ()) -> Vectors:
    from memjax.models.encoder import encode

    held = {h: rows for old in known if old.encoder.id == encoder.id for h, rows in _rows(old).items()}
    owners: list[str] = []
    starts: list[int] = []
    sources: list[bytes] = []
    source_starts: list[int] = []
    new: list[str] = []  # chunks to encode
    taken: list[tuple[int, np.ndarray]] = []  # (first key, keys taken over)
    places: list[tuple[int, int]] = []  # (first key, chunks) of each text that is encoded
    count = 0
    for owner, text in pairs:
        if not owners or owners[-1] != owner:
            owners.append(owner)
            starts.append(count)
        digest = source(text)
        sources.append(digest)
        source_starts.append(count)
        if (rows := held.get(digest)) is not None:
            taken.append((count, rows))
            count += len(rows)
        else:
            parts = chunks(text)
            new += parts
            places.append((count, len(parts)))
            count += len(parts)
    if len(set(owners)) != len(owners):
        raise ValueError("texts of one memory must follow each other")
    keys = np.empty((count, encoder.width), np.float32)
    for first, rows in taken:
        keys[first : first + len(rows)] = rows
    made, begin = encode(encoder, new), 0
    for first, size in places:
        keys[first : first + size] = made[begin : begin + size]
        begin += size
    return Vectors(
        encoder,
        np.array(owners, np.str_),
        np.array(starts, np.int64),
        keys,
        np.frombuffer(b"".join(sources), np.uint8).reshape(-1, 32),
        np.array(source_starts, np.int64),
    )


def open_vectors(bank: Bank, encoder: Encoder, namespace: str = DEFAULT_NAMESPACE, held: Vectors | None = None) -> Vectors:
    """The keys of a namespace's texts as they are now, under this encoder.

    As `retrieve.open_index`: `held` if it still is, else what lies beside the bank, else made again, where only texts
    that neither of the two holds are encoded. Texts are encoded outside the bank's snapshot, since it may take minutes.
    """
    version, now = bank.namespace_version(namespace), bank.now()
    folder = bank.keys_folder(namespace)
    fits = lambda v: v is not None and v.encoder.id == encoder.id
    fresh = lambda v: fits(v) and v.version == version and (v.valid_until is None or now < v.valid_until)
    if fresh(held):
        return held
    saved = load_vectors(folder, encoder)
    if fresh(saved):
        return saved
    with bank.snapshot(namespace) as snapshot:
        pairs = list(snapshot.texts)
    made = _build(pairs, encoder, [v for v in (held, saved) if fits(v)])
    made = dataclasses.replace(made, version=snapshot.version, valid_until=snapshot.valid_until)

    def write(new: Path) -> None:
        save_vectors(made, new)
        keep_text_index(folder, new, made.version)

    with contextlib.suppress(BankError):
        bank.install_keys(made.version, write, namespace)
    return made


def keep_text_index(old: Path, new: Path, version: int) -> None:
    """Hard-link the text index that the folder `old` holds into `new` if it is of this version, else leave it behind."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if json.loads((old / TEXT_ABOUT).read_text())["version"] == version:
            for path in sorted(old.iterdir()):
                if path.name not in FILES:
                    os.link(path, new / path.name)


def save_vectors(vectors: Vectors, folder: Path) -> None:
    """Write keys.safetensors and keys.json into a folder."""
    width = max((len(i.encode()) for i in map(str, vectors.ids)), default=1)
    names = np.frombuffer(b"".join(str(i).encode().ljust(width, b"\0") for i in vectors.ids), np.uint8)
    tensors = {
        "keys": vectors.keys,
        "ids": names.reshape(len(vectors.ids), width),
        "starts": vectors.starts,
        "sources": vectors.sources,
        "source_starts": vectors.source_starts,
    }
    _write(folder, tensors, vectors.encoder.id, vectors.version, vectors.valid_until)


def _write(folder: Path, tensors: Mapping[str, np.ndarray], encoder: str, version: int, valid_until: float | None) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / KEYS)
    about = {
        "format": FORMAT,
        "encoder": encoder,
        "chunk": [CHUNK, OVERLAP],
        "version": version,
        "valid_until": valid_until,
        "sha256": file_hash(folder / KEYS),
    }
    (folder / ABOUT).write_text(json.dumps(about))


def load_vectors(folder: Path, encoder: Encoder) -> Vectors | None:
    """The vectors saved in a folder, keys memory-mapped; None if there are none, or damaged ones, or another encoder's."""
    about, mapped = _read(folder)
    if about.get("encoder") != encoder.id:
        return None
    names = np.ascontiguousarray(mapped["ids"])
    ids = np.char.decode(names.view(f"S{names.shape[1]}")[:, 0], "utf-8")
    parts = (mapped[name] for name in ("starts", "keys", "sources", "source_starts"))
    return Vectors(encoder, ids, *parts, about["version"], about["valid_until"])


def keep_vectors(old: Path, new: Path, sources: Collection[bytes]) -> None:
    """Take the keys saved in the folder `old` over into `new`, but for texts that are not among `sources`.

    They keep the version that they were made from, so that whoever wants them newer knows what to add.
    """
    about, mapped = _read(old)
    if not about:
        return
    hashes = [row.tobytes() for row in mapped["sources"]]
    if all(h in sources for h in hashes):
        with contextlib.suppress(OSError):
            for name in FILES:
                os.link(old / name, new / name)
        return
    ends = [*mapped["source_starts"][1:].tolist(), len(mapped["keys"])]
    rows = [(a, b) for h, a, b in zip(hashes, mapped["source_starts"].tolist(), ends, strict=True) if h in sources]
    sizes = np.array([b - a for a, b in rows], np.int64)
    tensors = {
        "keys": np.concatenate([mapped["keys"][a:b] for a, b in rows] or [mapped["keys"][:0]]),
        "ids": np.zeros((0, 1), np.uint8),
        "starts": np.zeros(0, np.int64),
        "sources": np.frombuffer(b"".join(h for h in hashes if h in sources), np.uint8).reshape(-1, 32),
        "source_starts": np.cumsum(sizes) - sizes,
    }
    _write(new, tensors, about["encoder"], STALE, None)


def _read(folder: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """(what keys.json says, the mapped tensors); both empty where there are none, or damaged ones, or of another form."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        if (about["format"], about["chunk"]) == (FORMAT, [CHUNK, OVERLAP]) and about["sha256"] == file_hash(folder / KEYS):
            return about, map_tensors(folder / KEYS)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # they are made again from the texts
    return {}, {}


def map_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """{name: memory-mapped array} of a safetensors file; its own NumPy reader copies."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    made = {}
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            made[name] = data[begin:end].view(_DTYPES[about["dtype"]]).reshape(about["shape"])
    return made


def _rows(vectors: Vectors) -> dict[bytes, np.ndarray]:
    """{sha256 of a text: its keys}."""
    ends = [*vectors.source_starts[1:].tolist(), len(vectors.keys)]
    starts = vectors.source_starts.tolist()
    hashes = [row.tobytes() for row in vectors.sources]
    return {h: vectors.keys[a:b] for h, a, b in zip(hashes, starts, ends, strict=True)}
