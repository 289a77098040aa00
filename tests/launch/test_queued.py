"""A run on queued resources against a gcloud that plays what goes wrong: the launcher goes on, tells, and deletes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import common, processes, ship, tpu_queued
from tests.launch.fake_gcloud import FakeGcloud

ROOT = Path(__file__).parent.parent.parent
OPTIONS = ["--name", "tiny", "--zone", "us-west4-a", "--tpu", "v5e-16", "--poll", "0"]
COMMAND = ["--", "train", "base", "configs/tiny_base.yaml", "--out", "bucket/tiny"]
ALL_WELL = "create copy setup run delete"


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    fake = FakeGcloud(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def launch(gcloud, tmp_path, monkeypatch, capsys):
    """Runs the launcher here; (exit code, its lines on stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ship, "code_files", lambda root=ROOT: ([Path("launch/worker_run.sh")], 0))

    def run(*options, command=COMMAND):
        code = common.finish(tpu_queued.launch, [*OPTIONS, *options, *command])
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("memjax-launch: ") for line in lines)
        return code, lines

    return run


def log_of(*lines, host="w-0"):
    return "".join(f"[{host}] {line}\n" for line in lines)


def ended(**hosts):
    return "".join(f"memjax-launch: {host} ended with {code}\n" for host, code in hosts.items())


def test_a_run_without_mishaps(gcloud, launch, tmp_path):
    gcloud.play("CREATING WAITING_FOR_RESOURCES PROVISIONING ACTIVE", run=[{"out": log_of("step 1", "step 2")}])
    code, lines = launch("--collect", "runs/x")
    assert code == common.DONE
    assert gcloud.verbs() == "create copy setup run collect delete"
    assert [line.rpartition(" ")[2] for line in lines[1:5]] == [
        "CREATING",
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]
    assert (tmp_path / "runs/tiny/run.log").read_text() == log_of("step 1", "step 2")
    assert gcloud.job(0).splitlines()[-1] == "memjax train base configs/tiny_base.yaml --out bucket/tiny"


def test_quota_at_creation_leaves_nothing_to_delete(gcloud, launch):
    quota = (
        "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded."
    )
    gcloud.play(create=[{"err": quota, "code": 1}])
    code, lines = launch()
    assert (code, gcloud.verbs()) == (common.NOT_GRANTED, "create")
    assert len(lines) == 1
    assert "no quota for v5litepod-16 in us-west4-a" in lines[0]
    assert "TPUV5s" in lines[0]
    assert "another --zone" in lines[0]


def test_a_resource_of_that_name_is_somebody_elses(gcloud, launch):
    gcloud.play(create=[{"err": "ERROR: ALREADY_EXISTS: Resource 'tiny' already exists", "code": 1}])
    code, lines = launch()
    assert (code, gcloud.verbs()) == (common.WRONG_USE, "create")
    assert "choose another --name" in lines[-1]


@pytest.mark.parametrize(
    ("error", "exit_code", "told"),
    [
        ("ERROR: PERMISSION_DENIED: tpu.nodes.create", common.NOT_GRANTED, "gcloud auth login"),
        ("ERROR: INVALID_ARGUMENT: no such zone", common.WRONG_USE, "--zone"),
    ],
)
def test_other_refusals_name_the_way_out(gcloud, launch, error, exit_code, told):
    gcloud.play(create=[{"err": error, "code": 1}])
    code, lines = launch()
    assert (code, gcloud.verbs()) == (exit_code, "create")
    assert told in lines[-1]


def test_a_creation_that_ended_unclear_is_deleted(gcloud, launch):
    gcloud.play(create=[{"err": "ERROR: connection reset", "code": 1}], delete=[{"err": "NOT_FOUND", "code": 1}])
    code, _ = launch()
    assert (code, gcloud.verbs()) == (common.NOT_GRANTED, "create delete")


def test_failed_before_it_began(gcloud, launch):
    failed = '{"state":{"state":"FAILED","failedData":{"error":{"message":"no-capacity-left"}}}}'
    gcloud.play(f"WAITING_FOR_RESOURCES {failed}")
    code, lines = launch("--retries", "2", "--bucket", "mine")
    assert (code, gcloud.verbs()) == (common.NOT_GRANTED, "create delete")
    assert "FAILED before it began (no-capacity-left)" in lines[-1]


