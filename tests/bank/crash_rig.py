"""Kills processes that change a bank, and checks what is left; run by test_crash.py as a script of its own.

    python crash_rig.py random|everywhere|together FOLDER

It forks its victims, which a process that has started JAX's threads must not do, so it is a separate process itself. It
prints one JSON object of counts. A bank that is not what it should be is an AssertionError.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from memjax.bank import versions
from memjax.bank.store import Bank, open_bank
from memjax.memory.files import Meta, read_artefact, write_artefact
from memjax.memory.peft import Factors

SHAPES, MODULES = {"q": (4, 4)}, {"q": "self_attn.q_proj"}
State = dict[str, list[tuple[int, str, float]]]  # name -> (version, state, value) of each version


def writer(value: float):
    """(key, write callback) of a tiny memory of this value."""
    meta = Meta("b" * 64, "t" * 64, "", {"writer": "test", "value": value})
    factors = Factors({"q": np.full((1, 1, 4), value)}, {"q": np.ones((1, 1, 4))}, 1.0)
    return meta.key, lambda folder: write_artefact(folder, factors, MODULES, meta)


def apply(bank: Bank, op: str, name: str, value: float) -> None:
    """One change to a bank."""
    if op == "delete":
        bank.delete(name)
    else:
        getattr(bank, op)(name, *writer(value), text=f"text {value}", questions=[value])


def applied(state: State, op: str, name: str, value: float) -> State:
    """What the bank should hold after the change."""
    versions = [(version, "past", old) for version, _, old in state.get(name, [])]
    if op == "delete":
        return {other: kept for other, kept in state.items() if other != name}
    return state | {name: [*versions, (len(versions) + 1, "current", value)]}


def held(path: Path) -> State:
    """What the bank holds, after checking that all of it is whole and nothing is left over."""
    with open_bank(path, create=True) as bank:
        report = bank.verify()
        assert report.problems == (), report.problems
        assert report.orphans == (), report.orphans
        left = [entry.name for entry in (path / "tmp").iterdir()]
        assert left == [], left
        assert bank._index.all("SELECT * FROM trash") == []
        state: State = {}
        ids = set()
        for name in bank.names():
            state[name] = []
            for entry in bank.history(name):
                memory = read_artefact(bank.folder(entry.id), SHAPES, 1, MODULES)
                state[name].append((entry.version, entry.state, float(memory.artefact.a["q"].flat[0])))
                ids.add(entry.id)
            assert bank.text(name) == f"text {state[name][-1][2]}"
            assert bank.questions(name) == [state[name][-1][2]]
        assert {folder.name for folder in (path / "memories").iterdir()} == ids
        assert bank._index.one("SELECT count(*) FROM sources")[0] == len({v[2] for vs in state.values() for v in vs})
        return state


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child process and return its process id; it exits 0, or 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_at_random(folder: Path, rounds: int = 50, seed: int = 1) -> dict[str, int]:
    """A child adds, updates and deletes without end and logs what was committed; it is killed at a random instant.

    The instant is within a random one of its first changes: waiting for the changes before keeps slow disks busy too.
    """
    rng, path, log = random.Random(seed), folder / "bank", folder / "log"
    state: State = {}
    done = unfinished = kept = 0
    for number in range(rounds):
        log.write_bytes(b"")
        heard, told = os.pipe()
        child_rng = random.Random(rng.random())

        def work(start=state, rng=child_rng, number=number, told=told) -> None:
            names = set(start)
            out = os.open(log, os.O_WRONLY | os.O_APPEND)
            with open_bank(path, create=True) as bank:
                for step in range(10**6):
                    op = rng.choice(["add", "add", "update", "delete"] if names else ["add"])
                    name = f"{number}-{step}" if op == "add" else rng.choice(sorted(names))
                    line = [op, name, number + step / 1024]
                    os.write(out, (json.dumps(["begin", *line]) + "\n").encode())
                    apply(bank, *line)
                    os.write(out, (json.dumps(["done", *line]) + "\n").encode())
                    os.write(told, b"x")
                    names = names - {name} if op == "delete" else names | {name}

        pid = fork(work)
        for _ in range(rng.randrange(6)):
            os.read(heard, 1)
        select.select([], [], [], rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(heard)
        os.close(told)

        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for kind, *change in lines:
            if kind == "done":
                state = applied(state, *change)
                done += 1
        actual = held(path)
        if lines and lines[-1][0] == "begin":
            unfinished += 1
            if actual != state:
                state = applied(state, *lines[-1][1:])
                kept += 1
        assert actual == state
    return {"rounds": rounds, "done": done, "unfinished": unfinished, "unfinished_but_committed": kept}


class Killer:
    """Kills its own process just before the n-th call that reaches the operating system or the index."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: object, event: str, function: object) -> None:
        if event != "c_call":
            return
        owner = getattr(function, "__self__", None)
        if getattr(function, "__module__", "") in ("posix", "fcntl", "_io") or isinstance(
            owner, (sqlite3.Connection, sqlite3.Cursor)
        ):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def kill_everywhere(template: Path, work: Callable[[Path], None], states: list[State]) -> dict[str, object]:
    """Do `work` on copies of a bank, killed before its 1st, 2nd, 3rd ... system call, until it comes through.

    Each copy must then hold one of `states`. Returns how often it was killed and which of the states were seen.
    """
    copy, seen, n = template.with_name("copy"), set(), 0
    while True:
        n += 1
        if template.exists():
            shutil.copytree(template, copy)

        def run(n=n) -> None:
            sys.setprofile(Killer(n))
            work(copy)

        status = os.waitstatus_to_exitcode(os.waitpid(fork(run), 0)[1])
        assert status in (0, -signal.SIGKILL), status
        actual = held(copy)
        assert actual in states, (n, actual, states)
        seen.add(states.index(actual))
        shutil.rmtree(copy)
        if status == 0:
            return {"kills": n - 1, "seen": sorted(seen)}


