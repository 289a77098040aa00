"""Names of slices, and what launchers refuse: one line that names the thing and the way out."""

import dataclasses
import os
import sys

import pytest

from launch import common, gke_xpk, jobset, local, tpu_queued, tpus


@pytest.mark.parametrize(
    ("name", "accelerator", "topology", "hosts", "chips"),
    [
        ("v5e-16", "v5litepod-16", "4x4", 4, 16),
        ("v5litepod-1", "v5litepod-1", "1x1", 1, 1),
        ("v6e-8", "v6e-8", "2x4", 2, 8),
        ("v5p-64", "v5p-64", "2x4x4", 8, 32),
        ("v4-8", "v4-8", "2x2x1", 1, 4),
        ("v5p-4x4x12", "v5p-384", "4x4x12", 48, 192),
        ("tpu7x-8", "tpu7x-8", "2x2x1", 1, 4),
    ],
)
def test_names_of_slices(name, accelerator, topology, hosts, chips):
    found = tpus.parse(name)
    assert (found.accelerator_type, found.topology, found.hosts, found.chips) == (accelerator, topology, hosts, chips)
    assert found.hosts * found.chips_per_host == chips


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("h100-8", "unknown generation; use one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5e", "use v5e-N with N of 1, 4, 8, 16"),
        ("v5e-17", "no usual size"),
        ("v5p-7", "no usual size"),
        ("v5e-4x4x4", "2 dimensions, as in 4x4"),
        ("v5p-1x3x3", "9 chips do not fill hosts of 4"),
    ],
)
def test_what_is_no_slice(name, told):
    with pytest.raises(common.LaunchError, match=told):
        tpus.parse(name)


QUEUED = ["--name", "tiny", "--zone", "z", "--tpu", "v5e-16"]
REFUSED = [
    (tpu_queued, [*QUEUED], "no memjax command; add it after --"),
    (tpu_queued, ["--name", "Tiny!", "--zone", "z", "--tpu", "v5e-16", "--", "x"], "lowercase letters"),
    (tpu_queued, ["--name", "tiny", "--zone", "z", "--tpu", "tpu7x-8", "--", "x"], "run it on GKE"),
    (tpu_queued, [*QUEUED, "--spot", "--reserved", "--", "x"], "exclude each other"),
    (tpu_queued, [*QUEUED, "--bucket", "gs://b", "--", "x"], "without gs://"),
    (tpu_queued, [*QUEUED, "--collect", "../../.ssh", "--", "x"], "a path in the checkout"),
    (tpu_queued, [*QUEUED, "--collect", "a b", "--", "x"], "a path in the checkout"),
    (tpu_queued, [*QUEUED, "--slices", "0", "--", "x"], "--slices must be at least 1"),
    (tpu_queued, [*QUEUED, "--env", "HF_TOKEN=abc", "--", "x"], "put it into a file for --env-file"),
    (tpu_queued, [*QUEUED, "--env", "oops", "--", "x"], "write NAME=VALUE"),
    (tpu_queued, [*QUEUED, "--env-file", "/nowhere", "--", "x"], "give a readable file"),
    (local, ["--devices", "8", "--", "x"], "add --platform cpu"),
    (gke_xpk, ["delete", "--cluster", "c"], "delete needs --name"),
    (gke_xpk, ["create", "--cluster", "c", "--name", "a", "--tpu", "v5e-16", "--env-file", "/no", "--", "x"], "such file"),
    (jobset, ["--name", "tiny", "--image", "i", "--tpu", "v5e-16"], "no memjax command"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "argv", "told"), REFUSED, ids=[told for _, _, told in REFUSED])
def test_refused_in_one_line(module, argv, told, capsys):
    assert common.finish(module.launch, argv) == common.WRONG_USE
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert told in err
    assert "abc" not in err  # the secret


@pytest.mark.parametrize("name", ["HF_TOKEN", "api_key", "WANDB_API_KEY", "MY_SECRET_1", "PASSWORD", "APIKEY"])
def test_what_looks_like_a_secret_is_refused(name):
    with pytest.raises(common.LaunchError, match="--env-file") as caught:
        common.variables([f"{name}=abc"])
    assert "abc" not in str(caught.value)


def test_what_only_sounds_like_one_is_not():
    assert common.variables(["TOKENIZERS_PARALLELISM=false", "A="]) == {"TOKENIZERS_PARALLELISM": "false", "A": ""}


def test_a_line_of_an_env_file_is_named_and_not_shown(tmp_path):
    (tmp_path / "env").write_text("A=1\n\n# fine\nmy secret\n")
    with pytest.raises(common.LaunchError, match="line 4: write NAME=VALUE") as caught:
        common.read_env_file(tmp_path / "env")
    assert "my secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (("train", "base", "c.yaml"), ("train", "base", "c.yaml", "--resume")),
        (("train", "base", "--resume"), ("train", "base", "--resume")),
        (("train", "router", "./bank"), ("train", "router", "./bank")),
        (("eval", "qa"), ("eval", "qa")),
    ],
)
def test_only_training_resumes(command, wanted):
    assert common.resumed(command) == wanted


def test_configs_are_frozen():
    for config in (tpus.Slice, tpus.Generation, local.Local, gke_xpk.Workload, jobset.Job, tpu_queued.Queued):
        assert dataclasses.is_dataclass(config)
        assert config.__dataclass_params__.frozen


def test_local_hands_over_to_memjax_with_its_environment(tmp_path, monkeypatch):
    (tmp_path / "env").write_text("HF_TOKEN=abc\n")
    monkeypatch.setattr(local, "program", lambda: "/bin/memjax")
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1 --xla_force_host_platform_device_count=2")
    called = []
    monkeypatch.setattr(os, "execve", lambda *args: called.append(args))
    local.launch(["--platform", "cpu", "--devices", "4", "--env-file", str(tmp_path / "env"), "--", "ask", "a b?"])
    ((path, argv, env),) = called
    assert (path, argv) == ("/bin/memjax", ["/bin/memjax", "ask", "a b?"])
    wanted = {
        "HF_TOKEN": "abc",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_other=1 --xla_force_host_platform_device_count=4",
    }
    assert wanted.items() <= env.items()


def test_local_finds_memjax_beside_this_python(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(common.LaunchError, match="pip install -e"):
        local.program()
    (tmp_path / "memjax").touch()
    assert local.program() == str(tmp_path / "memjax")


def test_launchers_need_the_standard_library_only():
    """They run on machines where memjax is not installed. What converts a pickle needs torch, and launches nothing."""
    import ast

    from launch import ship

    for path in set((ship.ROOT / "launch").glob("*.py")) - set((ship.ROOT / "launch").glob("convert_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
            if isinstance(node, ast.Import | ast.ImportFrom):
                roots = {name.split(".")[0] for name in names}
                assert roots <= sys.stdlib_module_names | {"launch"}, path
