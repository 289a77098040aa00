"""What changes in the index when a name gets a version, another one becomes current, or rows go: parts of a transaction.

Every function takes the connection of an open transaction (`index.transaction`) and leaves the commit to its caller.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memjax.bank.entries import ENTRIES, Entry, metadata_json, to_entry
from memjax.bank.index import PAD
from memjax.bank.keys import keys_path, trash_of
from memjax.errors import BankError

_MANY = 256  # memories that are deleted at once, above which their namespaces' indices are thrown away whole


def insert(db: sqlite3.Connection, row: Mapping[str, Any], history: Sequence[Entry]) -> Entry:
    """Point `row["name"]` at `row["id"]` as the version after `history`, or as its first if that is empty.

    Metadata and expiry that `row` does not give are those of the version that is current until now.
    """
    values = {**row, "version": 1, "metadata": row["metadata"] or "{}"}
    if history:
        old = next(entry for entry in history if entry.state == "current")
        values["version"] = history[-1].version + 1
        values["metadata"] = row["metadata"] or metadata_json(old.metadata)
        values["expires_at"] = old.expires_at if row["expires_at"] is None else row["expires_at"]
        where = "WHERE namespace = :namespace AND name = :name"
        db.execute(f"UPDATE memories SET state = 'past', expires_at = :expires_at {where}", values)
    if row["text"] is not None:
        db.execute("INSERT OR IGNORE INTO sources VALUES (:source, :text)", {**values, "text": PAD + row["text"]})
    inserted = db.execute(
        "INSERT INTO memories (namespace, name, version, state, id, key, source, metadata, created_at, updated_at, "
        "expires_at) VALUES (:namespace, :name, :version, 'current', :id, :key, :source, :metadata, :now, :now, "
        ":expires_at)",
        values,
    )
    if row["questions"] is not None:
        db.execute("INSERT INTO questions VALUES (?, ?)", (inserted.lastrowid, PAD + row["questions"]))
    bump(db, {row["namespace"]})
    return to_entry(db.execute(f"{ENTRIES} WHERE m.row = ?", (inserted.lastrowid,)).fetchone())


def make_current(db: sqlite3.Connection, history: Sequence[Entry], version: int | None, now: float) -> None:
    """Make another version of a name current (by default the one before); BankError if there is no such version."""
    name, namespace = history[0].name, history[0].namespace
    current = next(entry.version for entry in history if entry.state == "current")
    fits = [e for e in history if (e.version < current if version is None else e.version == version)]
    if not fits:
        wanted = "no earlier version" if version is None else f"no version {version}"
        known = ", ".join(str(entry.version) for entry in history)
        raise BankError(f"memory {name!r} has {wanted}; its versions are {known}, and {current} is current")
    if fits[-1].version != current:
        db.execute("UPDATE memories SET state = 'past' WHERE namespace = ? AND name = ?", (namespace, name))
        db.execute("UPDATE memories SET state = 'current', updated_at = ? WHERE row = ?", (now, fits[-1].row))
        bump(db, {namespace})


def drop(db: sqlite3.Connection, where: str, *values: Any) -> tuple[str, ...]:
    """Delete the rows of `memories` that match, and what only they needed; returns the ids their namespaces are rid of.

    What only they needed, in any namespace, is put in the trash, which is emptied after the commit, with what may hold
    them of the namespaces' retrieval indices. Records that may have seen the namespaces become stale. The ids do not tell
    whether another namespace still holds the same memory: nobody here is to know.
    """
    doomed = db.execute(f"SELECT row, namespace, id, source FROM memories WHERE {where}", values).fetchall()
    if not doomed:
        return ()
    db.executemany("DELETE FROM memories WHERE row = ?", [(row,) for row, *_ in doomed])
    held = "SELECT 1 FROM memories WHERE id = ? AND namespace = ? LIMIT 1"
    pairs = sorted({(row[2], row[1]) for row in doomed})
    rid = {memory_id for memory_id, namespace in pairs if not db.execute(held, (memory_id, namespace)).fetchone()}
    gone = [value for value in sorted(rid) if not _needed(db, "id", value)]
    db.executemany("DELETE FROM artefacts WHERE id = ?", [(value,) for value in gone])
    texts = sorted({(row[1], row[3]) for row in doomed if row[3]})
    unread = "NOT EXISTS (SELECT 1 FROM memories m WHERE m.namespace = keys.namespace AND m.source = keys.source)"
    db.executemany(f"DELETE FROM keys WHERE namespace = ? AND source = ? AND {unread}", texts)
    sources = [value for value in sorted({row[3] for row in doomed if row[3]}) if not _needed(db, "source", value)]
    db.executemany("DELETE FROM sources WHERE hash = ?", [(value,) for value in sources])
    namespaces = {row[1] for row in doomed}
    for namespace in namespaces:
        db.execute("UPDATE records SET stale = 1 WHERE namespace IN ('', ?)", (namespace,))
    trash = [*gone, *_index_trash(db, pairs, namespaces)]
    db.executemany("INSERT OR IGNORE INTO trash VALUES (?)", [(name,) for name in trash])
    bump(db, namespaces)
    return tuple(sorted(rid))


def bump(db: sqlite3.Connection, namespaces: Iterable[str]) -> None:
    """Advance the bank's version and those of the namespaces that changed; they count their own changes only."""
    db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'version'")
    advance = "INSERT INTO namespaces VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET version = version + 1"
    db.executemany(advance, [(name,) for name in namespaces])


def _index_trash(db: sqlite3.Connection, pairs: Sequence[tuple[str, str]], namespaces: Iterable[str]) -> list[str]:
    """What to remove of the retrieval indices that may hold these (memory id, namespace) pairs; see `keys.doomed`."""
    held = "SELECT 1 FROM memories WHERE namespace = ? LIMIT 1"
    whole = {n for n in namespaces if len(pairs) > _MANY or not db.execute(held, (n,)).fetchone()}
    return [*map(keys_path, whole), *(trash_of(n, memory_id) for memory_id, n in pairs if n not in whole)]


def _needed(db: sqlite3.Connection, column: str, value: str) -> bool:
    """Whether any row of `memories` still points to an artefact or source."""
    return db.execute(f"SELECT 1 FROM memories WHERE {column} = ? LIMIT 1", (value,)).fetchone() is not None
