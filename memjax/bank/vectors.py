"""Retrieval by meaning: unit vectors of text chunks, searched exactly by matrix products (see `neighbours` for many).

Each chunk of a text has one key; a memory scores as its best chunk does (max pooling). A text is encoded once: the bank
keeps its keys for as long as it keeps the text. What is searched lies in parts (`parts`) beside the bank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memjax.bank.mapped import id_bytes, id_strings, map_tensors, save_tensors
from memjax.bank.neighbours import EXACT, build_graph, graph_bytes, load_graph, near_scores
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
from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.errors import BankError
from memjax.ids import text_hash

if TYPE_CHECKING:
    from memjax.models.encoder import Encoder

CHUNK = 90  # words of a chunk: what fits into the 128 tokens that sentence encoders are trained on
OVERLAP = 20  # words that a chunk shares with the one before
# A word with the space after it; an ideograph is a word, and so is each piece of what has no spaces for long.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]\s*|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]{1,24}\s*"
)


@dataclasses.dataclass(frozen=True)
class KeyPart:
    """The keys of some memories' chunks.

    ids [n]; starts int64 [n], each memory's first key; keys float32 [m, width], unit rows; graph: `neighbours.build_graph`
    of the keys, where there are very many in all; holds, sha256: see `parts.Part`.
    """

    ids: np.ndarray
    starts: np.ndarray
    keys: np.ndarray
    graph: Any = None
    holds: str = ""
    sha256: str = ""

    def scores(self, wanted: np.ndarray) -> np.ndarray:
        """float32 [n]: the largest cosine of a unit vector [width] with a key of each memory."""
        if self.graph is not None:
            return near_scores(self.graph, self.keys, self.starts, wanted)
        return np.maximum.reduceat(self.keys @ wanted, self.starts)


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Keys of chunks in parts {what the memories' ids begin with: part}, with the encoder that made them.

    The rest as in `parts.State`.
    """

    encoder: Encoder
    parts: Mapping[str, KeyPart]
    version: int = 0
    valid_until: float | None = None

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """str [n], those of all parts, one after the other."""
        return all_ids(self.parts)

    @property
    def state(self) -> State[KeyPart]:
        """The parts, and what they were made from."""
        return State(self.parts, self.version, self.valid_until)

    def scores(self, query: str) -> np.ndarray:
        """float32 [n]: the largest cosine of the query with a chunk of each memory (with a graph: see `near_scores`)."""
        from memjax.models.encoder import encode

        if not len(self.ids):
            return np.zeros(0, np.float32)
        wanted = encode(self.encoder, [query])[0]
        return np.concatenate([part.scores(wanted) for part in self.parts.values()])

    def search(self, query: str, k: int, fill: bool = True) -> list[tuple[str, float]]:
        """The k memories nearest in meaning, as (id, cosine), best first; any text has some cosine, so `fill` is moot."""
        return top(self.ids, self.scores(query), k)


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
    pairs = [(memory_id, text_hash(text), text) for memory_id, text in zip(ids, texts, strict=True)]
    keys = encode_texts({source: text for _, source, text in pairs}, encoder)
    rows = [(memory_id, source) for memory_id, source, _ in pairs]
    return Vectors(encoder, {"": build_keys(rows, keys, encoder.width)} if rows else {})


def encode_texts(texts: Mapping[str, str], encoder: Encoder) -> dict[str, np.ndarray]:
    """{hash: float32 [chunks, width]} of texts {hash: text}, all encoded together."""
    from memjax.models.encoder import encode

    pieces = {source: chunks(text) for source, text in texts.items()}
    encoded = encode(encoder, [piece for each in pieces.values() for piece in each])
    ends = np.cumsum([len(each) for each in pieces.values()])
    return dict(zip(pieces, np.split(encoded, ends[:-1]), strict=True)) if pieces else {}


