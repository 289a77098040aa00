"""The script that runs a job on a worker: the job outlives the connection, and a second call only looks at it."""

import shutil
import socket
import subprocess

import pytest

from launch import ship, tpu_queued

HOST = socket.gethostname()


@pytest.fixture
def worker(tmp_path):
    """A worker's folder with the script, and a way to call it with a job."""
    scripts = tmp_path / "code/launch"
    scripts.mkdir(parents=True)
    shutil.copy(ship.ROOT / "launch/worker_run.sh", scripts)

    def run(job=None):
        if job is not None:
            (tmp_path / "job.sh").write_text(job)
        done = subprocess.run(["bash", scripts / "worker_run.sh"], cwd="/", capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    return run


def test_it_shows_the_log_and_how_the_job_ended(worker):
    code, lines = worker("echo one; echo two >&2; exit 3")
    assert code == 3
    assert lines == [f"[{HOST}] one", f"[{HOST}] two", f"memjax-launch: {HOST} ended with 3"]


def test_a_second_call_does_not_run_it_again(worker, tmp_path):
    job = f"echo run >> {tmp_path}/runs; for i in $(seq 50); do echo $i; done"
    first = worker(job)
    code, lines = worker()
    assert (first[0], code) == (0, 0)
    assert (tmp_path / "runs").read_text() == "run\n"
    assert len(lines) == tpu_queued.SHOWN_AGAIN + 1
    assert lines[-2:] == [f"[{HOST}] 50", f"memjax-launch: {HOST} ended with 0"]


def test_a_killed_job_is_told_as_killed(worker):
    code, lines = worker("kill -9 $PPID")
    assert code == tpu_queued.KILLED
    assert lines[-1] == f"memjax-launch: {HOST} ended with 137"


def test_the_launcher_reads_what_the_script_says():
    assert tpu_queued._ENDED.match("memjax-launch: t1v-n-0-w-3 ended with 137").groups() == ("t1v-n-0-w-3", "137")
    assert tpu_queued._LOGGED.match("[t1v-n-0-w-3] step 1").groups() == ("t1v-n-0-w-3",)


ENDPOINTS = {"old": "a:1:10.0.0.1,b:2:10.0.0.2", "new": "10.0.0.1,10.0.0.2", "one": "a:1:10.0.0.1"}
SLICES = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1:8080'\n"


@pytest.mark.parametrize(
    ("metadata", "variables", "wanted"),
    [
        ({}, {}, ""),
        ({"worker-network-endpoints": ENDPOINTS["one"], "agent-worker-number": "0"}, {}, ""),
        ({"worker-network-endpoints": ENDPOINTS["old"], "agent-worker-number": "1"}, {}, "10.0.0.1:8476 2 1"),
        ({"worker-network-endpoints": ENDPOINTS["new"], "agent-worker-number": "1"}, {}, "10.0.0.1:8476 2 1"),
        (
            {"worker-network-endpoints": ENDPOINTS["old"], "agent-worker-number": "1", "tpu-env": SLICES},
            {},
            "10.9.0.1:8476 4 3",
        ),
        ({}, {"TPU_WORKER_HOSTNAMES": "t-0.t,t-1.t,t-2.t", "TPU_WORKER_ID": "2"}, "t-0.t:8476 3 2"),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, ""),
    ],
)
def test_hosts_find_each_other(tmp_path, metadata, variables, wanted):
    for name, value in metadata.items():
        (tmp_path / name).write_text(value)
    curl = tmp_path / "curl"
    curl.write_text(f'#!/bin/bash\ncat {tmp_path}/"${{!###*/}}" 2> /dev/null\n')
    curl.chmod(0o755)
    script = f". {ship.ROOT}/launch/worker_hosts.sh; echo $MEMJAX_COORDINATOR $MEMJAX_PROCESSES $MEMJAX_PROCESS"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **variables}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted


@pytest.mark.parametrize("script", sorted((ship.ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
