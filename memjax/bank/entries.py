"""What a bank tells about its memories: entries, records, snapshots, reports, and how rows of the index become them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from memjax import ids
from memjax.bank.index import PAD
from memjax.errors import BankError, InputError

_LONGEST_NAME = 200

ENTRIES = (
    "SELECT m.row, m.namespace, m.name, m.version, m.state, m.id, m.key, m.source, m.metadata, m.created_at, "
    "m.updated_at, m.expires_at, a.kind, a.base_id, a.bytes FROM memories m JOIN artefacts a ON a.id = m.id"
)
LIVE = "(m.expires_at IS NULL OR m.expires_at > :now)"
CURRENT = f"m.state = 'current' AND {LIVE}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One version of one name in one namespace: a pointer to the memory `id`. Times are seconds since 1970, UTC."""

    namespace: str
    name: str
    version: int
    state: str  # "current", or "past" when another version of the name is
    id: str
    key: str
    kind: str
    base_id: str
    source_hash: str | None  # of the text kept for retrieval, if there is one
    metadata: dict[str, Any]
    created_at: float
    updated_at: float  # when this version last became the current one
    expires_at: float | None  # of the name, all versions
    bytes: int
    row: int = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Record:
    """A JSON value kept with the bank, such as a gate's calibration, and the version of its namespace then.

    stale: whether a memory that it may have seen was deleted since.
    """

    value: Any
    version: int
    stale: bool


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A namespace's texts at one instant: its version, until when nothing in it expires, and which texts there are.

    rows: (memory id, hash of the text), in order of both; an id comes more than once if its names keep different texts.
    text(hash) reads one of them, for as long as the snapshot is open.
    """

    version: int
    valid_until: float | None
    rows: Sequence[tuple[str, str]]
    text: Callable[[str], str]

    @property
    def texts(self) -> Iterator[tuple[str, str]]:
        """(memory id, text) pairs in the order of the rows, read one by one."""
        return ((memory_id, self.text(source)) for memory_id, source in self.rows)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found: how many memories it checked, a line per problem, and folders that no name points to."""

    checked: int
    problems: tuple[str, ...]
    orphans: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every committed memory is whole; orphans take space but harm nothing."""
        return not self.problems


def to_entry(row: Sequence[Any]) -> Entry:
    """An Entry from a row of `ENTRIES`."""
    number, namespace, name, version, state, memory_id, key, source, metadata, created, updated, expires, *about = row
    kind, base_id, size = about
    times = (created, updated, expires)
    where = (namespace, name, version, state)
    return Entry(
        *where, memory_id, key, kind, base_id, source, json.loads(metadata.removeprefix(PAD)), *times, size, number
    )


def to_json(what: str, value: Any) -> str:
    """A value of the caller's as JSON; InputError, naming it, for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=ids.plain_scalar)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be plain, finite JSON: {error}") from None


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """The caller's own JSON object as it is stored; only one that holds something is padded."""
    return PAD + to_json("metadata", dict(metadata)) if metadata else "{}"


def new_row(
    name: str,
    namespace: str,
    key: str,
    text: str | None,
    questions: Any,
    metadata: Mapping[str, Any] | None,
    expires_at: float | None,
    now: float,
) -> dict[str, Any]:
    """The values of a row to be, checked; the id and version come later. InputError for what cannot be kept."""
    check_name("name", name)
    check_name("namespace", namespace)
    return {
        "name": name,
        "namespace": namespace,
        "key": key,
        "text": text,
        "source": None if text is None else ids.text_hash(text),
        "questions": None if questions is None else to_json("questions", questions),
        "metadata": None if metadata is None else metadata_json(metadata),
        "expires_at": expires_at,
        "now": now,
    }


def check_name(what: str, name: str) -> None:
    """InputError for a name that could not be shown on one line or typed again."""
    if not name or name != name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise InputError(f"{name[:80]!r} cannot be a {what}: use 1 to {_LONGEST_NAME} printable characters, trimmed")


def name_taken(entry: Entry) -> BankError:
    """The error for a name that stands for another memory."""
    return BankError(f"the name {entry.name!r} is taken by memory {entry.id[:12]}; choose another, update or delete it")
