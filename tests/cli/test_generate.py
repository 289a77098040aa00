"""`memjax generate` with a bounded cache: what is kept, what is refused, and that a budget large enough changes nothing."""

import json

import pytest
from click.testing import CliRunner

from memjax.cli.generate import generate
from memjax.cli.main import main
from memjax.evict.policies import DEFAULT_POLICY, POLICIES
from tests.support import small_base

BASE = small_base()
TEXT = "The ferry to Halvic leaves at dawn, and the harp has 72 strings. "


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("memjax.cli.generate.load_base", lambda name: BASE)


@pytest.fixture
def run(capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 6)

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            main(["generate", "In short:", "--file", str(path), "--max-tokens", "4", *args])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_a_budget_bounds_what_is_kept(run):
    code, out, _ = run("--budget", "25%", "--policy", "streaming", "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["prompt_tokens"] > 100
    assert (shown["kept_tokens"], shown["policy"], shown["budget"]) == (shown["prompt_tokens"] // 4, "streaming", "25%")
    assert shown["cache_bytes"] > 0


def test_a_budget_that_holds_everything_is_no_budget(run):
    plain = json.loads(run("--json")[1])
    wide = json.loads(run("--json", "--budget", "400")[1])
    assert wide["text"] == plain["text"]
    assert wide["kept_tokens"] == plain["prompt_tokens"]
    assert "kept_tokens" not in plain


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "0"], "at least 1 token"),
        (["--budget", "lots"], "512 or 25%"),
        (["--budget", "16", "--policy", "snapvk"], "the nearest is snapkv"),
        (["--policy", "snapkv"], "--budget 512"),
        (["--budget", "16", "--max-tokens", "1000"], "at most 512"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run, args, message):
    code, _, err = run(*args)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_help_names_every_policy():
    shown = " ".join(CliRunner().invoke(generate, ["--help"]).output.split())
    assert all(policy.name in shown for policy in POLICIES)
    assert f"{DEFAULT_POLICY} (default)" in shown
