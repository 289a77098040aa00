"""The bank: a durable, namespaced collection of memories in one directory.

    bank.sqlite      the index: names, versions, ids, source texts, questions, records
    memories/<id>/   one folder per memory, in the format of `memory.files`; names of the same memory share it
    keys/            retrieval indices, one per namespace; made from the texts, thrown away with them
    tmp/             what is being written or removed right now

The index decides what exists. An added memory is written and fsynced under tmp/, renamed into memories/ and committed
while the index's write lock is held; a delete commits first and removes files afterwards. Renames into and out of
memories/ happen only under that lock, so writers in several processes cannot take each other's files. Killed at any
instant, the bank opens again with exactly the committed memories: opening clears away what dead processes left.

Nothing here imports JAX, and nothing but `list`, `names`, `texts`, `verify` and `sweep` grows with the bank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from memjax import ids
from memjax.bank import folders
from memjax.bank.index import INDEX as INDEX
from memjax.bank.index import Index
from memjax.errors import ArtefactError, BankError, BaseMismatchError, InputError
from memjax.memory.files import MANIFEST, Memory, check_folder

DEFAULT_NAMESPACE = "default"
_LONGEST_NAME = 200
_BATCH = 500  # folders moved out of the bank under one write lock

_ENTRIES = (
    "SELECT m.row, m.namespace, m.name, m.version, m.state, m.id, m.key, m.source, m.metadata, m.created_at, "
    "m.updated_at, m.expires_at, a.kind, a.base_id, a.bytes FROM memories m JOIN artefacts a ON a.id = m.id"
)
_LIVE = "(m.expires_at IS NULL OR m.expires_at > :now)"
_CURRENT = f"m.state = 'current' AND {_LIVE}"


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
    """A JSON value kept with the bank, such as a gate's calibration, and the bank's version at that time.

    stale: whether a memory that it may have seen was deleted since.
    """

    value: Any
    version: int
    stale: bool


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A namespace's texts at one instant: its version, until when nothing in it expires, and (memory id, text) pairs.

    The pairs come in order of memory id; an id comes more than once if its names keep different texts.
    """

    version: int
    valid_until: float | None
    texts: Iterator[tuple[str, str]]


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


def open_bank(
    path: str | Path,
    create: bool = False,
    base_id: str | None = None,
    base_name: str = "",
    clock: Callable[[], float] = time.time,
) -> Bank:
    """Open the bank at `path`, making it first if `create`, and clear away what crashed processes left in it.

    base_id: the base that will use it. A new bank is bound to it; a bank bound to another base is refused with a
    BaseMismatchError that names both. clock: seconds since 1970; expiry is judged by it. BankError if there is no bank,
    the path is something else, or the index is damaged.
    """
    index = Index(Path(path))
    bank = Bank(index, clock)
    try:
        with index.guard("open"):
            index.open(create)
            if base_id is not None:
                bank.bind_base(base_id, base_name)
            bank._clear_abandoned()
    except BaseException:
        bank.close()
        raise
    return bank


