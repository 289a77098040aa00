"""The bank's SQLite index: its tables, its transactions, and its errors in one line.

Write-ahead logging lets readers and one writer work at once in any number of processes; full synchronisation makes a
commit survive a power cut; secure delete overwrites what is deleted. That misses the copies that SQLite leaves behind
when it moves a row between pages of a table. So texts, questions, metadata and keys begin with PAD, which is longer than
the part of a row that can be moved: what follows is on pages of its own, and those are overwritten for certain. Only
names, ids and times may leave such copies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memjax.bank.folders import sync_folder
from memjax.errors import BankError

FORMAT = 2
INDEX = "bank.sqlite"
LOCK = "bank.lock"
FOLDERS = ("memories", "keys", "tmp")
_BUSY_SECONDS = 60
_PAGE = 1024  # bytes; of a longer row, at most page - 35 bytes are kept in the table and the rest on pages of its own
PAD = "\0" * _PAGE

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE namespaces (name TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE artefacts (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, base_id TEXT NOT NULL, manifest TEXT NOT NULL, bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE sources (hash TEXT PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE memories (
  row INTEGER PRIMARY KEY,
  namespace TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('current', 'past')),
  id TEXT NOT NULL REFERENCES artefacts (id), key TEXT NOT NULL, source TEXT REFERENCES sources (hash),
  metadata TEXT NOT NULL, created_at REAL NOT NULL, updated_at REAL NOT NULL, expires_at REAL,
  UNIQUE (namespace, name, version)
);
CREATE UNIQUE INDEX one_current ON memories (namespace, name) WHERE state = 'current';
CREATE INDEX memories_by_key ON memories (namespace, key);
CREATE INDEX memories_by_id ON memories (id);
CREATE INDEX memories_by_source ON memories (source);
CREATE INDEX memories_by_expiry ON memories (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE questions (row INTEGER PRIMARY KEY REFERENCES memories (row) ON DELETE CASCADE, body TEXT NOT NULL);
CREATE TABLE records (
  namespace TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, version INTEGER NOT NULL, stale INTEGER NOT NULL,
  PRIMARY KEY (namespace, key)
) WITHOUT ROWID;
CREATE TABLE keys (
  namespace TEXT NOT NULL, source TEXT NOT NULL REFERENCES sources (hash), encoder TEXT NOT NULL, rows BLOB NOT NULL,
  UNIQUE (namespace, source, encoder)
);
CREATE INDEX keys_by_source ON keys (source);
CREATE TABLE trash (id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO meta VALUES ('version', '0')
"""


class Index:
    """The open index of the bank at `folder`: one connection, used by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / INDEX
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None

    @property
    def db(self) -> sqlite3.Connection:
        """The connection; BankError once closed."""
        if self._connection is None:
            raise BankError(f"bank {self.folder} is closed; open it again")
        return self._connection

    def open(self, create: bool) -> None:
        """Connect, first making folders and tables that are missing and may be made; BankError if this is no bank."""
        if self.folder.exists() and not self.folder.is_dir():
            raise BankError(f"{self.folder} is a file, not a bank; name a directory")
        present = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        if INDEX not in present:
            if self._holds_memories():
                raise BankError(f"bank {self.folder} holds memories but no {INDEX}; restore that file from a copy")
            if not create:
                raise BankError(f"no bank at {self.folder}; `memjax write FILE --bank {self.folder}` makes one")
            if present - {*FOLDERS, LOCK}:
                raise BankError(f"{self.folder} holds other files and is no bank; name a new or empty directory")
        for folder in (self.folder, *(self.folder / name for name in FOLDERS)):
            folder.mkdir(parents=True, exist_ok=True)
        self._connection = self.connect()
        if self._format() != FORMAT:
            self._create_tables(create)

    def connect(self) -> sqlite3.Connection:
        """A new connection with the settings that every connection needs."""
        db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        for pragma in ("foreign_keys = ON", "synchronous = FULL", "secure_delete = ON"):
            db.execute(f"PRAGMA {pragma}")
        return db

    def close(self) -> None:
        """Close the connection; twice is fine."""
        with self._lock:
            if self._connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.close()
            self._connection = None

    def all(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> list[Any]:
        """All rows of a query."""
        with self._lock:
            return self.db.execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> Any:
        """The first row of a query, or None."""
        with self._lock:
            return self.db.execute(sql, values).fetchone()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One all-or-nothing change under the write lock that all processes share; inside another, a part of it."""
        with self._lock:
            db = self.db
            if db.in_transaction:
                yield db
                return
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def truncate_log(self) -> None:
        """Empty the write-ahead log, which still holds deleted text, unless somebody reads or writes just now.

        Then the next call does it, or the last process to close the bank.
        """
        with self._lock:
            self.db.execute("PRAGMA busy_timeout = 0")
            try:
                self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            except sqlite3.OperationalError:
                pass
            finally:
                self.db.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000}")

    @contextlib.contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Turn what the disk and SQLite raise into one line that says what to do; other errors pass."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(doing, str(error), getattr(error, "sqlite_errorname", "")) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._explain(doing, "", "SQLITE_FULL") from error
            where = f": {error.filename}" if error.filename else ""
            raise BankError(f"cannot {doing} bank {self.folder}: {error.strerror or error}{where}") from error

    def _explain(self, doing: str, message: str, name: str) -> BankError:
        if name == "SQLITE_FULL":
            return BankError(f"the disk is full: cannot {doing} bank {self.folder}; nothing changed; free some space")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "no such table" in message:
            return BankError(f"the index {self.path} is damaged ({message}); restore it from a copy")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return BankError(f"bank {self.folder} is busy: another process has been writing for a minute; try again")
        return BankError(f"cannot {doing} bank {self.folder}: {message}")

    def _holds_memories(self) -> bool:
        memories = self.folder / "memories"
        return memories.is_dir() and any(memories.iterdir())

    def _format(self) -> int:
        return self.db.execute("PRAGMA user_version").fetchone()[0]

    def _create_tables(self, create: bool) -> None:
        """Make the tables of a new index, one process at a time; BankError if this is no new index."""
        with open(self.folder / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self._format()
            if found == FORMAT:
                return
            if found != 0:
                raise BankError(f"bank {self.folder} has format {found}; this version of memjax reads format {FORMAT}")
            if not create or self._holds_memories() or self.one("SELECT 1 FROM sqlite_master"):
                raise BankError(f"the index {self.path} is empty or damaged; restore it from a copy")
            self.db.execute(f"PRAGMA page_size = {_PAGE}")
            self.db.execute("PRAGMA journal_mode = WAL")
            with self.transaction() as db:
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {FORMAT}")
            sync_folder(self.folder)
            sync_folder(self.folder.absolute().parent)
