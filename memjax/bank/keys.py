"""Where a namespace's retrieval index lies, what its files are called, and what of it a deleted memory takes along.

A memory's words are in the part that its id begins like (`postings`), so a deletion throws that part away and leaves the
others; files that are no such part, like the vectors, hold something of every memory.
"""

from __future__ import annotations

import re
from pathlib import Path

from memjax import ids

INDEX_FILE = "index.json"  # tells of the parts, and holds nothing of any text
PART_FILE = re.compile(r"words-([0-9a-f]*)\.safetensors")
FOLDER = "keys/"
_OF = "!"  # in the trash, between an index and a memory that it may hold


def keys_path(namespace: str) -> str:
    """Where a namespace's retrieval index is, within the bank; a hash, so that any name will do."""
    return f"{FOLDER}{ids.text_hash(namespace)[:32]}"


def part_file(beginning: str) -> str:
    """The file of a text index's part, of the memories whose ids begin like this."""
    return f"words-{beginning}.safetensors"


def trash_of(namespace: str, memory_id: str) -> str:
    """The entry of the trash for whatever in a namespace's index may hold a memory."""
    return f"{keys_path(namespace)}{_OF}{memory_id}"


def doomed(bank: Path, entry: str) -> list[Path]:
    """The files of an entry of the trash that `trash_of` gave, or the folder of one that is a whole index, there or not."""
    place, _, memory_id = entry.partition(_OF)
    folder = bank / place
    if not memory_id or not folder.is_dir():
        return [folder]
    return [path for path in folder.iterdir() if not _is_spared(path.name, memory_id)]


def _is_spared(name: str, memory_id: str) -> bool:
    """Whether a file of an index cannot hold anything of a memory, by its name."""
    part = PART_FILE.fullmatch(name)
    return name == INDEX_FILE or (part is not None and not memory_id.startswith(part.group(1)))
