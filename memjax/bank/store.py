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
import difflib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from memjax import ids
from memjax.bank import check, folders, publish, versions
from memjax.bank.entries import (
    CURRENT,
    ENTRIES,
    LIVE,
    Entry,
    Record,
    Report,
    Snapshot,
    check_name,
    metadata_json,
    name_taken,
    new_row,
    to_entry,
    to_json,
)
from memjax.bank.index import INDEX as INDEX
from memjax.bank.index import PAD, Index
from memjax.bank.keys import keys_path
from memjax.errors import ArtefactError, BankError, BaseMismatchError
from memjax.memory.files import MANIFEST, Memory

DEFAULT_NAMESPACE = "default"


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
        """How often this namespace has changed, ever: it only grows, and tells nothing of other namespaces."""
        with self._index.guard("read"):
            row = self._index.one("SELECT version FROM namespaces WHERE name = ?", namespace)
            return row[0] if row else 0

    def salt(self, namespace: str = DEFAULT_NAMESPACE) -> str:
        """32 random hex digits of a namespace, to be part of the key of every cache that outlives a request.

        Two namespaces that read the same prompt then never meet in a cache, not even in the time that it takes
        (arXiv 2603.10726). They change when the namespace is emptied by `delete_all` or `reset`.
        """
        key = f"salt {namespace}"
        if not self._meta(key):
            with self._change() as db:
                db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, secrets.token_hex(16)))
        return self._meta(key) or ""

    def folder(self, memory_id: str) -> Path:
        """Where the files of a memory are."""
        return publish.memory_folder(self.path, memory_id)

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
        values = {"after": after, "limit": -1 if limit is None else limit}
        tail = "ORDER BY m.namespace, m.name LIMIT :limit"
        rows = self._current(ENTRIES, "m.name > :after AND", tail, namespace, **values)
        return [to_entry(row) for row in rows]

    def names(self, namespace: str = DEFAULT_NAMESPACE) -> Sequence[str]:
        """The names of current memories, sorted."""
        rows = self._current("SELECT m.name FROM memories m", "", "ORDER BY m.name", namespace)
        return [name for (name,) in rows]

    def namespaces(self) -> Sequence[str]:
        """The namespaces that hold current memories, sorted."""
        sql = f"SELECT 1 FROM memories m WHERE m.namespace = n.name AND {CURRENT}"
        return [name for (name,) in self._rows(f"SELECT name FROM namespaces n WHERE EXISTS ({sql}) ORDER BY name")]

    def count(self, namespace: str | None = DEFAULT_NAMESPACE) -> int:
        """How many current memories there are; in all namespaces if None."""
        return self._current("SELECT count(*) FROM memories m", "", "", namespace)[0][0]

    def history(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Sequence[Entry]:
        """All versions of a name, oldest first, past ones included; BankError if the name is unknown."""
        sql = f"{ENTRIES} WHERE m.namespace = :namespace AND m.name = :name AND {LIVE} ORDER BY m.version"
        rows = self._rows(sql, namespace=namespace, name=name)
        return [to_entry(row) for row in rows] or self._unknown(name, namespace)

    def text(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> str | None:
        """The source text kept for a memory; None if it has none (imported, merged)."""
        source = self.get(name, namespace).source_hash
        with self._index.guard("read"):
            row = self._index.one("SELECT text FROM sources WHERE hash = ?", source)
            return row[0].removeprefix(PAD) if row else None

    def questions(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Any:
        """The held-out questions kept for a memory, as the JSON value that was given; None if there are none."""
        body = self._questions(self.get(name, namespace))
        return None if body is None else json.loads(body)

    def texts(self, namespace: str = DEFAULT_NAMESPACE) -> Sequence[tuple[str, str]]:
        """(memory id, source text) of the current memories that have one, in order of id."""
        with self.snapshot(namespace) as snapshot:
            return list(snapshot.texts)

    @contextlib.contextmanager
    def snapshot(self, namespace: str = DEFAULT_NAMESPACE) -> Iterator[Snapshot]:
        """A namespace's texts as of one instant, streamed; writers neither change it nor wait for it."""
        where = f"FROM memories m WHERE m.namespace = :namespace AND {CURRENT}"
        values = {"namespace": namespace, "now": self._clock()}
        with self._index.guard("read"), contextlib.closing(self._index.connect()) as db:
            db.execute("BEGIN")
            row = db.execute("SELECT version FROM namespaces WHERE name = :namespace", values).fetchone()
            (valid_until,) = db.execute(f"SELECT min(m.expires_at) {where} AND m.expires_at > :now", values).fetchone()
            rows = db.execute(
                f"SELECT DISTINCT m.id, m.source {where} AND m.source IS NOT NULL ORDER BY m.id, m.source", values
            ).fetchall()

            def text(source: str) -> str:
                return db.execute("SELECT text FROM sources WHERE hash = ?", (source,)).fetchone()[0].removeprefix(PAD)

            yield Snapshot(row[0] if row else 0, valid_until, rows, text)

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
        row = new_row(name, namespace, key, text, questions, metadata, expires_at, self._clock())
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
        row = new_row(name, namespace, key, text, questions, metadata, expires_at, self._clock())
        return self._put(row, write, replace=True)

    def rollback(self, name: str, version: int | None = None, namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """Make another version of a name current (by default the one before); nothing is removed.

        BankError, with the versions there are, if there is no such version.
        """
        with self._change() as db:
            versions.make_current(db, self.history(name, namespace), version, self._clock())
            return self.get(name, namespace)

    def rename(self, name: str, new_name: str, namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """Move a name with all its versions; BankError if the new one is taken."""
        check_name("name", new_name)
        with self._change() as db:
            self.get(name, namespace)
            if new_name != name:
                self._drop_expired(db, namespace, new_name)
                if taken := self.find(new_name, namespace):
                    raise name_taken(taken)
                moved = (new_name, namespace, name)
                db.execute("UPDATE memories SET name = ? WHERE namespace = ? AND name = ?", moved)
                versions.bump(db, {namespace})
            return self.get(new_name, namespace)

    def set_metadata(self, name: str, metadata: Mapping[str, Any], namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """Replace the caller's own JSON object of a memory's current version."""
        body = metadata_json(metadata)
        with self._change() as db:
            db.execute("UPDATE memories SET metadata = ? WHERE row = ?", (body, self.get(name, namespace).row))
            return self.get(name, namespace)

    def set_expiry(self, name: str, expires_at: float | None, namespace: str = DEFAULT_NAMESPACE) -> None:
        """Let a name, with all its versions, expire at this time; never if None."""
        with self._change() as db:
            self.get(name, namespace)
            values = (expires_at, namespace, name)
            db.execute("UPDATE memories SET expires_at = ? WHERE namespace = ? AND name = ?", values)
            versions.bump(db, {namespace})

    def delete(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> tuple[str, ...]:
        """Forget a name: all its versions, texts, questions, and the files that no other name needs.

        Returns the ids that the namespace is rid of, for whoever keeps caches or slots by id. Records that may have seen
        the namespace become stale. BankError if the name is unknown.
        """
        with self._change() as db:
            self.get(name, namespace)
            return versions.drop(db, "namespace = ? AND name = ?", namespace, name)

    def delete_all(self, namespace: str = DEFAULT_NAMESPACE) -> tuple[str, ...]:
        """Forget everything in one namespace, its records too; other namespaces keep theirs. Returns the ids gone."""
        with self._change() as db:
            db.execute("DELETE FROM records WHERE namespace = ?", (namespace,))
            db.execute("DELETE FROM meta WHERE key = ?", (f"salt {namespace}",))
            return versions.drop(db, "namespace = ?", namespace)

    def reset(self) -> tuple[str, ...]:
        """Forget everything: all namespaces, the records, and the base it was bound to. Returns the ids gone."""
        with self._change() as db:
            gone = versions.drop(db, "true")
            db.execute("DELETE FROM records")
            db.execute("DELETE FROM meta WHERE key IN ('base_id', 'base_name') OR key LIKE 'salt %'")
            return gone

    def purge(self) -> tuple[str, ...]:
        """Remove what has expired. Returns the ids gone."""
        with self._change() as db:
            return versions.drop(db, "expires_at <= ?", self._clock())

    def prune(self, name: str, keep: int = 0, namespace: str = DEFAULT_NAMESPACE) -> tuple[str, ...]:
        """Remove a name's past versions but for the newest `keep`. Returns the ids gone."""
        with self._change() as db:
            past = [entry.row for entry in self.history(name, namespace) if entry.state == "past"]
            doomed = past[: max(len(past) - keep, 0)]
            return versions.drop(db, "row IN (SELECT value FROM json_each(?))", json.dumps(doomed))

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
        """Keep a JSON value, stamped with its namespace's version. Namespace "" is for what concerns the whole bank."""
        body = to_json(f"record {key!r}", value)
        with self._change() as db:
            version = self.namespace_version(namespace) if namespace else self.version
            db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, 0)", (namespace, key, body, version))

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
        return self.path / keys_path(namespace)

    def keys(self, source: str, encoder: str, namespace: str = DEFAULT_NAMESPACE) -> bytes | None:
        """What `keep_keys` was given for a text of the namespace, or None."""
        sql = "SELECT rows FROM keys WHERE namespace = ? AND source = ? AND encoder = ?"
        with self._index.guard("read"):
            row = self._index.one(sql, namespace, source, encoder)
        return bytes(row[0])[len(PAD) :] if row else None

    def keep_keys(self, encoder: str, made: Mapping[str, bytes], namespace: str = DEFAULT_NAMESPACE) -> None:
        """Keep what an encoder made of texts, {`ids.text_hash`: bytes}, for as long as the namespace holds them.

        Each namespace has its own, even of equal texts: how fast one finds its keys tells nothing of another.
        """
        held = "SELECT 1 FROM memories WHERE namespace = ?1 AND source = ?2"
        sql = f"INSERT OR REPLACE INTO keys SELECT ?1, ?2, ?3, ?4 WHERE EXISTS ({held})"
        with self._index.guard("write the retrieval keys of"), self._index.transaction() as db:
            pad = PAD.encode()
            db.executemany(sql, ((namespace, source, encoder, pad + rows) for source, rows in made.items()))

    def install_keys(self, version: int, write: Callable[[Path], None], namespace: str = DEFAULT_NAMESPACE) -> bool:
        """Keep a retrieval index made from the namespace at `version`; False if the namespace has changed since.

        write(folder) writes it into a new folder, which then takes the place of the old one.
        """
        with self._index.guard("write the retrieval keys of"), publish.claim(self._index) as claim:
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
            return check.verify(self._index, DEFAULT_NAMESPACE)

    def sweep(self) -> tuple[str, ...]:
        """Remove whatever no name points to; returns the paths of folders removed. Safe while others write.

        Opening the bank does all that a crash can require. This also finds folders that something else put there, which
        takes time in proportion to the bank.
        """
        with self._index.guard("sweep"):
            self._clear_abandoned()
            return check.sweep(self._index)

    # ------------------------------------------------------------------------------------- adding, from start to finish

    def _put(self, row: Mapping[str, Any], write: Callable[[Path], Memory], replace: bool) -> Entry:
        """Add or update: write the memory unless the namespace holds its key already, then point the name at it."""
        with self._change() as db:
            if entry := self._point(db, row, replace):
                return entry
        with self._index.guard("write to"), publish.claim(self._index) as claim:
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
                    publish.publish(self.path, claim, memory.id)
                return versions.insert(db, {**row, "id": memory.id}, self._past(row, replace))

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
            raise name_taken(taken)
        same = self.find_key(row["key"], namespace)
        if same is None:
            return None
        row = {**row, "id": same.id, "source": row["source"] or same.source_hash}
        if replace and row["questions"] is None:  # a second name has none of its own, or they would count twice
            row["questions"] = self._questions(same)
        return versions.insert(db, row, self._past(row, replace))

    def _past(self, row: Mapping[str, Any], replace: bool) -> Sequence[Entry]:
        """The versions that a new row follows: those of its name where it replaces one, else none."""
        return self.history(row["name"], row["namespace"]) if replace else ()

    def _drop_expired(self, db: sqlite3.Connection, namespace: str, name: str) -> None:
        """Free a name that has expired, inside a transaction."""
        versions.drop(db, "namespace = ? AND name = ? AND expires_at <= ?", namespace, name, self._clock())

    def _empty_trash(self) -> None:
        publish.empty_trash(self._index)

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

    def _clear_abandoned(self) -> None:
        """Finish what dead processes left: their temporary folders, half-published memories and committed deletes."""
        publish.settle_abandoned(self._index)
        self._empty_trash()

    def _meta(self, key: str) -> str | None:
        with self._index.guard("read"):
            row = self._index.one("SELECT value FROM meta WHERE key = ?", key)
            return row[0] if row else None

    def _questions(self, entry: Entry) -> str | None:
        """The JSON of the questions kept for one version of a name."""
        with self._index.guard("read"):
            row = self._index.one("SELECT body FROM questions WHERE row = ?", entry.row)
            return row[0].removeprefix(PAD) if row else None

    def _rows(self, sql: str, **values: Any) -> Sequence[Any]:
        with self._index.guard("read"):
            return self._index.all(sql, {**values, "now": self._clock()})

    def _current(self, select: str, where: str, tail: str, namespace: str | None, **values: Any) -> Sequence[Any]:
        """Rows of the current memories of a namespace, or of all if None; `where` ends with AND."""
        where = f"{where} m.namespace = :namespace AND" if namespace is not None else where
        return self._rows(f"{select} WHERE {where} {CURRENT} {tail}", namespace=namespace, **values)

    def _find(self, where: str, namespace: str, value: str) -> Entry | None:
        """The first live entry of a namespace that matches, current ones before past ones, older before newer."""
        sql = f"{ENTRIES} WHERE m.namespace = :namespace AND {where} AND {LIVE} ORDER BY m.state, m.row LIMIT 1"
        rows = self._rows(sql, namespace=namespace, value=value)
        return to_entry(rows[0]) if rows else None

    def _unknown(self, name: str, namespace: str) -> NoReturn:
        """Raise the error for a name that is not there, with the nearest ones that are."""
        near = difflib.get_close_matches(name, [entry.name for entry in self.list(namespace, limit=1000)], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`memjax bank list` shows what there is"
        space = "" if namespace == DEFAULT_NAMESPACE else f" in namespace {namespace!r}"
        raise BankError(f"bank {self.path} has no memory named {name!r}{space}; {hint}")


def _in_brackets(name: str) -> str:
    return f" ({name})" if name else ""
