"""Temporary folders that outlive no crash: each belongs to a living process, and anyone may clear what the dead left.

    room/<token>.lock   held with flock by the owner; the kernel lets go of it when the process dies, however it dies
    room/<token>/       what the owner is writing, or is about to throw away

The lock is taken before the folder is made and released after it is gone, so a folder whose lock can be taken, or that
has no lock file, has no living owner. The lock file also holds the owner's intent: the id of what it was about to
publish elsewhere, so that whoever finds a dead claim knows where to look for a half-finished step.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Claim:
    """An owned temporary folder. `fd` is the open, locked lock file."""

    folder: Path
    lock: Path
    fd: int

    def intend(self, what: str) -> None:
        """Record durably what is about to be published, for whoever finds this claim if its owner dies."""
        os.pwrite(self.fd, what.encode(), 0)
        os.ftruncate(self.fd, len(what.encode()))
        os.fsync(self.fd)
        sync_folder(self.lock.parent)

    @property
    def intent(self) -> str:
        """What the owner was about to publish; empty if nothing."""
        return os.pread(self.fd, 4096, 0).decode("utf-8", "replace")

    def spare(self) -> Path:
        """A fresh path inside the folder, to move things to that are to vanish with it."""
        return self.folder / f"old-{secrets.token_hex(8)}"

    def release(self) -> None:
        """Remove the folder, then give up the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.unlink(missing_ok=True)
        os.close(self.fd)

    def abandon(self) -> None:
        """Give up the lock and leave the rest, with its intent, to whoever looks for abandoned claims next."""
        os.close(self.fd)


def claim(room: Path) -> Claim:
    """A new temporary folder under `room`, owned by this process until it is released or the process ends."""
    while True:
        lock = room / f"{secrets.token_hex(8)}.lock"
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _same_file(fd, lock):  # else a sweeper took the file between its creation and its lock
                mine = Claim(lock.with_suffix(""), lock, fd)
                mine.folder.mkdir()
                return mine
        except BaseException:
            lock.unlink(missing_ok=True)
            os.close(fd)
            raise
        os.close(fd)


def abandoned(room: Path) -> Iterator[Claim]:
    """The claims under `room` whose owners are dead, each taken over; the caller releases each one.

    Folders without a lock file are removed on the way: their owners were past the point of needing them.
    """
    names = {path.name for path in room.iterdir()}
    for name in sorted(names):
        if name.endswith(".lock"):
            if taken := _take_over(room / name):
                yield taken
        elif f"{name}.lock" not in names and not (room / f"{name}.lock").exists():
            shutil.rmtree(room / name, ignore_errors=True)


def _take_over(lock: Path) -> Claim | None:
    """A dead owner's claim, or None if its owner lives or has just finished."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same_file(fd, lock):
            return Claim(lock.with_suffix(""), lock, fd)
    except BlockingIOError:
        pass
    os.close(fd)
    return None


def _same_file(fd: int, path: Path) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> int:
    """fsync every file and folder under `folder`; the number of bytes in its files."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            fd = os.open(Path(root) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                size += os.fstat(fd).st_size
            finally:
                os.close(fd)
        sync_folder(Path(root))
    return size
