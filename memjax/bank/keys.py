"""Where a namespace's retrieval indices lie, what their files are called, and what of them a deleted memory takes along.

A memory is in the part of an index that its id begins like (`parts`), so a deletion throws these parts away and leaves the
others; whatever else lies there may hold something of every memory.
"""

from __future__ import annotations

import re
from pathlib import Path

from memjax import ids

INDICES = ("words", "vectors")
FOLDER = "keys/"
_PART = re.compile(rf"({'|'.join(INDICES)})-([0-9a-f]*)\.safetensors")
_OF = "!"  # in the trash, between an index and a memory that it may hold


def keys_path(namespace: str) -> str:
    """Where a namespace's retrieval indices are, within the bank; a hash, so that any name will do."""
    return f"{FOLDER}{ids.text_hash(namespace)[:32]}"


def about_file(index: str) -> str:
    """The file that tells of an index's parts, and holds nothing of any text."""
    return f"{index}.json"


def part_file(index: str, beginning: str) -> str:
    """The file of an index's part, of the memories whose ids begin like this."""
    return f"{index}-{beginning}.safetensors"


def part_of(name: str) -> tuple[str, str] | None:
    """(index, beginning of the ids) of a part's file name; None for another file."""
    found = _PART.fullmatch(name)
    return (found.group(1), found.group(2)) if found else None


def index_of(name: str) -> str | None:
    """Which index a file belongs to, by its name; None for a stranger."""
    found = part_of(name)
    return found[0] if found else next((index for index in INDICES if name == about_file(index)), None)


def trash_of(namespace: str, memory_id: str) -> str:
    """The entry of the trash for whatever in a namespace's indices may hold a memory."""
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
    part = part_of(name)
    return not memory_id.startswith(part[1]) if part else index_of(name) is not None
