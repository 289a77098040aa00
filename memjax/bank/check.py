"""Whether what the index lists is what the disk holds: damage by name, and folders that no name points to."""

from __future__ import annotations

import os
from collections.abc import Sequence

from memjax import ids
from memjax.bank.entries import Report
from memjax.bank.index import PAD, Index
from memjax.bank.publish import claim, memory_folder
from memjax.memory.files import MANIFEST, check_folder


def verify(index: Index, default_namespace: str) -> Report:
    """Compare every memory's files and texts with their hashes; a line per problem names the memory and the file."""
    lines = [line for (line,) in index.all("PRAGMA quick_check") if line != "ok"]
    problems = [f"{index.path} is damaged: {line}" for line in lines]
    artefacts = index.all("SELECT id, manifest FROM artefacts ORDER BY id")
    for memory_id, manifest in artefacts:
        found = _check(index, memory_id, manifest)
        # What another process deleted meanwhile is no problem.
        if found and index.one("SELECT 1 FROM artefacts WHERE id = ?", memory_id):
            problems += [f"{_pointers(index, memory_id, default_namespace)}: {line}" for line in found]
    for (source,) in index.all("SELECT hash FROM sources ORDER BY hash"):
        row = index.one("SELECT text FROM sources WHERE hash = ?", source)
        if row and ids.text_hash(row[0].removeprefix(PAD)) != source:
            problems.append(f"{index.path} is damaged: source text {source} is not what was added")
    orphans = [str(memory_folder(index.folder, name)) for name in _orphans(index)]
    return Report(len(artefacts), tuple(problems), tuple(orphans))


def sweep(index: Index) -> tuple[str, ...]:
    """Remove the folders under memories/ that the index does not know; returns their paths."""
    with claim(index) as mine, index.transaction():
        orphans = _orphans(index)
        for name in orphans:
            os.rename(memory_folder(index.folder, name), mine.spare())
    return tuple(str(memory_folder(index.folder, name)) for name in orphans)


def _check(index: Index, memory_id: str, manifest: str) -> Sequence[str]:
    """What is wrong with a memory's files; `manifest` is the hash of memory.json when it was added."""
    folder = memory_folder(index.folder, memory_id)
    try:
        if problems := check_folder(folder):
            return problems
        if ids.file_hash(folder / MANIFEST) != manifest:
            return [f"{folder / MANIFEST} is damaged: its bytes are not those that were written"]
    except OSError as error:
        return [f"{error.filename or folder} cannot be read: {error.strerror or error}"]
    return []


def _orphans(index: Index) -> Sequence[str]:
    """Names under memories/ that the index does not know, sorted."""
    present = sorted(os.listdir(index.folder / "memories"))
    return [name for name in present if not index.one("SELECT 1 FROM artefacts WHERE id = ?", name)]


def _pointers(index: Index, memory_id: str, default_namespace: str) -> str:
    """Which names a memory has, for a message."""
    sql = "SELECT DISTINCT namespace, name FROM memories WHERE id = ? ORDER BY namespace, name"
    rows = index.all(sql, (memory_id,))
    return "memory " + ", ".join(repr(name if s == default_namespace else f"{s}/{name}") for s, name in rows)
