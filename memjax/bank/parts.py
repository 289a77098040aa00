"""An index of a namespace in parts: a memory is in the one that its id begins like, so a change makes one part anew.

Words (`retrieve`) and vectors are such indices. They lie side by side, memory-mapped, each with a JSON file that tells
which state of the namespace it was made from and how its parts hash. Parts that are damaged, or hold what they should not,
are made again; the others stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from memjax.bank.keys import INDICES, about_file, index_of, part_file, part_of
from memjax.bank.store import Bank
from memjax.errors import BankError
from memjax.ids import file_hash, text_hash

PART = 16_384  # memories of a part, from which on there are sixteen times as many parts
_FEW = 32  # memories: as many passes over 100,000 scores take less time than one partition of them


class Part(Protocol):
    """ids [n] of the memories in it; holds: a digest of what it was made from; sha256: of its file, where it is in one."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def holds(self) -> str: ...
    @property
    def sha256(self) -> str: ...


P = TypeVar("P", bound=Part)


@dataclasses.dataclass(frozen=True)
class Kind(Generic[P]):
    """One of the indices `keys.INDICES`: its name, the version of its format, and how a part is read and written.

    load(path, holds, sha256): the part in a file, memory-mapped, whose hash was compared; save(part, path): the part with
    its sha256.
    """

    name: str
    format: int
    load: Callable[[Path, str, str], P]
    save: Callable[[P, Path], P]


class State(NamedTuple, Generic[P]):
    """The parts {beginning of ids: part}, in order, of a namespace at this version; see `store.Snapshot`."""

    parts: Mapping[str, P]
    version: int
    valid_until: float | None


class Share(NamedTuple, Generic[P]):
    """What belongs to a part: (memory id, hash of its text) rows, a digest of them, the old part if it holds just that."""

    rows: Sequence[tuple[str, str]]
    holds: str
    part: P | None


def shares(rows: Sequence[tuple[str, str]], old: Mapping[str, P], size: int = PART, maker: str = "") -> dict[str, Share[P]]:
    """{beginning: its share} of a snapshot's rows. maker: what else, beside the texts, decides what a part holds."""
    digits = part_digits(len(rows), max(map(len, old), default=None), size)
    made = {}
    for name, (group, holds) in _grouped(rows, digits, maker).items():
        known = old.get(name)
        made[name] = Share(group, holds, known if known is not None and known.holds == holds else None)
    return made


def _grouped(rows: Sequence[tuple[str, str]], digits: int, maker: str) -> dict[str, tuple[list[tuple[str, str]], str]]:
    """{beginning: (its rows, their digest)} where so many digits of an id tell its part."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for memory_id, source in rows:
        groups.setdefault(memory_id[:digits], []).append((memory_id, source))
    digest = lambda group: text_hash(maker + "".join(f"{memory_id} {source}\n" for memory_id, source in group))
    return {name: (group, digest(group)) for name, group in groups.items()}


def part_digits(count: int, held: int | None = None, size: int = PART) -> int:
    """How many hex digits of an id tell its part, for `count` memories; as `held` unless parts are then far from `size`."""
    if held is not None and size // 64 < count / 16**held <= 2 * size:
        return held
    digits = 0
    while count > size * 16**digits:
        digits += 1
    return digits


def all_ids(parts: Mapping[str, Part]) -> np.ndarray:
    """str [n]: the ids of all parts, one after the other."""
    return np.concatenate([part.ids for part in parts.values()] or [np.zeros(0, np.str_)])


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


# ------------------------------------------------------------------------------------------------------------- on disk


def find_parts(
    kind: Kind[P], bank: Bank, namespace: str, held: State[P] | None, maker: str = ""
) -> tuple[State[P] | None, dict[str, P]]:
    """(the index of a namespace as it is now, if it was made before, else None; all parts that there are of it).

    `held` is what a long-running process got before, and is looked at first.
    """
    version, now = bank.namespace_version(namespace), bank.now()
    fresh = lambda state: state.version == version and (state.valid_until is None or now < state.valid_until)
    if held is not None and fresh(held):
        return held, dict(held.parts)
    folder = bank.keys_folder(namespace)
    old = load_parts(kind, folder, maker)
    saved = whole(kind, folder, old, maker)
    return (saved if saved is not None and fresh(saved) else None), {**(held.parts if held else {}), **old}


def install_parts(
    kind: Kind[P], bank: Bank, namespace: str, state: State[P], rows: Sequence[tuple[str, str]], maker: str = ""
) -> None:
    """Keep an index made of a snapshot's rows for whoever asks next, beside what of the others is of these rows too.

    One that cannot be saved is used all the same.
    """
    folder = bank.keys_folder(namespace)

    def write(new: Path) -> None:
        save_parts(kind, state, new, folder, maker)
        for other in INDICES:
            if other != kind.name:
                _keep_other(other, rows, folder, new)

    with contextlib.suppress(BankError):
        bank.install_keys(state.version, write, namespace)


def _keep_other(index: str, rows: Sequence[tuple[str, str]], folder: Path, new: Path) -> None:
    """Hard-link another index's parts into a new folder, those that hold just these rows: the others would be made again,
    and may hold a memory that is being deleted at this moment."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        about = json.loads((folder / about_file(index)).read_text())
        held = _grouped(rows, max(map(len, about["parts"])), about["maker"])
        os.link(folder / about_file(index), new / about_file(index))
        for name, told in about["parts"].items():
            if name in held and told["holds"] == held[name][1]:
                os.link(folder / part_file(index, name), new / part_file(index, name))


