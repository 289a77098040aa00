"""Words arrive as they were given, whatever they hold, through shells, scripts, YAML and Kubernetes."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import common, gke_xpk, jobset, ship, tpus

NASTY = (
    "a b", "it's", 'say "hi"', "$HOME", "$(date)", "`date`", "$$", "a\\b", "*", "~", "; rm -rf x", "a\nb", "\ttab", "!x",
    "#c", "", " ", "--flag=a b", "x='1' \"2\"", "é → 字 😀", "\x7f\x85\u2028", "true", "null", "1e3", "0x1", "-", "- a",
    "k: v", "{}", "@x",
)  # fmt: skip
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
commands = st.lists(words, min_size=1, max_size=5).map(tuple)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A worker's folder in which `memjax` writes its arguments to a file, NUL after each; and a way to read them."""
    folder = tmp_path_factory.mktemp("worker")
    (folder / "code/launch").mkdir(parents=True)
    (folder / "code/launch/worker_hosts.sh").touch()
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/activate").write_text(f"PATH={shlex.quote(str(folder / 'venv/bin'))}:$PATH\n")
    memjax = folder / "venv/bin/memjax"
    memjax.write_text(
        f'#!/bin/bash\n{{ printf "%s\\0" "$@"; printf "%s" "$GIVEN"; }} > {shlex.quote(str(folder / "said"))}\n'
    )
    memjax.chmod(0o755)

    def run(script):
        path = {"PATH": f"{memjax.parent}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-c", script], check=True, cwd=folder, env=path)
        *arguments, variable = (folder / "said").read_bytes().decode().split("\0")
        return tuple(arguments), variable

    return folder, run


def job(worker, command, value=""):
    folder, run = worker
    (folder / "job.sh").write_text(ship.job_script(command, {"GIVEN": value}))
    return run(f"bash {shlex.quote(str(folder / 'job.sh'))}")


def test_a_job_gets_nasty_words(worker):
    assert job(worker, NASTY) == (NASTY, "")


@settings(max_examples=20, deadline=None)
@given(commands, words)
def test_a_job_gets_any_words(worker, command, value):
    assert job(worker, command, value) == (command, value)


def kubernetes(text):
    """What Kubernetes makes of a command or a variable where no variable is defined: $$ becomes $."""
    return re.sub(r"\$(\$?)", "$", text)


def test_xpk_gets_nasty_words(worker):
    command = tuple(word for word in NASTY if "\n" not in word)
    work = gke_xpk.Workload("tiny", "cluster", tpus.parse("v5e-16"), command, image="image")
    (made,) = [word.removeprefix("--command=") for word in gke_xpk.create(work) if word.startswith("--command=")]
    assert worker[1](kubernetes(made))[0] == command


def test_xpk_refuses_line_breaks():
    with pytest.raises(common.LaunchError, match="line breaks"):
        gke_xpk.Workload("tiny", "cluster", tpus.parse("v5e-16"), ("a\nb",))


def container(text):
    return yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


@settings(max_examples=50, deadline=None)
@given(commands, words)
def test_a_jobset_holds_any_words(command, value):
    made = jobset.Job("tiny", "image", tpus.parse("v5e-16"), command, env=(("GIVEN", value),))
    tree = jobset.manifest(made)
    text = jobset.to_yaml(tree)
    assert yaml.safe_load(text) == tree
    held = container(text)
    assert tuple(map(kubernetes, held["command"])) == ("memjax", *command)
    assert kubernetes({entry["name"]: entry.get("value") for entry in held["env"]}["GIVEN"]) == value


def test_hosts_of_several_slices_are_numbered_through(worker):
    """What a pod's shell makes of the command: the words, and the process's number."""
    made = jobset.manifest(jobset.Job("tiny", "image", tpus.parse("v5e-16"), NASTY, slices=2))
    command = list(map(kubernetes, container(jobset.to_yaml(made))["command"]))
    set_up = "export SLICE=1 JOB_COMPLETION_INDEX=3"
    assert worker[1](f"{set_up}; {shlex.join(command)}")[0] == NASTY
    command[2] = command[2].replace('exec memjax "$@"', "bash -c 'GIVEN=$MEMJAX_PROCESS memjax'")
    assert worker[1](f"{set_up}; {shlex.join(command)}")[1] == "7"


def test_a_jobset_holds_nasty_words():
    tree = jobset.manifest(jobset.Job("tiny", "image", tpus.parse("v5e-16"), NASTY))
    text = jobset.to_yaml(tree)
    assert yaml.safe_load(text) == tree
    assert tuple(map(kubernetes, container(text)["command"])) == ("memjax", *NASTY)


@given(
    st.recursive(
        st.booleans() | st.integers() | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=12,
    )
)
def test_yaml_of_any_tree(tree):
    assert yaml.safe_load(jobset.to_yaml(tree)) == tree


def test_what_is_printed_can_be_pasted(capsys):
    common.show([["memjax", *NASTY]])
    assert tuple(shlex.split(capsys.readouterr().out)) == ("memjax", *NASTY)


def test_the_tarball_holds_what_git_tracks(tmp_path):
    root = tmp_path / "checkout"
    (root / "with space").mkdir(parents=True)
    for name in ("tracked.py", "with space/é.txt", "secret.env"):
        (root / name).write_text(name)
    git = ["git", "-C", str(root), "-c", "core.hooksPath=/dev/null"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "tracked.py", "with space"], check=True)
    assert ship.code_files(root) == ([Path("tracked.py"), Path("with space/é.txt")], 1)
    ship.write_tarball(tmp_path / "out.tar.gz", "exit 3\n", root)
    (tmp_path / "worker").mkdir()
    subprocess.run(["tar", "-xzf", tmp_path / "out.tar.gz", "-C", tmp_path / "worker"], check=True)
    held = {str(path.relative_to(tmp_path / "worker")) for path in (tmp_path / "worker").rglob("*") if path.is_file()}
    assert held == {"code/tracked.py", "code/with space/é.txt", "job.sh"}
    with pytest.raises(common.LaunchError, match="no git checkout"):
        ship.code_files(tmp_path / "worker")
