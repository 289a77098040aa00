"""Child processes of a launcher that must clean up: none is cut off by Ctrl-C half-way, none outlives its use."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launch import common

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the launcher to end; number is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """While open, SIGINT, SIGTERM and SIGHUP raise Stopped where the launcher is."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    with _handlers(stop):
        yield


@contextlib.contextmanager
def shielded(what: str) -> Iterator[None]:
    """While open, those signals wait; they raise Stopped at the end."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        common.say(f"{what}; it stops when that is done")

    with _handlers(note):
        yield
    if came:
        raise Stopped(came[0])


@contextlib.contextmanager
def _handlers(handler: Callable[[int, Any], None]) -> Iterator[None]:
    # What is ignored stays so: nohup means that a closed terminal is no reason to end.
    asked = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in asked}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended; error: the last telling line of what it wrote to stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line that says what went wrong, for a message."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return next((line for line in lines if "ERROR" in line), lines[-1] if lines else f"exit code {self.code}")


class Child:
    """A command in a session of its own: the terminal's Ctrl-C reaches the launcher alone, which then decides."""

    def __init__(self, command: Sequence[str], on_line: Callable[[str], None] | None = None) -> None:
        together = on_line is not None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if together else subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError:
            raise common.missing_tool(command[0]) from None
        self._reader: threading.Thread | None = None
        if on_line is not None:
            self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
            self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            on_line(line.rstrip("\n"))

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, all lines delivered; None if the command still runs after so many seconds."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        if self._reader:
            self._reader.join()
        return code

    def result(self) -> Result:
        """What the command wrote and how it ended."""
        out, err = self._process.communicate()
        return Result(self._process.returncode, out or "", err or "")

    def end(self) -> None:
        """Ends the command and all that it started."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._reader:
            self._reader.join()


def call(command: Sequence[str]) -> Result:
    """Runs a command to its end; it is ended where the launcher is stopped meanwhile."""
    child = Child(command)
    try:
        return child.result()
    except BaseException:
        child.end()
        raise
