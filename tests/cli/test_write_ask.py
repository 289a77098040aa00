"""Write and ask through the command line, on a small random base."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from memjax.bank.gate import Gate
from memjax.bank.store import open_bank
from memjax.cli import ask, write
from memjax.models import encoder
from memjax.write import compile as compiling
from memjax.write import distill
from tests.bank.test_add import BASE, CONFIG, TEXT
from tests.cli.test_cli import run
from tests.small_bank import add_buffer


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(write, "load_base", lambda name, bank_base="": BASE)
    monkeypatch.setattr(ask, "load_base", lambda name, bank_base="": BASE)
    monkeypatch.setattr(distill, "recipe", lambda *_: CONFIG)
    monkeypatch.setattr(encoder, "available_encoder", lambda retrieve: None)
    monkeypatch.setattr(BASE.tokenizer, "prompt_style", "plain")


def test_a_file_is_written_and_asked(capsys, tmp_path, small):
    (tmp_path / "notes.txt").write_text(TEXT)
    code, out, err = run(capsys, "write", tmp_path / "notes.txt", "--bank", tmp_path / "bank", "--json")
    assert code == 0, err
    first = json.loads(out)
    assert (first["name"], first["new"]) == ("notes", True)
    code, out, _ = run(capsys, "write", tmp_path / "notes.txt", "--bank", tmp_path / "bank", "--json")
    assert json.loads(out) == {**first, "new": False, "metrics": {}, "seconds": json.loads(out)["seconds"]}
    code, out, _ = run(capsys, "ask", "When does the Grey Heron leave?", "--bank", tmp_path / "bank", "--json", "--explain")
    answer = json.loads(out)
    assert code == 0
    assert answer["choice"]["candidates"][0]["name"] == "notes"
    assert answer["base_first_token"] > 0
    code, out, _ = run(capsys, "ask", "When?", "--bank", tmp_path / "bank", "--memory", "notes", "--explain")
    assert "named by the caller" in out.replace("\n", " ")
    assert "ratio of first tokens" in out


def test_a_file_is_compiled_and_told_what_it_costs(capsys, tmp_path, small, monkeypatch):
    recipe = compiling.CompileConfig(
        rank=2, sites=("q",), steps=2, windows=2, queries=2, window=8, cue=4, general=6, answer_tokens=4, probes=0
    )
    monkeypatch.setattr(compiling, "recipe", lambda effort, ratio, *rest: dataclasses.replace(recipe, ratio=ratio))
    (tmp_path / "notes.txt").write_text(TEXT * 2)
    command = ["write", tmp_path / "notes.txt", "--bank", tmp_path / "bank", "--how", "compile", "--ratio", "8"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    told = " ".join(out.split())
    assert re.search(r"102 of them in 13 slots, loss held out in nats: text \d", told), told
    assert re.search(r"first token in \d+ ms instead of \d+: (paid for after [\d,]+ questions|no faster)", told), told
    again = json.loads(run(capsys, *command, "--json")[1])
    assert (again["new"], "break_even" in again) == (False, False)


@pytest.mark.parametrize("how", ["vote", "mix"])
def test_several_memories_answer_together(capsys, tmp_path, small, how):
    for name in ("notes", "more"):
        (tmp_path / f"{name}.txt").write_text(f"{TEXT} It is called {name}.")
        assert run(capsys, "write", tmp_path / f"{name}.txt", "--bank", tmp_path / "bank", "--json")[0] == 0
    asked = ["ask", "When?", "--bank", tmp_path / "bank", "--memory", "notes", "--memory", "more", "--compose", how]
    code, out, _ = run(capsys, *asked, "--json")
    assert code == 0
    made = json.loads(out)
    assert (made["how"], made["memories"]) == (how, ["notes", "more"])
    code, out, _ = run(capsys, *asked)
    assert code == 0
    assert f"by a {how} of notes, more" in out.replace("\n", " ")
    assert out.startswith(made["text"])
    code, _, err = run(capsys, *asked[:-1], "shift")
    assert (code, "'notes' is an adapter, and only buffers are read at once" in err) == (2, True)


def test_buffers_are_read_at_once_by_name_or_the_nearest(capsys, tmp_path, small):
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        for name in ("ferry", "harp"):
            add_buffer(bank, name)
    asked = ["ask", "When does the ferry to Vask leave?", "--bank", tmp_path / "bank", "--compose", "shift", "--json"]
    named = json.loads(run(capsys, *asked, "--memory", "ferry", "--memory", "harp")[1])
    assert (named["how"], named["memories"]) == ("shift", ["ferry", "harp"])
    nearest = json.loads(run(capsys, *asked, "--candidates", "2")[1])
    assert (nearest["text"], nearest["memories"]) == (named["text"], ["ferry", "harp"])


def test_options_of_other_ways_of_writing_are_refused(capsys, tmp_path):
    for options, told in ((["--distractors", "2"], "--how compile"), (["--chunk", "90"], "--how internalize and --how")):
        code, _, err = run(capsys, "write", tmp_path / "notes.txt", "--bank", tmp_path / "bank", *options)
        assert (code, told in err) == (2, True)


def test_a_bank_of_another_base_is_refused_with_both_ids(capsys, tmp_path, small):
    open_bank(tmp_path / "bank", create=True, base_id="e" * 64, base_name="other").close()
    (tmp_path / "notes.txt").write_text(TEXT)
    for command in (["write", tmp_path / "notes.txt"], ["ask", "When?"]):
        code, _, err = run(capsys, *command, "--bank", tmp_path / "bank")
        assert code == 2
        assert "eeeeeeee" in err
        assert BASE.id[:8] in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_write_leaves_exactly_what_was_committed(tmp_path, sent):
    script = textwrap.dedent(
        """
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
        from memjax.bank import add as a
        from memjax.bank.store import open_bank
        from tests.bank.test_add import BASE, CONFIG, STYLE, TEXT
        with open_bank(sys.argv[1], create=True, base_id=BASE.id) as bank:
            for number in range(100):
                a.add_text(BASE, bank, f"{TEXT} Room {number} is red.", f"m{number}", STYLE, CONFIG)
                print(number, flush=True)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "bank")], stdout=subprocess.PIPE, text=True, env=environment
    )
    committed = [child.stdout.readline() for _ in range(2)]
    child.send_signal(sent)
    committed += child.communicate()[0].splitlines()
    assert child.returncode != 0
    with open_bank(tmp_path / "bank") as bank:
        assert bank.verify().ok
        assert len(committed) <= bank.count() <= len(committed) + 1
        assert {f"m{int(n)}" for n in committed} <= set(bank.names())


