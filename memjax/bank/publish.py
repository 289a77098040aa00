"""How a memory's files get into and out of memories/: published before a commit, removed after one, recovered between.

All renames happen under the index's write lock, so processes cannot take each other's files. A claim (`folders`) says
what its process was about to publish; the table `trash` says what a committed delete has still to remove. Whoever opens
the bank next finishes either.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from memjax.bank import folders, keys
from memjax.bank.index import Index

_BATCH = 500  # folders moved out of the bank under one write lock


def memory_folder(bank: Path, memory_id: str) -> Path:
    """Where the files of a memory are."""
    return bank / "memories" / memory_id


@contextlib.contextmanager
def claim(index: Index) -> Iterator[folders.Claim]:
    """A temporary folder of this process, settled and removed at the end, whatever happens."""
    mine = folders.claim(index.folder / "tmp")
    try:
        yield mine
    except BaseException:
        settle(index, mine)
        raise
    mine.release()


def publish(bank: Path, mine: folders.Claim, memory_id: str) -> None:
    """Move a written memory from a claim's `new` to its place, inside the transaction that makes it exist."""
    place = memory_folder(bank, memory_id)
    mine.intend(memory_id)
    if place.exists():  # the index does not know it: left by a process that died before it could commit
        os.rename(place, mine.spare())
    os.rename(mine.folder / "new", place)
    folders.sync_folder(place.parent)


def settle(index: Index, mine: folders.Claim) -> None:
    """Take back what an unfinished claim published without committing, then release it."""
    try:
        if memory_id := mine.intent:
            with index.transaction() as db:
                place = memory_folder(index.folder, memory_id)
                committed = db.execute("SELECT 1 FROM artefacts WHERE id = ?", (memory_id,)).fetchone()
                if not committed and place.exists():
                    mine.folder.mkdir(exist_ok=True)
                    os.rename(place, mine.spare())
    except (sqlite3.Error, OSError):
        mine.abandon()  # whoever opens the bank next tries again
    else:
        mine.release()


def settle_abandoned(index: Index) -> None:
    """Settle the claims of dead processes: their temporary folders and half-published memories."""
    for mine in folders.abandoned(index.folder / "tmp"):
        settle(index, mine)


def empty_trash(index: Index) -> None:
    """Remove the files of committed deletes.

    Under the write lock, whatever is in the trash is dead: a memory that is added again leaves the trash.
    """
    while index.one("SELECT 1 FROM trash LIMIT 1"):
        with claim(index) as mine, index.transaction() as db:
            names = db.execute("SELECT id FROM trash LIMIT ?", (_BATCH,)).fetchall()
            for (name,) in names:
                memory = memory_folder(index.folder, name)
                places = keys.doomed(index.folder, name) if name.startswith(keys.FOLDER) else [memory]
                for place in places:
                    if place.exists():
                        os.rename(place, mine.spare())
            folders.sync_folder(index.folder / "memories")
            db.executemany("DELETE FROM trash WHERE id = ?", names)
    index.truncate_log()