def save_parts(kind: Kind[P], state: State[P], folder: Path, old: Path | None = None, maker: str = "") -> None:
    """Write an index into a new folder; parts whose file lies in the folder `old` unchanged are hard-linked."""
    about = {}
    for name, part in state.parts.items():
        path = folder / part_file(kind.name, name)
        if part.sha256 and old is not None:
            with contextlib.suppress(OSError):
                os.link(old / path.name, path)
        if not path.exists() or file_hash(path) != part.sha256:
            path.unlink(missing_ok=True)
            part = kind.save(part, path)
        about[name] = {"holds": part.holds, "sha256": part.sha256}
    told = {"format": kind.format, "maker": maker, "version": state.version, "valid_until": state.valid_until}
    (folder / about_file(kind.name)).write_text(json.dumps({**told, "parts": about}))


def load_parts(kind: Kind[P], folder: Path, maker: str = "") -> dict[str, P]:
    """The parts of an index in a folder that are there and whole."""
    parts = {}
    for name, told in _about(kind, folder, maker).get("parts", {}).items():
        path = folder / part_file(kind.name, name)
        # A tenth of a second for the words of 100,000 texts, against answers from damaged numbers.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if file_hash(path) == told["sha256"]:
                parts[name] = kind.load(path, told["holds"], told["sha256"])
    return parts


def whole(kind: Kind[P], folder: Path, parts: Mapping[str, P], maker: str = "") -> State[P] | None:
    """The index of the parts that were found in a folder, if they are all that it should hold, and there is no stranger."""
    about = _about(kind, folder, maker)
    try:
        own = {path.name for path in folder.iterdir() if index_of(path.name) in (None, kind.name)}
        expected = {about_file(kind.name), *(part_file(kind.name, name) for name in about["parts"])}
        if list(parts) != list(about["parts"]) or own != expected:
            return None
        return State(parts, int(about["version"]), about["valid_until"])
    except (OSError, KeyError, TypeError, ValueError):
        return None  # what is left of it is used, the rest made again from the texts


def _about(kind: Kind[Any], folder: Path, maker: str) -> dict[str, Any]:
    """What an index's file tells of it; nothing where it is damaged, of another format or maker."""
    try:
        about = json.loads((folder / about_file(kind.name)).read_text())
        named = isinstance(about["parts"], dict) and all(part_of(part_file(kind.name, name)) for name in about["parts"])
        return about if named and (about["format"], about["maker"]) == (kind.format, maker) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
