"""Supervisors: they meet or say who is missing, and when a process is lost all the others name it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memjax.distributed import Hosts, hosts_from
from memjax.errors import ConfigError
from tests.train.test_hosts import free_port

ROOT = Path(__file__).parents[1]
SUPERVISE = """
import sys
from memjax.distributed import Hosts, supervise
from memjax.errors import HostsError
hosts = Hosts(f"127.0.0.1:{sys.argv[1]}", int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), 3)
try:
    sys.exit(supervise(hosts, [sys.executable, "-c", sys.argv[5]]))
except HostsError as error:
    sys.exit(f"{error}")
"""
SLEEP = "import time; time.sleep(60)"
DIE = "import os, signal, time; time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"


def start(port, number, body, processes=3, connect=30):
    command = [sys.executable, "-c", SUPERVISE, str(port), str(processes), str(number), str(connect), body]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ends(processes):
    texts = [process.communicate(timeout=40)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_child_is_named_by_all_others(killed):
    port = free_port()
    told = ends([start(port, i, DIE if i == killed else SLEEP) for i in range(3)])
    for number, (status, text) in enumerate(told):
        if number == killed:
            assert status == 128 + signal.SIGKILL
        else:
            assert status == 1
            assert f"process {killed} of 3 on" in text
            assert "was killed by SIGKILL" in text


def test_a_failure_that_follows_from_a_loss_is_not_blamed_for_it():
    port = free_port()
    # Process 0 fails as a collective does when its other end is gone, shortly before it can have heard why.
    fails = "import time; time.sleep(0.4); raise SystemExit(1)"
    told = ends([start(port, i, body) for i, body in enumerate((fails, SLEEP, DIE))])
    for _, text in told[:2]:
        assert "process 2 of 3 on" in text
        assert "process 0" not in text


@pytest.mark.parametrize("killed", [0, 1])
def test_a_supervisor_that_is_gone_is_named(killed):
    port = free_port()
    processes = [start(port, i, SLEEP) for i in range(3)]
    time.sleep(3)  # until all have met; if they have not, the message is another and the test fails
    os.killpg(processes[killed].pid, signal.SIGKILL)  # with its child, as when a machine is lost
    for number, (status, text) in enumerate(ends(processes)):
        if number != killed:
            assert status == 1
            assert f"process {killed} of 3 on" in text
            assert "is gone" in text


def test_those_that_do_not_come_are_named():
    port = free_port()
    for status, text in ends([start(port, i, SLEEP, processes=4, connect=3) for i in (0, 2)]):
        assert status == 1
        assert "2 of 4 processes came within 3 s; missing: 1, 3" in text
    ((status, text),) = ends([start(port, 1, SLEEP, connect=1)])
    assert status == 1
    assert f"process 0 of 3 at 127.0.0.1:{port} did not answer within 1 s" in text


def test_all_end_well_and_a_request_to_stop_is_no_loss():
    port = free_port()
    late = "import time; time.sleep(1)"
    assert [status for status, _ in ends([start(port, i, late if i == 1 else "") for i in range(3)])] == [0, 0, 0]
    port = free_port()
    stops = "raise SystemExit(143)"
    assert [status for status, _ in ends([start(port, i, stops) for i in range(3)])] == [143, 143, 143]


def test_the_environment_is_checked():
    assert hosts_from({}) is None
    full = {"MEMJAX_COORDINATOR": "there:8476", "MEMJAX_PROCESSES": "4", "MEMJAX_PROCESS": "3", "MEMJAX_LOST_SECONDS": "9"}
    assert hosts_from(full) == Hosts("there:8476", 4, 3, 300, 9)
    wrong = {"MEMJAX_PROCESS": "4", "MEMJAX_PROCESSES": "four", "MEMJAX_COORDINATOR": "there", "MEMJAX_LOST_SECONDS": "0"}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=name):
            hosts_from({**full, name: value})
    with pytest.raises(ConfigError, match="MEMJAX_PROCESS is None"):
        hosts_from({"MEMJAX_COORDINATOR": "there:8476", "MEMJAX_PROCESSES": "4"})