def crash_everywhere(folder: Path) -> dict[str, object]:
    """Every kind of change, and the recovery from a crash itself, killed before each system call."""
    template = folder / "template"
    results = {"create": kill_everywhere(folder / "nothing", lambda path: open_bank(path, create=True).close(), [{}])}
    start: State = {}
    with open_bank(template, create=True) as bank:
        for change in (("add", "a", 1.0), ("update", "a", 2.0), ("add", "b", 1.0)):
            apply(bank, *change)
            start = applied(start, *change)
    for change in (("add", "c", 3.0), ("add", "c", 2.0), ("update", "b", 3.0), ("delete", "a", 0.0)):

        def work(path: Path, change=change) -> None:
            with open_bank(path) as bank:
                apply(bank, *change)

        after = applied(start, *change)
        results[f"{change[0]} {change[1]} {change[2]}"] = kill_everywhere(template, work, [start, after])

    # A crash between rename and commit, and one between commit and the removal of files; then opening is killed.
    half = folder / "half"
    shutil.copytree(template, half)

    def die_before_commit() -> None:
        with open_bank(half) as bank:
            versions.insert = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            apply(bank, "add", "c", 3.0)

    def die_before_removal() -> None:
        with open_bank(half) as bank:
            bank._empty_trash = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
            apply(bank, "delete", "b", 0.0)
            raise AssertionError("the files should have been removed")

    before = len(list((half / "memories").iterdir()))
    os.waitpid(fork(die_before_commit), 0)
    assert len(list((half / "memories").iterdir())) == before + 1, "the crash should have left an orphan"
    results["recover an add"] = kill_everywhere(half, lambda path: open_bank(path).close(), [start])
    held(half)
    with open_bank(half) as bank:
        apply(bank, "update", "b", 5.0)
    os.waitpid(fork(die_before_removal), 0)
    assert len(list((half / "memories").iterdir())) == before + 1, "the crash should have left the files"
    results["recover a delete"] = kill_everywhere(
        half, lambda path: open_bank(path).close(), [applied(start, "delete", "b", 0.0)]
    )
    return results


def write_together(folder: Path, writers: int = 3, each: int = 12) -> dict[str, int]:
    """Processes create one bank and add to it at once, their own memories and shared ones, while another one sweeps."""
    path = folder / "bank"
    go, gate = os.pipe()

    def work(number: int) -> None:
        select.select([go], [], [])
        with open_bank(path, create=True) as bank:
            for step in range(each):
                apply(bank, "add", f"{number}-{step}", number + step / 1024)
                apply(bank, "add", f"shared-{step}", 100.0 + step)  # the same name and key everywhere
                if step % 3 == 2:
                    apply(bank, "delete", f"{number}-{step}", 0.0)

    def sweep() -> None:
        select.select([go], [], [])
        with open_bank(path, create=True) as bank:
            while bank.count() < writers * each * 2 // 3 + each:
                bank.sweep()
                with open_bank(path) as other:
                    assert other.verify().ok

    children = [fork(lambda n=n: work(n)) for n in range(writers)] + [fork(sweep)]
    os.write(gate, b"x")
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * len(children), codes
    expected: State = {f"shared-{step}": [(1, "current", 100.0 + step)] for step in range(each)}
    for number in range(writers):
        steps = [step for step in range(each) if step % 3 != 2]
        expected |= {f"{number}-{step}": [(1, "current", number + step / 1024)] for step in steps}
    assert held(path) == expected
    return {"memories": len(expected)}


if __name__ == "__main__":
    mode, where = sys.argv[1:]
    modes = {"random": kill_at_random, "everywhere": crash_everywhere, "together": write_together}
    print(json.dumps(modes[mode](Path(where))))
