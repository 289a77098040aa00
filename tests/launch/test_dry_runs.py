"""What launchers would call, or render, word for word: each golden file is a command line and what it prints.

Where a change is meant, write the files anew: python -m tests.launch.test_dry_runs
"""

import contextlib
import importlib
import io
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import common

GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*.txt"))
MODULES = ["local", "tpu_queued", "gke_xpk", "jobset"]


def printed(line):
    """What `python -m launch.MODULE ARGUMENTS` prints on stdout; it must end well."""
    _, _, module, *argv = shlex.split(line)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert common.finish(importlib.import_module(module).launch, argv) == common.DONE
    return out.getvalue()


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fails whatever starts a process."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a dry run must start nothing: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr("os.execve", refuse)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_commands_are_as_committed(golden, nothing_runs, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    line, _, wanted = golden.read_text().partition("\n")
    assert printed(line.removeprefix("$ ")) == wanted


def test_every_launcher_has_a_golden():
    lines = [golden.read_text().partition("\n")[0] for golden in GOLDENS]
    assert {line.split()[3] for line in lines} == {f"launch.{module}" for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_help_has_an_example_and_the_exit_codes(module, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"launch.{module}").launch(["--help"])
    told = capsys.readouterr().out
    assert f"python -m launch.{module} " in told.partition("example:")[2]
    assert "exit codes:" in told


if __name__ == "__main__":
    for path in GOLDENS:
        first = path.read_text().partition("\n")[0]
        path.write_text(f"{first}\n{printed(first.removeprefix('$ '))}")
