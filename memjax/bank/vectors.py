"""Retrieval by meaning: unit vectors of text chunks, searched exactly by one matrix product (see `neighbours` for many).

Each chunk of a text has one key; a memory scores as its best chunk does (max pooling). A text is encoded once: the bank
keeps its keys for as long as it keeps the text. What is searched is one safetensors file with the keys of a namespace,
beside its text index, memory-mapped, and written anew whenever the namespace has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from memjax.bank.keys import INDEX_FILE
from memjax.bank.neighbours import EXACT, GRAPH, build_graph, load_graph, near_scores, save_graph
from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.errors import BankError
from memjax.ids import file_hash, text_hash

if TYPE_CHECKING:
    from memjax.models.encoder import Encoder

FORMAT = 3
CHUNK = 90  # words of a chunk: what fits into the 128 tokens that sentence encoders are trained on
OVERLAP = 20  # words that a chunk shares with the one before
KEYS, ABOUT = "keys.safetensors", "keys.json"
FILES = (KEYS, ABOUT, GRAPH)
TEXT_ABOUT = INDEX_FILE  # what describes the text index beside the keys; see `retrieve`
_FEW = 32  # memories: as many passes over 100,000 scores take less time than one partition of them
# A word with the space after it; an ideograph is a word, and so is each piece of what has no spaces for long.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]\s*|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]{1,24}\s*"
)
_DTYPES = {"F32": np.float32, "I32": np.int32, "I64": np.int64, "U8": np.uint8, "U64": np.uint64}


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Keys of chunks, grouped by memory, with the encoder that made them.

    ids [n]; starts int64 [n], each memory's first key; keys float32 [m, width], unit rows. version and valid_until say
    which state of which namespace they were made from; see `store.Snapshot`. graph: `neighbours.build_graph` of the keys.
    """

    encoder: Encoder
    ids: np.ndarray
    starts: np.ndarray
    keys: np.ndarray
    version: int = 0
    valid_until: float | None = None
    graph: Any = None

    def scores(self, query: str) -> np.ndarray:
        """float32 [n]: the largest cosine of the query with a chunk of each memory (with a graph: see `near_scores`)."""
        from memjax.models.encoder import encode

        if not len(self.ids):
            return np.zeros(0, np.float32)
        wanted = encode(self.encoder, [query])[0]
        if self.graph is not None:
            return near_scores(self.graph, self.keys, self.starts, wanted)
        return np.maximum.reduceat(self.keys @ wanted, self.starts)

    def search(self, query: str, k: int, fill: bool = True) -> list[tuple[str, float]]:
        """The k memories nearest in meaning, as (id, cosine), best first; any text has some cosine, so `fill` is moot."""
        return top(self.ids, self.scores(query), k)


def top(ids: np.ndarray, scores: np.ndarray, k: int) -> list[tuple[str, float]]:
    """The k best of scores [n], as (id, score), best first; ties go to the first."""
    n = len(ids)
    k = min(k, n)
    if k < 1:
        return []
    if k <= _FEW:
        left, best = scores.copy(), np.zeros(k, np.int64)
        for place in range(k):
            best[place] = left.argmax()
            left[best[place]] = -np.inf
    else:
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


def build_vectors(texts: Iterable[str], ids: Iterable[str], encoder: Encoder) -> Vectors:
    """Keys of texts under their memories' ids; texts of one memory must follow each other and count as one."""
    return _build(zip(ids, texts, strict=True), encoder, {})[0]


def _build(
    pairs: Iterable[tuple[str, str]], encoder: Encoder, known: Mapping[str, np.ndarray]
) -> tuple[Vectors, dict[str, np.ndarray]]:
    """(keys of (id, text) pairs, those made anew: {`text_hash`: float32 [chunks, width]}); `known` are not encoded."""
    from memjax.models.encoder import encode

    owners: list[str] = []
    starts: list[int] = []
    parts: list[str] = []  # chunks to encode
    places: list[tuple[str, int, int]] = []  # (hash, first and end among those chunks) of each text that is encoded
    order: list[str] = []
    count = 0
    for owner, text in pairs:
        if not owners or owners[-1] != owner:
            owners.append(owner)
            starts.append(count)
        digest = text_hash(text)
        order.append(digest)
        if (rows := known.get(digest)) is not None:
            count += len(rows)
        else:
            first = len(parts)
            parts += chunks(text)
            places.append((digest, first, len(parts)))
            count += len(parts) - first
    if len(set(owners)) != len(owners):
        raise ValueError("texts of one memory must follow each other")
    encoded = encode(encoder, parts)
    made = {digest: encoded[first:end] for digest, first, end in places}
    each = [made[digest] if digest in made else known[digest] for digest in order]
    keys = np.concatenate([*each, np.zeros((0, encoder.width), np.float32)])
    return Vectors(encoder, np.array(owners, np.str_), np.array(starts, np.int64), keys), made


