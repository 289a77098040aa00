"""`memjax chat`, `memjax train router` and the refusals of `memjax eval bank`, on a small random base."""

import io
import json

import pytest

from memjax.bank.store import open_bank
from memjax.cli import ask, chat, train
from memjax.models import encoder
from tests.cli.test_cli import run
from tests.serve.test_learn import HELD
from tests.small_bank import BASE, TEXTS, add


@pytest.fixture
def bank(tmp_path, monkeypatch):
    for place in (chat, train):
        monkeypatch.setattr(place, "load_base", lambda name, bank_base="": BASE)
    monkeypatch.setattr(encoder, "available_encoder", lambda retrieve="auto": None)
    monkeypatch.setattr(BASE.tokenizer, "prompt_style", "plain")
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        for seed, name in enumerate(TEXTS, start=1):
            held = [{"question": q, "entropy": 1.0, "base_entropy": 2.0} for q in HELD[name]]
            add(bank, name, seed, questions={"held_out": held, "general": []})
    return tmp_path / "bank"


def test_a_conversation_from_standard_input(bank, capsys, monkeypatch):
    lines = "How many strings has the harp?\n/memory ferry\nWhen?\n\n/auto\n/new\n/huh\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, err = run(capsys, "chat", "--bank", bank, "--no-gate", "--max-tokens", 4, "--json")
    assert code == 0, err
    turns = json.loads(out)["turns"]
    assert [(t["question"], t["memory"]) for t in turns] == [
        ("How many strings has the harp?", "harp"),
        ("When?", "ferry"),
    ]
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"]
    assert "/huh is no command" in err
    code, _, err = run(capsys, "chat", "--bank", bank, "--memory", "harpp")
    assert code == 2
    assert "did you mean 'harp'" in err


def test_a_conversation_about_a_text_in_a_bounded_cache(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ask, "load_base", lambda name, bank_base="": BASE)
    (tmp_path / "notes.txt").write_text(" ".join(TEXTS.values()) * 3)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n/auto\n/new\nWhen?\n/quit\nnever asked\n"))
    args = ["chat", "--file", tmp_path / "notes.txt", "--budget", "50%", "--max-tokens", 4]
    code, out, err = run(capsys, *args, "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert [turn["question"] for turn in shown["turns"]] == ["Who?", "When?"]
    assert all(0.4 < turn["kept_tokens"] / turn["prompt_tokens"] < 0.6 for turn in shown["turns"])
    assert "/auto is no command" in err
    code, _, err = run(capsys, *args, "--memory", "harp")
    assert code == 2
    assert "leave --memory out" in err


def test_a_router_is_trained_and_said(bank, capsys):
    settings = ["epochs=2", "batch=4", "validation=0.0", "candidates=3"]
    code, out, err = run(capsys, "train", "router", bank, *settings, "--gate", "difference", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["router"]["questions"] == 6
    assert found["gate"]["rule"] == "difference"
    code, _, err = run(capsys, "train", "router", bank, "epoch=2")
    assert code == 2
    assert "epochs" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [(["--parts", "main,all"], "near"), (["--documents", 1], "at least 2"), (["--seeds", "x"], "--seeds x")],
)
def test_what_the_experiment_cannot_do_is_said_in_one_line(capsys, tmp_path, args, says):
    code, out, err = run(capsys, "eval", "bank", "--out", tmp_path / "out", *args)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1