def test_explain_says_of_each_candidate_what_the_gates_own_rule_says():
    from memjax.cli.ask import gate_cell
    from memjax.serve.choose import Candidate, Observed, choose

    near, far = Candidate("near", "near", 1.0, 3.0, kl=0.9), Candidate("far", "far", 1.0, 0.5, kl=0.1)
    seen = Observed((near, far), 4.0, np.zeros((3, 8), np.float32))

    def cells(gate):
        choice, _ = choose(seen, "entropy", gate)
        return [gate_cell(choice, c) for c in choice.candidates]

    gate = lambda rule, threshold, **more: Gate(threshold, 1.0, 1, 1, "base", "template", 1, rule, **more)
    assert cells(gate("kl", -0.4)) == ["open -0.90", "closed -0.10"]
    assert cells(gate("entropy", 1.0)) == ["closed 3.00", "open 0.50"]
    assert cells(gate("logistic", 1.0, weights=(-1.0, 0, 0, 0, 0, 0))) == ["closed 3.00", "open 0.50"]
    assert cells(gate("none", 1.0)) == cells(None) == ["-", "-"]


def test_a_text_is_asked_through_a_bounded_cache(capsys, tmp_path, small):
    (tmp_path / "notes.txt").write_text(TEXT * 3)
    asked = ["ask", "When does it leave?", "--file", tmp_path / "notes.txt", "--max-tokens", 4]
    code, out, err = run(capsys, *asked, "--budget", 32, "--policy", "streaming", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["kept_tokens"], answer["budget"], answer["policy"]) == (32, "32", "streaming")
    assert answer["prompt_tokens"] > 32
    for args, says in (
        ([*asked], "--budget 512"),
        ([*asked, "--budget", 32, "--bank", tmp_path], "leave --bank out"),
        ([*asked, "--budget", 32, "--memory", "notes"], "leave --memory out"),
        ([*asked, "--budget", 32, "--explain"], "leave --explain out"),
        ([*asked, "--budget", 32, "--candidates", 2], "leave --candidates out"),
        ([*asked, "--budget", 32, "--compose", "mix"], "leave --compose out"),
        ([*asked, "--budget", 32, "--namespace", "mine"], "leave --namespace out"),
        ([*asked, "--budget", 32, "--policy", "snapvk"], "nearest is snapkv"),
        (["ask", "When?", "--bank", tmp_path, "--budget", 32], "with --file"),
        (["ask", "When?", "--policy", "snapkv"], "--policy bounds"),
        (["ask", "When?"], "--bank DIR, or a text"),
    ):
        code, out, err = run(capsys, *args)
        assert (code, out) == (2, "")
        assert says in err
        assert len(err.strip().splitlines()) == 1