def test_taken_away_in_the_middle_it_resumes_on_a_new_slice(gcloud, launch):
    gcloud.play(
        "ACTIVE ACTIVE-then SUSPENDED PROVISIONING ACTIVE",
        run=[{"out": log_of("step 1"), "gate": True}, {"out": log_of("step 2")}],
    )
    code, lines = launch("--spot", "--retries", "1", "--bucket", "mine")
    assert code == common.DONE
    assert gcloud.verbs() == f"create copy setup run delete {ALL_WELL}"
    assert any("SUSPENDED (taken away); asking for a new slice, retry 1 of 1" in line for line in lines)
    assert "--resume" not in gcloud.job(0)
    assert gcloud.job(1).endswith(" --out bucket/tiny --resume\n")


def test_taken_away_once_too_often(gcloud, launch):
    gcloud.play("ACTIVE SUSPENDING-then", run=[{"gate": True}])
    code, lines = launch("--spot")
    assert (code, gcloud.verbs()) == (common.LOST, ALL_WELL)
    assert "SUSPENDING (taken away), and no retry is left" in lines[-1]


def test_suspended_before_it_began_counts_as_a_loss(gcloud, launch):
    gcloud.play("PROVISIONING SUSPENDED ACTIVE")
    code, _ = launch("--retries", "1", "--bucket", "mine")
    assert (code, gcloud.verbs()) == (common.DONE, f"create delete {ALL_WELL}")


def test_a_run_told_to_stop_resumes(gcloud, launch):
    gcloud.play(run=[{"out": ended(**{"w-1": 143, "w-0": 1}), "code": 1}, {}])
    code, lines = launch("--retries", "1", "--bucket", "mine")
    assert code == common.DONE
    assert any("told to stop" in line for line in lines)


def test_hosts_that_miss_one_resume_on_a_new_slice(gcloud, launch):
    gcloud.play(run=[{"out": ended(**{"w-1": 75, "w-0": 75}), "code": 75}, {}])
    code, lines = launch("--retries", "1", "--bucket", "mine")
    assert code == common.DONE
    assert any("the hosts miss one of them; asking for a new slice" in line for line in lines)


def test_a_command_that_fails_is_named_by_its_worker_and_not_tried_again(gcloud, launch):
    gcloud.play(run=[{"out": ended(**{"w-0": 75, "w-3": 137, "w-1": 1}), "code": 1}])
    code, lines = launch("--retries", "3", "--bucket", "mine", "--collect", "runs/x")
    assert (code, gcloud.verbs()) == (common.COMMAND_FAILED, "create copy setup run collect delete")
    assert "worker w-3 ended with 137 (killed, often for want of memory); read runs/tiny/run.log" in lines[-1]


def test_a_broken_connection_is_mended(gcloud, launch):
    cut = "##### Command execution on worker 2 failed with exit status 255. Continuing.\n"
    gcloud.play(run=[{"out": ended(**{"w-0": 1}) + cut, "code": 255}, {"out": ended(**{"w-0": 0, "w-2": 0})}])
    code, lines = launch()
    assert (code, gcloud.verbs()) == (common.DONE, "create copy setup run run delete")
    assert any("lost the connection to worker 2; connecting again" in line for line in lines)


def test_a_dead_worker_costs_the_slice_and_the_run_resumes(gcloud, launch):
    cut = {"out": "##### Command execution on worker 2 failed with exit status 255. Continuing.\n", "code": 255}
    gcloud.play(run=[cut] * tpu_queued.TRIES + [{}])
    code, lines = launch("--retries", "1", "--bucket", "mine")
    assert code == common.DONE
    assert gcloud.verbs() == f"create copy setup {'run ' * tpu_queued.TRIES}delete {ALL_WELL}"
    assert any("worker 2 cannot be reached; asking for a new slice" in line for line in lines)


def test_a_log_that_goes_on_renews_the_tries(gcloud, launch):
    news = {"out": log_of(*map(str, range(tpu_queued.SHOWN_AGAIN + 1))), "code": 255}
    gcloud.play(run=[news] * (tpu_queued.TRIES + 2) + [{}])
    code, _ = launch()
    assert code == common.DONE


