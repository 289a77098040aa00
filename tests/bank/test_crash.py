"""Processes that change a bank are killed; the bank opens with exactly what was committed, and nothing left over."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

RIG = Path(__file__).with_name("crash_rig.py")


@pytest.fixture
def folder():
    """In memory where that is possible, for hundreds of banks: what a process wrote is not lost when it is killed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield name


def run_rig(mode, folder):
    """The rig's counts; its assertions, made beside the bank, fail the test."""
    done = subprocess.run([sys.executable, RIG, mode, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_killed_50_times_at_random_instants(folder):
    counts = run_rig("random", folder)
    assert counts["rounds"] == 50
    assert counts["done"] > 100
    assert counts["unfinished"] > 20  # or the kills would not have hit anything


def test_killed_before_every_system_call(folder):
    results = run_rig("everywhere", folder)
    for change, result in results.items():
        assert result["kills"] > 10, change
        both = change.split()[0] in ("add", "update", "delete")
        assert result["seen"] == ([0, 1] if both else [0]), change


def test_processes_write_at_once(tmp_path):
    assert run_rig("together", tmp_path) == {"memories": 36}
