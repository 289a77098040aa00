"""Killed at any step and resumed, a run ends with the very bits of the run that was left alone."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from memjax.train.checkpoint import latest_complete
from memjax.train.metrics import read_metrics

JOB = Path(__file__).with_name("job.py")
ROOT = Path(__file__).parents[2]
STEPS = 24


def start(out: Path, result: Path, kill_at: int) -> subprocess.Popen:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        # Seven processes run the same programs; all but the first two find them compiled.
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen([sys.executable, str(JOB), str(out), str(result), str(kill_at)], env=env)


def test_killed_at_five_random_steps_ends_bit_for_bit_the_same(tmp_path):
    # The order of kills is random but printed on failure by the assertion below; any order must pass.
    steps = sorted(random.SystemRandom().sample(range(1, STEPS), 5))
    whole = start(tmp_path / "whole", tmp_path / "whole.npz", 0)
    for step in steps:
        assert start(tmp_path / "killed", tmp_path / "killed.npz", step).wait() == -signal.SIGKILL, steps
    assert not (tmp_path / "killed.npz").exists()
    assert start(tmp_path / "killed", tmp_path / "killed.npz", 0).wait() == 0
    assert whole.wait() == 0

    want, got = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "killed.npz")
    for name in want:
        assert want[name].tobytes() == got[name].tobytes(), (name, steps)
    assert latest_complete(tmp_path / "killed").name == str(STEPS)
    # The log has every step once, and the same losses: lines of the lost steps were replaced, not repeated.
    losses = [[(line["step"], line["loss"]) for line in read_metrics(tmp_path / run / "metrics.jsonl")]
              for run in ("whole", "killed")]  # fmt: skip
    assert losses[0] == losses[1], steps
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1)), steps