class Bank:
    """An open bank. Made by `open_bank`; safe to use from several threads, and beside other processes.

    What has expired is treated as absent; it is removed by `purge`, or when its name is used again. Every method raises
    BankError, in one line, for whatever the disk or the index refuses; then nothing has changed.
    """

    def __init__(self, index: Index, clock: Callable[[], float]) -> None:
        self.path = index.folder
        self._index = index
        self._clock = clock

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index. Other methods raise BankError afterwards; closing twice is fine."""
        self._index.close()

    # --------------------------------------------------------------------------------------------------------- reading

    def now(self) -> float:
        """Seconds since 1970 by the bank's clock, which expiry is judged by."""
        return self._clock()

    @property
    def version(self) -> int:
        """How often the bank's memories have changed, ever: it only grows."""
        return int(self._meta("version") or 0)

    @property
    def base_id(self) -> str | None:
        """The base that the bank's memories are for; None until it is bound to one."""
        return self._meta("base_id")

    @property
    def base_name(self) -> str:
        """The name under which that base was loaded when the bank was bound to it; empty if unknown."""
        return self._meta("base_name") or ""

    def namespace_version(self, namespace: str = DEFAULT_NAMESPACE) -> int:
        """The bank's version when this namespace last changed; 0 if it never did."""
        with self._index.guard("read"):
            row = self._index.one("SELECT version FROM namespaces WHERE name = ?", namespace)
            return row[0] if row else 0

    def folder(self, memory_id: str) -> Path:
        """Where the files of a memory are."""
        return self.path / "memories" / memory_id

    def find(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Entry | None:
        """The current memory of this name, or None."""
        return self._find("m.name = :value AND m.state = 'current'", namespace, name)

    def find_key(self, key: str, namespace: str = DEFAULT_NAMESPACE) -> Entry | None:
        """A memory with this key (`Meta.key`), or None: what to ask before writing, which may take minutes.

        A current one if there is one, else a past version of some name.
        """
        return self._find("m.key = :value", namespace, key)

    def find_id(self, memory_id: str, namespace: str = DEFAULT_NAMESPACE) -> Entry | None:
        """A name for the memory with this id, or None: turns a retrieved id into an entry. Current ones come first."""
        return self._find("m.id = :value", namespace, memory_id)

    def get(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """The current memory of this name; BankError with the nearest names if there is none."""
        return self.find(name, namespace) or self._unknown(name, namespace)

    def list(self, namespace: str | None = DEFAULT_NAMESPACE, limit: int | None = None, after: str = "") -> Sequence[Entry]:
        """Current memories in order of name; of all namespaces if None. `limit` and `after` (a name) page through."""
        where = "m.namespace = :namespace AND" if namespace is not None else ""
        rows = self._rows(
            f"{_ENTRIES} WHERE {where} m.name > :after AND {_CURRENT} ORDER BY m.namespace, m.name LIMIT :limit",
            namespace=namespace,
            after=after,
            limit=-1 if limit is None else limit,
        )
        return [_to_entry(row) for row in rows]

    def names(self, namespace: str = DEFAULT_NAMESPACE) -> Sequence[str]:
        """The names of current memories, sorted."""
        sql = f"SELECT m.name FROM memories m WHERE m.namespace = :namespace AND {_CURRENT} ORDER BY m.name"
        return [name for (name,) in self._rows(sql, namespace=namespace)]

    def namespaces(self) -> Sequence[str]:
        """The namespaces that hold current memories, sorted."""
        sql = f"SELECT 1 FROM memories m WHERE m.namespace = n.name AND {_CURRENT}"
        return [name for (name,) in self._rows(f"SELECT name FROM namespaces n WHERE EXISTS ({sql}) ORDER BY name")]

    def count(self, namespace: str | None = DEFAULT_NAMESPACE) -> int:
        """How many current memories there are; in all namespaces if None."""
        where = "m.namespace = :namespace AND" if namespace is not None else ""
        return self._rows(f"SELECT count(*) FROM memories m WHERE {where} {_CURRENT}", namespace=namespace)[0][0]

    def history(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Sequence[Entry]:
        """All versions of a name, oldest first, past ones included; BankError if the name is unknown."""
        sql = f"{_ENTRIES} WHERE m.namespace = :namespace AND m.name = :name AND {_LIVE} ORDER BY m.version"
        rows = self._rows(sql, namespace=namespace, name=name)
        return [_to_entry(row) for row in rows] or self._unknown(name, namespace)

    def text(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> str | None:
        """The source text kept for a memory; None if it has none (imported, merged)."""
        source = self.get(name, namespace).source_hash
        with self._index.guard("read"):
            row = self._index.one("SELECT text FROM sources WHERE hash = ?", source)
            return row[0] if row else None

    def questions(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Any:
        """The held-out questions kept for a memory, as the JSON value that was given; None if there are none."""
        row_number = self.get(name, namespace).row
        with self._index.guard("read"):
            row = self._index.one("SELECT body FROM questions WHERE row = ?", row_number)
            return json.loads(row[0]) if row else None

    def texts(self, namespace: str = DEFAULT_NAMESPACE) -> Sequence[tuple[str, str]]:
        """(memory id, source text) of the current memories that have one, in order of id."""
        with self.snapshot(namespace) as snapshot:
            return list(snapshot.texts)

    @contextlib.contextmanager
    def snapshot(self, namespace: str = DEFAULT_NAMESPACE) -> Iterator[Snapshot]:
        """A namespace's texts as of one instant, streamed; writers neither change it nor wait for it."""
        where = f"FROM memories m WHERE m.namespace = :namespace AND {_CURRENT}"
        values = {"namespace": namespace, "now": self._clock()}
        with self._index.guard("read"), contextlib.closing(self._index.connect()) as db:
            db.execute("BEGIN")
            row = db.execute("SELECT version FROM namespaces WHERE name = :namespace", values).fetchone()
            (valid_until,) = db.execute(f"SELECT min(m.expires_at) {where}", values).fetchone()
            texts = db.execute(
                f"SELECT p.id, s.text FROM (SELECT DISTINCT m.id, m.source {where}) p "
                "JOIN sources s ON s.hash = p.source ORDER BY p.id, p.source",
                values,
            )
            yield Snapshot(row[0] if row else 0, valid_until, texts)

    # -------------------------------------------------------------------------------------------------------- changing

    def add(
        self,
        name: str,
        key: str,
        write: Callable[[Path], Memory],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        text: str | None = None,
        questions: Any = None,
        metadata: Mapping[str, Any] | None = None,
        expires_at: float | None = None,
    ) -> Entry:
        """Keep a memory under a new name, all or nothing, and return its entry.

        key: `Meta.key` of the memory. If the namespace holds that key already, nothing is written: the entry is
        returned as it is if it has this name, else `name` becomes another pointer to the same memory.
        write(folder): writes the memory's files into a new folder and returns it, as `write_artefact` does.
        text: the source, kept for text retrieval; without it the memory is never retrieved by text. questions: held-out
        questions, any JSON value. metadata: the caller's own JSON object.
        BankError if the name is taken by another memory; BaseMismatchError if it is for another base than the bank.
        """
        row = self._new_row(name, namespace, key, text, questions, metadata, expires_at)
        return self._put(row, write, replace=False)

    def update(
        self,
        name: str,
        key: str,
        write: Callable[[Path], Memory],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        text: str | None = None,
        questions: Any = None,
        metadata: Mapping[str, Any] | None = None,
        expires_at: float | None = None,
    ) -> Entry:
        """Give a name a new version, keeping the old one for `rollback` and for whoever is reading it now.

        Arguments as for `add`. Metadata and expiry that are not given stay as they were. A key equal to the current one
        changes nothing. BankError if the name is unknown.
        """
        row = self._new_row(name, namespace, key, text, questions, metadata, expires_at)
        return self._put(row, write, replace=True)

    def rollback(self, name: str, version: int | None = None, namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """Make another version of a name current (by default the one before); nothing is removed.

        BankError, with the versions there are, if there is no such version.
        """
        with self._change() as db:
            history = self.history(name, namespace)
            current = next(entry.version for entry in history if entry.state == "current")
            fits = [e for e in history if (e.version < current if version is None else e.version == version)]
            if not fits:
                wanted = "no earlier version" if version is None else f"no version {version}"
                known = ", ".join(str(entry.version) for entry in history)
                raise BankError(f"memory {name!r} has {wanted}; its versions are {known}, and {current} is current")
            if fits[-1].version != current:
                db.execute("UPDATE memories SET state = 'past' WHERE namespace = ? AND name = ?", (namespace, name))
                chosen = (self._clock(), fits[-1].row)
                db.execute("UPDATE memories SET state = 'current', updated_at = ? WHERE row = ?", chosen)
                self._bump(db, {namespace})
            return self.get(name, namespace)

    def rename(self, name: str, new_name: str, namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """Move a name with all its versions; BankError if the new one is taken."""
        _check_name("name", new_name)
        with self._change() as db:
            self.get(name, namespace)
            if new_name != name:
                self._drop_expired(db, namespace, new_name)
                if taken := self.find(new_name, namespace):
                    raise _name_taken(taken)
                moved = (new_name, namespace, name)
                db.execute("UPDATE memories SET name = ? WHERE namespace = ? AND name = ?", moved)
                self._bump(db, {namespace})
            return self.get(new_name, namespace)

    def set_metadata(self, name: str, metadata: Mapping[str, Any], namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """Replace the caller's own JSON object of a memory's current version."""
        body = _to_json("metadata", dict(metadata))
        with self._change() as db:
            db.execute("UPDATE memories SET metadata = ? WHERE row = ?", (body, self.get(name, namespace).row))
            return self.get(name, namespace)

    def set_expiry(self, name: str, expires_at: float | None, namespace: str = DEFAULT_NAMESPACE) -> None:
        """Let a name, with all its versions, expire at this time; never if None."""
        with self._change() as db:
            self.get(name, namespace)
            values = (expires_at, namespace, name)
            db.execute("UPDATE memories SET expires_at = ? WHERE namespace = ? AND name = ?", values)
            self._bump(db, {namespace})

    def delete(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> tuple[str, ...]:
        """Forget a name: all its versions, texts, questions, and the files that no other name needs.

        Returns the ids that are gone from the bank, for whoever keeps caches or slots by id. Records that may have seen
        the namespace become stale. BankError if the name is unknown.
        """
        with self._change() as db:
            self.get(name, namespace)
            return self._drop(db, "namespace = ? AND name = ?", namespace, name)

    def delete_all(self, namespace: str = DEFAULT_NAMESPACE) -> tuple[str, ...]:
        """Forget everything in one namespace, its records too; other namespaces keep theirs. Returns the ids gone."""
        with self._change() as db:
            db.execute("DELETE FROM records WHERE namespace = ?", (namespace,))
            return self._drop(db, "namespace = ?", namespace)

    def reset(self) -> tuple[str, ...]:
        """Forget everything: all namespaces, the records, and the base it was bound to. Returns the ids gone."""
        with self._change() as db:
            gone = self._drop(db, "true")
            db.execute("DELETE FROM records")
            db.execute("DELETE FROM meta WHERE key IN ('base_id', 'base_name')")
            return gone

    def purge(self) -> tuple[str, ...]:
        """Remove what has expired. Returns the ids gone."""
        with self._change() as db:
            return self._drop(db, "expires_at <= ?", self._clock())

    def prune(self, name: str, keep: int = 0, namespace: str = DEFAULT_NAMESPACE) -> tuple[str, ...]:
        """Remove a name's past versions but for the newest `keep`. Returns the ids gone."""
        with self._change() as db:
            past = [entry.row for entry in self.history(name, namespace) if entry.state == "past"]
            doomed = past[: max(len(past) - keep, 0)]
            return self._drop(db, "row IN (SELECT value FROM json_each(?))", json.dumps(doomed))

    def bind_base(self, base_id: str, base_name: str = "") -> None:
        """Say which base the bank is for, once; BaseMismatchError naming both if it is for another."""
        with self._index.guard("change"):
            if self.base_id is None:
                with self._index.transaction() as db:
                    values = [("base_id", base_id), ("base_name", base_name)]
                    if self.base_id is None:  # nobody else was faster
                        db.executemany("INSERT INTO meta VALUES (?, ?)", values)
            if (own := self.base_id) != base_id:
                raise BaseMismatchError(
                    f"bank {self.path} is for base {own}{_in_brackets(self.base_name)}, not for base {base_id}"
                    f"{_in_brackets(base_name)}; use that base with it, or another bank"
                )

    # --------------------------------------------------------------------------------------------------------- records

    def set_record(self, key: str, value: Any, namespace: str = "") -> None:
        """Keep a JSON value, stamped with the bank's version. Namespace "" is for what concerns the whole bank."""
        body = _to_json(f"record {key!r}", value)
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, 0)", (namespace, key, body, self.version))

    def record(self, key: str, namespace: str = "") -> Record | None:
        """The value kept under this key, or None. It is stale once a memory that it may have seen was deleted."""
        with self._index.guard("read"):
            sql = "SELECT value, version, stale FROM records WHERE namespace = ? AND key = ?"
            row = self._index.one(sql, namespace, key)
            return Record(json.loads(row[0]), row[1], bool(row[2])) if row else None

    def delete_record(self, key: str, namespace: str = "") -> None:
        """Forget a record; nothing happens if there is none."""
        with self._change() as db:
            db.execute("DELETE FROM records WHERE namespace = ? AND key = ?", (namespace, key))

    # -------------------------------------------------------------------------------------------------- retrieval keys

    def keys_folder(self, namespace: str = DEFAULT_NAMESPACE) -> Path:
        """Where the retrieval index of a namespace is, if it has been made."""
        return self.path / "keys" / ids.text_hash(namespace)[:32]

    def install_keys(self, version: int, write: Callable[[Path], None], namespace: str = DEFAULT_NAMESPACE) -> bool:
        """Keep a retrieval index made from the namespace at `version`; False if the namespace has changed since.

        write(folder) writes it into a new folder, which then takes the place of the old one.
        """
        with self._index.guard("write the retrieval keys of"), self._claim() as claim:
            new, place = claim.folder / "new", self.keys_folder(namespace)
            new.mkdir()
            write(new)
            folders.sync_tree(new)
            with self._index.transaction():
                if self.namespace_version(namespace) != version:
                    return False
                if place.exists():
                    os.rename(place, claim.spare())
                os.rename(new, place)
            return True

    # ----------------------------------------------------------------------------------------------------- maintenance

    def verify(self) -> Report:
        """Check every memory's files and texts by hash. Takes time in proportion to the bank; others may go on writing.

        Each problem is one line that names the memory and the file. Memories that are not named are whole.
        """
        with self._index.guard("verify"):
            lines = [line for (line,) in self._index.all("PRAGMA quick_check") if line != "ok"]
            problems = [f"{self._index.path} is damaged: {line}" for line in lines]
            artefacts = self._index.all("SELECT id, manifest FROM artefacts ORDER BY id")
            for memory_id, manifest in artefacts:
                found = self._check(memory_id, manifest)
                # What another process deleted meanwhile is no problem.
                if found and self._index.one("SELECT 1 FROM artefacts WHERE id = ?", memory_id):
                    problems += [f"{self._pointers(memory_id)}: {line}" for line in found]
            for (source,) in self._index.all("SELECT hash FROM sources ORDER BY hash"):
                row = self._index.one("SELECT text FROM sources WHERE hash = ?", source)
                if row and ids.text_hash(row[0]) != source:
                    problems.append(f"{self._index.path} is damaged: source text {source} is not what was added")
            orphans = [self.folder(name) for name in self._orphans()]
            return Report(len(artefacts), tuple(problems), tuple(str(folder) for folder in orphans))

    def sweep(self) -> tuple[str, ...]:
        """Remove whatever no name points to; returns the paths of folders removed. Safe while others write.

        Opening the bank does all that a crash can require. This also finds folders that something else put there, which
        takes time in proportion to the bank.
        """
        with self._index.guard("sweep"):
            self._clear_abandoned()
            with self._claim() as claim, self._index.transaction():
                orphans = self._orphans()
                for name in orphans:
                    os.rename(self.folder(name), claim.spare())
            return tuple(str(self.folder(name)) for name in orphans)

    def _check(self, memory_id: str, manifest: str) -> Sequence[str]:
        """What is wrong with a memory's files; `manifest` is the hash of memory.json when it was added."""
        folder = self.folder(memory_id)
        try:
            if problems := check_folder(folder):
                return problems
            if ids.file_hash(folder / MANIFEST) != manifest:
                return [f"{folder / MANIFEST} is damaged: its bytes are not those that were written"]
        except OSError as error:
            return [f"{error.filename or folder} cannot be read: {error.strerror or error}"]
        return []

    def _orphans(self) -> Sequence[str]:
        """Names under memories/ that the index does not know, sorted."""
        present = sorted(os.listdir(self.path / "memories"))
        return [name for name in present if not self._index.one("SELECT 1 FROM artefacts WHERE id = ?", name)]

    # ------------------------------------------------------------------------------------- adding, from start to finish

    def _new_row(
        self,
        name: str,
        namespace: str,
        key: str,
        text: str | None,
        questions: Any,
        metadata: Mapping[str, Any] | None,
        expires_at: float | None,
    ) -> dict[str, Any]:
        """The values of a row to be, checked; the id and version come later."""
        _check_name("name", name)
        _check_name("namespace", namespace)
        return {
            "name": name,
            "namespace": namespace,
            "key": key,
            "text": text,
            "source": None if text is None else ids.text_hash(text),
            "questions": None if questions is None else _to_json("questions", questions),
            "metadata": None if metadata is None else _to_json("metadata", dict(metadata)),
            "expires_at": expires_at,
            "now": self._clock(),
        }

    def _put(self, row: Mapping[str, Any], write: Callable[[Path], Memory], replace: bool) -> Entry:
        """Add or update: write the memory unless the namespace holds its key already, then point the name at it."""
        with self._change() as db:
            if entry := self._point(db, row, replace):
                return entry
        with self._index.guard("write to"), self._claim() as claim:
            new = claim.folder / "new"
            new.mkdir()
            memory = write(new)
            if memory.key != row["key"]:
                raise ArtefactError(f"memory {row['name']!r} was to have key {row['key']} but has {memory.key}")
            size = folders.sync_tree(new)
            manifest = ids.file_hash(new / MANIFEST)
            with self._change() as db:
                if entry := self._point(db, row, replace):  # another process was faster
                    return entry
                self.bind_base(memory.provenance["base_id"], memory.provenance["base_name"])
                if not self._index.one("SELECT 1 FROM artefacts WHERE id = ?", memory.id):
                    values = (memory.id, memory.kind, memory.provenance["base_id"], manifest, size)
                    db.execute("INSERT INTO artefacts VALUES (?, ?, ?, ?, ?)", values)
                    db.execute("DELETE FROM trash WHERE id = ?", (memory.id,))
                    self._publish(claim, memory.id)
                return self._insert(db, {**row, "id": memory.id}, replace)

    def _point(self, db: sqlite3.Connection, row: Mapping[str, Any], replace: bool) -> Entry | None:
        """The entry that answers an add or update without writing a memory, or None if one must be written."""
        name, namespace = row["name"], row["namespace"]
        self._drop_expired(db, namespace, name)
        taken = self.find(name, namespace)
        if replace and not taken:
            self._unknown(name, namespace)
        if taken and taken.key == row["key"]:
            return taken
        if taken and not replace:
            raise _name_taken(taken)
        same = self.find_key(row["key"], namespace)
        if same is None:
            return None
        return self._insert(db, {**row, "id": same.id, "source": row["source"] or same.source_hash}, replace)

    def _publish(self, claim: folders.Claim, memory_id: str) -> None:
        """Move a written memory to its place, inside the transaction that makes it exist."""
        place = self.folder(memory_id)
        claim.intend(memory_id)
        if place.exists():  # the index does not know it: left by a process that died before it could commit
            os.rename(place, claim.spare())
        os.rename(claim.folder / "new", place)
        folders.sync_folder(place.parent)

    def _insert(self, db: sqlite3.Connection, row: Mapping[str, Any], replace: bool) -> Entry:
        """Point the name at `row["id"]` as its next version, inside a transaction."""
        name, namespace = row["name"], row["namespace"]
        values = {**row, "version": 1, "metadata": row["metadata"] or "{}"}
        if replace:
            old = self.get(name, namespace)
            values["version"] = self.history(name, namespace)[-1].version + 1
            values["metadata"] = row["metadata"] or _to_json("metadata", old.metadata)
            values["expires_at"] = old.expires_at if row["expires_at"] is None else row["expires_at"]
            where = "WHERE namespace = :namespace AND name = :name"
            db.execute(f"UPDATE memories SET state = 'past', expires_at = :expires_at {where}", values)
        if row["text"] is not None:
            db.execute("INSERT OR IGNORE INTO sources VALUES (:source, :text)", values)
        inserted = db.execute(
            "INSERT INTO memories (namespace, name, version, state, id, key, source, metadata, created_at, updated_at, "
            "expires_at) VALUES (:namespace, :name, :version, 'current', :id, :key, :source, :metadata, :now, :now, "
            ":expires_at)",
            values,
        )
        if row["questions"] is not None:
            db.execute("INSERT INTO questions VALUES (?, ?)", (inserted.lastrowid, row["questions"]))
        self._bump(db, {namespace})
        return _to_entry(db.execute(f"{_ENTRIES} WHERE m.row = ?", (inserted.lastrowid,)).fetchone())

    # ----------------------------------------------------------------------------------- deleting, from start to finish

    def _drop(self, db: sqlite3.Connection, where: str, *values: Any) -> tuple[str, ...]:
        """Delete the rows of `memories` that match, and what only they needed; returns the ids nothing points to now.

        Files and retrieval keys are put in the trash, which is emptied after the commit.
        """
        doomed = db.execute(f"SELECT row, namespace, id, source FROM memories WHERE {where}", values).fetchall()
        if not doomed:
            return ()
        db.executemany("DELETE FROM memories WHERE row = ?", [(row,) for row, *_ in doomed])
        gone = [value for value in sorted({row[2] for row in doomed}) if not _needed(db, "id", value)]
        db.executemany("DELETE FROM artefacts WHERE id = ?", [(value,) for value in gone])
        sources = [value for value in sorted({row[3] for row in doomed if row[3]}) if not _needed(db, "source", value)]
        db.executemany("DELETE FROM sources WHERE hash = ?", [(value,) for value in sources])
        namespaces = {row[1] for row in doomed}
        for namespace in namespaces:
            db.execute("UPDATE records SET stale = 1 WHERE namespace IN ('', ?)", (namespace,))
        trash = [*gone, *(f"keys/{self.keys_folder(namespace).name}" for namespace in namespaces)]
        db.executemany("INSERT OR IGNORE INTO trash VALUES (?)", [(name,) for name in trash])
        self._bump(db, namespaces)
        return tuple(gone)

    def _drop_expired(self, db: sqlite3.Connection, namespace: str, name: str) -> None:
        """Free a name that has expired, inside a transaction."""
        self._drop(db, "namespace = ? AND name = ? AND expires_at <= ?", namespace, name, self._clock())

    def _empty_trash(self) -> None:
        """Remove the files of committed deletes.

        Under the write lock, whatever is in the trash is dead: a memory that is added again leaves the trash.
        """
        while self._index.one("SELECT 1 FROM trash LIMIT 1"):
            with self._claim() as claim, self._index.transaction() as db:
                names = db.execute("SELECT id FROM trash LIMIT ?", (_BATCH,)).fetchall()
                for (name,) in names:
                    place = self.path / name if name.startswith("keys/") else self.folder(name)
                    if place.exists():
                        os.rename(place, claim.spare())
                folders.sync_folder(self.path / "memories")
                db.executemany("DELETE FROM trash WHERE id = ?", names)
        self._index.truncate_log()

    # --------------------------------------------------------------------------------------------------------- helpers

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, and then the removal of the files of what it deleted."""
        with self._index.guard("change"):
            nested = self._index.db.in_transaction
            with self._index.transaction() as db:
                yield db
            if not nested and self._index.one("SELECT 1 FROM trash LIMIT 1"):
                # The change is made. Files that cannot be removed now stay in the trash; the next opening tries again.
                with contextlib.suppress(OSError, sqlite3.Error):
                    self._empty_trash()

    @contextlib.contextmanager
    def _claim(self) -> Iterator[folders.Claim]:
        """A temporary folder of this process, settled and removed at the end, whatever happens."""
        claim = folders.claim(self.path / "tmp")
        try:
            yield claim
        except BaseException:
            self._settle(claim)
            raise
        claim.release()

    def _settle(self, claim: folders.Claim) -> None:
        """Take back what an unfinished claim published without committing, then release it."""
        try:
            if memory_id := claim.intent:
                with self._index.transaction() as db:
                    place = self.folder(memory_id)
                    committed = db.execute("SELECT 1 FROM artefacts WHERE id = ?", (memory_id,)).fetchone()
                    if not committed and place.exists():
                        claim.folder.mkdir(exist_ok=True)
                        os.rename(place, claim.spare())
        except (sqlite3.Error, OSError):
            claim.abandon()  # whoever opens the bank next tries again
        else:
            claim.release()

    def _clear_abandoned(self) -> None:
        """Finish what dead processes left: their temporary folders, half-published memories and committed deletes."""
        for claim in folders.abandoned(self.path / "tmp"):
            self._settle(claim)
        self._empty_trash()

    def _meta(self, key: str) -> str | None:
        with self._index.guard("read"):
            row = self._index.one("SELECT value FROM meta WHERE key = ?", key)
            return row[0] if row else None

    def _rows(self, sql: str, **values: Any) -> Sequence[Any]:
        with self._index.guard("read"):
            return self._index.all(sql, {**values, "now": self._clock()})

    def _find(self, where: str, namespace: str, value: str) -> Entry | None:
        """The first live entry of a namespace that matches, current ones before past ones, older before newer."""
        sql = f"{_ENTRIES} WHERE m.namespace = :namespace AND {where} AND {_LIVE} ORDER BY m.state, m.row LIMIT 1"
        rows = self._rows(sql, namespace=namespace, value=value)
        return _to_entry(rows[0]) if rows else None

    def _bump(self, db: sqlite3.Connection, namespaces: set[str]) -> None:
        """Advance the bank's version, and give it to the namespaces that changed."""
        db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'version'")
        version = self.version
        db.executemany("INSERT OR REPLACE INTO namespaces VALUES (?, ?)", [(name, version) for name in namespaces])

    def _unknown(self, name: str, namespace: str) -> NoReturn:
        """Raise the error for a name that is not there, with the nearest ones that are."""
        near = difflib.get_close_matches(name, [entry.name for entry in self.list(namespace, limit=1000)], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`memjax bank list` shows what there is"
        space = "" if namespace == DEFAULT_NAMESPACE else f" in namespace {namespace!r}"
        raise BankError(f"bank {self.path} has no memory named {name!r}{space}; {hint}")

    def _pointers(self, memory_id: str) -> str:
        """Which names a memory has, for a message."""
        sql = "SELECT DISTINCT namespace, name FROM memories WHERE id = ? ORDER BY namespace, name"
        rows = self._index.all(sql, (memory_id,))
        return "memory " + ", ".join(repr(name if s == DEFAULT_NAMESPACE else f"{s}/{name}") for s, name in rows)


def _needed(db: sqlite3.Connection, column: str, value: str) -> bool:
    """Whether any row of `memories` still points to an artefact or source."""
    return db.execute(f"SELECT 1 FROM memories WHERE {column} = ? LIMIT 1", (value,)).fetchone() is not None


def _to_entry(row: Sequence[Any]) -> Entry:
    """An Entry from a row of `_ENTRIES`."""
    number, namespace, name, version, state, memory_id, key, source, metadata, created, updated, expires, *about = row
    kind, base_id, size = about
    times = (created, updated, expires)
    where = (namespace, name, version, state)
    return Entry(*where, memory_id, key, kind, base_id, source, json.loads(metadata), *times, size, number)


def _to_json(what: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=ids.plain_scalar)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be plain, finite JSON: {error}") from None


def _check_name(what: str, name: str) -> None:
    """InputError for a name that could not be shown on one line or typed again."""
    if not name or name != name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise InputError(f"{name[:80]!r} cannot be a {what}: use 1 to {_LONGEST_NAME} printable characters, trimmed")


def _name_taken(entry: Entry) -> BankError:
    return BankError(f"the name {entry.name!r} is taken by memory {entry.id[:12]}; choose another, update or delete it")


def _in_brackets(name: str) -> str:
    return f" ({name})" if name else ""
