"""Several real processes on this machine: one is killed and the others stop and name it; started again they go on."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memjax.train.checkpoint import restore
from memjax.train.metrics import read_metrics

JOB = Path(__file__).with_name("hosts_job.py")
ROOT = Path(__file__).parents[2]
LIMIT = 240  # seconds until a run that should have stopped counts as hung


def free_port() -> int:
    """A port that is free together with the one after it."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("", port + 1))
            except OSError:
                continue
            return port


def run(processes: int, devices: int, out: Path, kill_at: int = 0) -> list[tuple[int, str]]:
    """(exit status, stderr) of each process of the job, `devices` in all."""
    return started(processes, devices, [str(JOB), str(out), str(out.with_suffix(".npz")), str(kill_at)])


def started(processes: int, devices: int, arguments: list[str]) -> list[tuple[int, str]]:
    """(exit status, stderr) of each process of a Python program, `devices` in all."""
    port = free_port()
    running = []
    for number in range(processes):
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
            **({"MEMJAX_COORDINATOR": f"127.0.0.1:{port}"} if processes > 1 else {}),
            "MEMJAX_PROCESSES": str(processes),
            "MEMJAX_PROCESS": str(number),
            "MEMJAX_CONNECT_SECONDS": "120",
            "MEMJAX_LOST_SECONDS": "60",
        }
        command = [sys.executable, *arguments]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    ended = [process.communicate(timeout=LIMIT) for process in running]
    return [(process.returncode, text) for process, (_, text) in zip(running, ended, strict=True)]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(out / "metrics.jsonl")}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_is_killed_the_others_name_it_and_a_restart_goes_on_in_the_same_order(tmp_path, processes):
    ((alone, text),) = run(1, processes, tmp_path / "alone")
    assert alone == 0, text
    killed = run(processes, processes, tmp_path / "many", kill_at=5)
    named = f"process 1 of {processes} on {socket.gethostname()} was killed by SIGKILL"
    assert killed[1][0] == 128 + signal.SIGKILL, killed[1][1]
    for number, (status, text) in enumerate(killed):
        if number != 1:
            assert status != 0
            assert named in text, (number, text)
    assert not (tmp_path / "many.npz").exists()
    for status, text in run(processes, processes, tmp_path / "many"):
        assert status == 0, text
    want, got = losses(tmp_path / "alone"), losses(tmp_path / "many")
    assert got.keys() == want.keys()
    # The same examples in the same order: another batch would give another loss.
    np.testing.assert_allclose(list(got.values()), list(want.values()), atol=1e-5)
    ends, whole = np.load(tmp_path / "many.npz"), np.load(tmp_path / "alone.npz")
    here = restore(tmp_path / "many")  # by this process alone
    for name in whole:
        np.testing.assert_allclose(ends[name], whole[name], atol=1e-5)
        assert np.array_equal(ends[name], here[name])


FEW = "fit.steps=2 fit.eval_every=2 fit.save_every=2 fit.log_every=1 fit.plot=false fit.optimizer.warmup=0 mesh.data=2"
COMMANDS = {
    "indexer": "data.rows=4 validation=1",
    "latent": f"data.rows=4 validation=1 rule.merge=mass --indexer {ROOT / 'memjax/evict/shipped/tiny/indexer'}",
    "hypernet": "shape.groups=2 validation=8 general=16",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COMMANDS)
def test_what_two_hosts_train_is_what_one_trains(tmp_path, what):
    config = ROOT / "configs" / f"{what}_tiny{'_niah_short' if what == 'hypernet' else ''}.yaml"
    call = "from memjax.cli.main import main; main()"
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = ["train", what, str(config), *FEW.split(), *COMMANDS[what].split(), "--out", str(out)]
        for status, text in started(processes, 2, ["-c", call, *arguments]):
            assert status == 0, text
        assert (out / ("hyper" if what == "hypernet" else what)).is_dir()
    want, got = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert got.keys() == want.keys() == {1, 2}
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)
