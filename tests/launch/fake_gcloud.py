"""A `gcloud` that plays a scenario: the n-th call of a verb takes the n-th step of its list, the last one from then on.

Verbs: create, describe, copy (scp to the workers), setup and run (ssh), collect (scp back), delete. A step may say what to
print (out, err), how to end (code), to tell the pipe `began` that it began and go on when `go` is opened (gate), or to wait
first until another has begun so (then). Calls are kept in calls.jsonl, tarballs in a folder.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

SCRIPT = """#!{python} -SE
import json, os, shutil, sys
here = os.path.dirname(os.path.abspath(__file__))
args = sys.argv[1:]
assert args[:3] == ["compute", "tpus", "queued-resources"], args
verb = args[3]
if verb == "ssh":
    verb = "run" if "worker_run.sh" in " ".join(args) else "setup"
elif verb == "scp":
    verb = "collect" if "--recurse" in args else "copy"
log = os.path.join(here, "calls.jsonl")
with open(log, "a+") as calls:
    calls.seek(0)
    number = sum(json.loads(line)[0] == verb for line in calls)
    calls.write(json.dumps([verb, args]) + "\\n")
if verb == "copy":
    shutil.copy(args[4], os.path.join(here, "tarballs", str(number)))
with open(os.path.join(here, "scenario.json")) as file:
    steps = json.load(file).get(verb, [{{}}])
step = steps[min(number, len(steps) - 1)]
if step.get("then"):
    open(os.path.join(here, "began")).close()
sys.stdout.write(step.get("out", ""))
sys.stderr.write(step.get("err", ""))
sys.stdout.flush()
if step.get("gate"):
    open(os.path.join(here, "began"), "w").close()
    open(os.path.join(here, "go")).close()
sys.exit(step.get("code", 0))
"""


def _describe(word: str) -> dict[str, Any]:
    if word.startswith("{"):
        return {"out": word}
    state, _, then = word.partition("-")
    return {"out": json.dumps({"state": {"state": state}}), "then": bool(then)}


class FakeGcloud:
    """The program in a folder to put first on PATH, and what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tarballs").mkdir(parents=True)
        program = folder / "gcloud"
        program.write_text(SCRIPT.format(python=sys.executable))
        program.chmod(0o755)
        for name in ("began", "go"):
            os.mkfifo(folder / name)
        self.play()

    def play(self, states: str = "ACTIVE", **steps: list[dict[str, Any]]) -> None:
        """Sets the scenario; states: what `describe` says, one word a call, or JSON text for more than a word.

        STATE-then: says so only when a step with a gate has begun.
        """
        scenario = {"describe": [_describe(word) for word in states.split()], **steps}
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def calls(self) -> list[tuple[str, list[str]]]:
        """(verb, arguments) of each call but `describe`, in order."""
        log = self.folder / "calls.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(verb, args) for verb, args in map(json.loads, lines) if verb != "describe"]

    def verbs(self) -> str:
        """The verbs of those calls, in one line."""
        return " ".join(verb for verb, _ in self.calls())

    def job(self, number: int) -> str:
        """job.sh of the n-th tarball."""
        with tarfile.open(self.folder / "tarballs" / str(number)) as tar:
            file = tar.extractfile("job.sh")
            assert file is not None
            return file.read().decode()