def open_vectors(
    bank: Bank, encoder: Encoder, namespace: str = DEFAULT_NAMESPACE, held: Vectors | None = None, exact: int = EXACT
) -> Vectors:
    """The keys of a namespace's texts as they are now, under this encoder.

    As `retrieve.open_index`: `held` if it still is, else what lies beside the bank, else made again from the keys that
    the bank keeps; only texts that it has none of are encoded. That happens outside the bank's snapshot, since it may
    take minutes.
    """
    version, now = bank.namespace_version(namespace), bank.now()
    folder = bank.keys_folder(namespace)
    for vectors in (held, load_vectors(folder, encoder)):
        same = vectors is not None and (vectors.encoder.id, vectors.version) == (encoder.id, version)
        if vectors is not None and same and (vectors.valid_until is None or now < vectors.valid_until):
            return vectors
    with bank.snapshot(namespace) as snapshot:
        pairs = list(snapshot.texts)
    texts = {text_hash(text) for _, text in pairs}
    known = {digest: rows for digest in texts if (rows := _kept(bank, digest, encoder, namespace)) is not None}
    vectors, made = _build(pairs, encoder, known)
    graph = build_graph(vectors.keys, exact)
    vectors = dataclasses.replace(vectors, version=snapshot.version, valid_until=snapshot.valid_until, graph=graph)

    def write(new: Path) -> None:
        save_vectors(vectors, new)
        names = [path.name for path in folder.iterdir() if path.name not in FILES] if folder.exists() else []
        keep_files(folder, new, TEXT_ABOUT, vectors.version, names)

    with contextlib.suppress(BankError):  # what cannot be saved is used all the same
        bank.keep_keys(_maker(encoder), {digest: rows.tobytes() for digest, rows in made.items()}, namespace)
        bank.install_keys(vectors.version, write, namespace)
    return vectors


def _maker(encoder: Encoder) -> str:
    """What keys are kept under: they depend on the encoder and on how texts are cut."""
    return f"{encoder.id} {CHUNK}-{OVERLAP}"


def _kept(bank: Bank, digest: str, encoder: Encoder, namespace: str) -> np.ndarray | None:
    """The keys float32 [chunks, width] that the bank keeps of a text; None where there are none, or damaged ones."""
    data = bank.keys(digest, _maker(encoder), namespace)
    if not data or len(data) % (4 * encoder.width):
        return None
    rows = np.frombuffer(data, np.float32).reshape(-1, encoder.width)
    lengths = np.einsum("ij,ij->i", rows, rows)
    return rows if np.all((np.abs(lengths - 1) < 1e-3) | (lengths == 0)) else None


def keep_files(old: Path, new: Path, about: str, version: int, names: Sequence[str]) -> None:
    """Hard-link files of the folder `old` into `new` where its file `about` says that they are of this version."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if json.loads((old / about).read_text())["version"] == version:
            for name in names:
                os.link(old / name, new / name)


def save_vectors(vectors: Vectors, folder: Path) -> None:
    """Write keys.safetensors, keys.json and, if there is one, the graph into a folder."""
    tensors = {"keys": vectors.keys, "ids": id_bytes(vectors.ids), "starts": vectors.starts}
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / KEYS)
    if vectors.graph is not None:
        save_graph(vectors.graph, folder)
    about = {
        "format": FORMAT,
        "graph": vectors.graph is not None and file_hash(folder / GRAPH),
        "encoder": vectors.encoder.id,
        "chunk": [CHUNK, OVERLAP],
        "version": vectors.version,
        "valid_until": vectors.valid_until,
        "sha256": file_hash(folder / KEYS),
    }
    (folder / ABOUT).write_text(json.dumps(about))


def id_bytes(ids: np.ndarray) -> np.ndarray:
    """uint8 [n, width]: strings as a tensor file holds them."""
    width = max((len(i.encode()) for i in map(str, ids)), default=1)
    names = np.frombuffer(b"".join(str(i).encode().ljust(width, b"\0") for i in ids), np.uint8)
    return names.reshape(len(ids), width)


def id_strings(names: np.ndarray) -> np.ndarray:
    """str [n] from what `id_bytes` made."""
    names = np.ascontiguousarray(names)
    return np.char.decode(names.view(f"S{names.shape[1]}")[:, 0], "utf-8")


def load_vectors(folder: Path, encoder: Encoder) -> Vectors | None:
    """The vectors saved in a folder, keys memory-mapped; None if there are none, or damaged ones, or another encoder's."""
    about, mapped = _read(folder)
    if about.get("encoder") != encoder.id:
        return None
    graph = load_graph(folder, len(mapped["keys"])) if about["graph"] else None
    return Vectors(
        encoder, id_strings(mapped["ids"]), mapped["starts"], mapped["keys"], about["version"], about["valid_until"], graph
    )


def _read(folder: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """(what keys.json says, the mapped tensors); both empty where there are none, or damaged ones, or of another form."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        same = (about["format"], about["chunk"]) == (FORMAT, [CHUNK, OVERLAP]) and about["sha256"] == file_hash(
            folder / KEYS
        )
        if same and (not about["graph"] or about["graph"] == file_hash(folder / GRAPH)):
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