def test_setting_up_that_fails_is_told(gcloud, launch, tmp_path):
    gcloud.play(setup=[{"err": "ERROR: no matching distribution", "code": 1}])
    code, lines = launch()
    assert (code, gcloud.verbs()) == (common.COMMAND_FAILED, "create copy setup delete")
    assert "setting up failed on the workers (ERROR: no matching distribution); read runs/tiny/setup.log" in lines[-1]
    assert "no matching distribution" in (tmp_path / "runs/tiny/setup.log").read_text()


def test_deleted_by_somebody_else_it_is_not_created_anew(gcloud, launch):
    gcloud.play("ACTIVE DELETING-then", run=[{"gate": True}])
    code, lines = launch("--retries", "3", "--bucket", "mine")
    assert (code, gcloud.verbs()) == (common.LOST, ALL_WELL)
    assert "somebody else deleted it" in lines[-1]


def test_what_cannot_be_deleted_is_told_with_the_command(gcloud, launch):
    gcloud.play(run=[{"out": ended(**{"w-0": 2}), "code": 2}], delete=[{"err": "ERROR: backend error", "code": 1}])
    code, lines = launch()
    assert code == common.NOT_DELETED
    assert gcloud.verbs() == "create copy setup run" + " delete" * tpu_queued.TRIES
    assert "worker w-0 ended with 2" in lines[-2]
    assert "may still cost money (ERROR: backend error); run: gcloud compute tpus queued-resources delete tiny" in lines[-1]


def test_results_that_cannot_be_copied_are_an_error(gcloud, launch):
    gcloud.play(collect=[{"err": "scp: runs/x: No such file or directory", "code": 1}])
    code, lines = launch("--collect", "runs/x")
    assert code == common.COMMAND_FAILED
    assert gcloud.verbs().endswith("delete")
    assert "runs/x could not be copied (scp: runs/x: No such file or directory)" in lines[-1]


def test_secrets_stand_in_the_tarball_and_in_no_command(gcloud, launch, tmp_path):
    (tmp_path / "secrets").write_text('# mine\nHF_TOKEN=it\'s a "secret" $HOME\n')
    code, lines = launch("--env-file", "secrets", "--env", "MODE=a b")
    assert code == common.DONE
    assert "secret" not in repr([args for _, args in gcloud.calls()]) + repr(lines)
    assert "export HF_TOKEN='it'\"'\"'s a \"secret\" $HOME'" in gcloud.job(0)
    assert "export MODE='a b'" in gcloud.job(0)
    assert (gcloud.folder / "tarballs" / "0").stat().st_mode & 0o777 == 0o600


def test_without_gcloud(launch, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, lines = launch()
    assert code == common.WRONG_USE
    assert "gcloud is not installed; install the Google Cloud CLI" in lines[-1]


def test_retries_without_a_bucket_warn(gcloud, launch):
    _, lines = launch("--retries", "1")
    assert "training begins anew" in lines[0]


@pytest.fixture
def start(gcloud, tmp_path):
    """Starts the launcher as a process of its own."""
    started = []

    def run():
        command = [sys.executable, "-m", "launch.tpu_queued", *OPTIONS, "--into", str(tmp_path / "into"), *COMMAND]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, **streams))
        return started[0]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def read_until(process, words):
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"the launcher ended without saying {words!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_it_waits_in_the_queue(gcloud, start, number):
    gcloud.play("WAITING_FOR_RESOURCES")
    process = start()
    read_until(process, "WAITING_FOR_RESOURCES")
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number
    assert gcloud.verbs() == "create delete"
    assert err.splitlines()[-1] == "memjax-launch: tiny: stopped, and deleted what was created"


def test_a_closed_terminal_is_no_reason_to_end_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.stoppable(), processes.shielded("testing"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_in_the_middle_of_a_run_deletes(gcloud, start):
    gcloud.play(run=[{"gate": True}])
    process = start()
    (gcloud.folder / "began").read_text()  # returns when the run has begun
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert gcloud.verbs() == ALL_WELL


def test_ctrl_c_while_it_asks_waits_to_know_what_to_delete(gcloud, start):
    gcloud.play(create=[{"gate": True}])
    process = start()
    (gcloud.folder / "began").read_text()
    process.send_signal(signal.SIGINT)
    read_until(process, "it stops when that is done")
    (gcloud.folder / "go").write_text("")
    process.communicate()
    assert process.returncode == 130
    assert gcloud.verbs() == "create delete"