def build_keys(rows: Sequence[tuple[str, str]], keys: Mapping[str, np.ndarray], width: int, holds: str = "") -> KeyPart:
    """The part of (memory id, hash of a text) rows, from the keys of these texts; rows of one memory follow each other."""
    owners: list[str] = []
    starts: list[int] = []
    count = 0
    for owner, source in rows:
        if not owners or owners[-1] != owner:
            owners.append(owner)
            starts.append(count)
        count += len(keys[source])
    if len(set(owners)) != len(owners):
        raise ValueError("texts of one memory must follow each other")
    each = [keys[source] for _, source in rows]
    return KeyPart(
        np.array(owners, np.str_),
        np.array(starts, np.int64),
        np.concatenate([*each, np.zeros((0, width), np.float32)]),
        holds=holds,
    )


def open_vectors(
    bank: Bank,
    encoder: Encoder,
    namespace: str = DEFAULT_NAMESPACE,
    held: Vectors | None = None,
    exact: int = EXACT,
    part: int = PART,
) -> Vectors:
    """The keys of a namespace's texts as they are now, under this encoder.

    As `retrieve.open_index`: `held` if it still is, else what lies beside the bank, else parts made anew from the keys that
    the bank keeps; only texts that it has none of are encoded. That happens outside the bank's snapshot, since it may
    take minutes. More than `exact` keys in all are searched through graphs.
    """
    maker = _maker(encoder)
    mine = held is not None and held.encoder.id == encoder.id
    now, old = find_parts(VECTORS, bank, namespace, held.state if held and mine else None, maker)
    if held is not None and now is not None and now.parts is held.parts:
        return held
    if now is None:
        with bank.snapshot(namespace) as snapshot:
            wanted = shares(snapshot.rows, old, part, maker)
            sources = dict.fromkeys(source for share in wanted.values() if share.part is None for _, source in share.rows)
            known = {s: rows for s in sources if (rows := _kept(bank, s, encoder, namespace)) is not None}
            texts = {source: snapshot.text(source) for source in sources if source not in known}
        made = encode_texts(texts, encoder)
        keys = {**known, **made}
        parts = {n: s.part or build_keys(s.rows, keys, encoder.width, s.holds) for n, s in wanted.items()}
        now = State(_with_graphs(parts, exact), snapshot.version, snapshot.valid_until)
        with contextlib.suppress(BankError):  # what cannot be kept is used all the same
            bank.keep_keys(maker, {source: rows.tobytes() for source, rows in made.items()}, namespace)
        install_parts(VECTORS, bank, namespace, now, snapshot.rows, maker)
    return Vectors(encoder, *now)


def _with_graphs(parts: Mapping[str, KeyPart], exact: int) -> dict[str, KeyPart]:
    """The parts, each with a graph if all hold more than `exact` keys together."""
    if sum(len(part.keys) for part in parts.values()) <= exact:
        return dict(parts)
    made = {}
    for name, part in parts.items():
        graph = build_graph(part.keys) if part.graph is None else None
        made[name] = part if graph is None else dataclasses.replace(part, graph=graph, sha256="")
    return made


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


def save_keys(part: KeyPart, path: Path) -> KeyPart:
    """Write a part as one safetensors file; the part with the file's hash."""
    arrays = {"keys": part.keys, "ids": id_bytes(part.ids), "starts": part.starts}
    if part.graph is not None:
        arrays["graph"] = graph_bytes(part.graph)
    return dataclasses.replace(part, sha256=save_tensors(path, arrays))


def load_keys(path: Path, holds: str, sha256: str) -> KeyPart:
    """The part in a file, memory-mapped; the caller has compared its hash."""
    found = map_tensors(path)
    graph = load_graph(found["graph"], len(found["keys"])) if "graph" in found else None
    return KeyPart(id_strings(found["ids"]), found["starts"], found["keys"], graph, holds, sha256)


VECTORS = Kind("vectors", 4, load_keys, save_keys)


def save_vectors(vectors: Vectors, folder: Path) -> None:
    """Write keys into an empty folder: a safetensors file for each part, and JSON about them."""
    save_parts(VECTORS, vectors.state, folder, maker=_maker(vectors.encoder))


def load_vectors(folder: Path, encoder: Encoder) -> Vectors | None:
    """The vectors saved in a folder, keys memory-mapped; None if there are none, or damaged ones, or another encoder's."""
    maker = _maker(encoder)
    state = whole(VECTORS, folder, load_parts(VECTORS, folder, maker), maker)
    return None if state is None else Vectors(encoder, *state)
