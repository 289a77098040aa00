"""`memjax eval`: what is printed and written, on a small random base whose answers are given."""

import json

import pytest

from memjax.cli import eval as e
from memjax.cli import eval_common
from memjax.evaluate import choice, ruler_evict, subjects
from tests.cli.test_cli import run
from tests.evaluate.test_choice import record as choice_record
from tests.evaluate.test_longbench import record as longbench_record
from tests.evaluate.test_qa import squad
from tests.support import small_base

BASE = small_base(max_positions=1024)


@pytest.fixture(autouse=True)
def base(monkeypatch):
    for module in (e, eval_common):
        monkeypatch.setattr(module, "load_base", lambda name, bank_base="": BASE)
    monkeypatch.setattr(subjects, "complete", lambda base, prompts, *args, **kw: ["Bavo"] * len(prompts))


def result(path):
    return json.loads((path / "result.json").read_text())


def test_qa_prints_the_marks_and_writes_them(capsys, tmp_path):
    code, out, err = run(capsys, "eval", "qa", "--limit", 12, "--seeds", "0,1", "--out", tmp_path / "out")
    assert code == 0, err
    written = result(tmp_path / "out")
    for mark in ("one_hop", "two_hop", "repeat", "closed_book_over_chance", "common", "common_with_document", "needle_450"):
        assert mark in written
        assert mark in out
    assert written["setting"]["seeds"] == [0, 1]
    assert written["setting"]["base_id"] == BASE.id
    assert written["truncated"] == 0


def test_qa_on_a_squad_file_as_json(capsys, tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(squad()))
    names = "in_context,no_context,retrieval"
    code, out, err = run(capsys, "eval", "qa", "--data", tmp_path / "dev.json", "--subjects", names, "--json")
    assert code == 0, err
    numbers = json.loads(out)
    assert [numbers[f"exact_match/{name}"] for name in names.split(",")] == [0.5] * 3
    assert numbers["exact_match_answerable/retrieval"] == 1
    assert numbers["setting"]["data"].endswith("dev.json")


def test_choice_niah_ruler_and_longbench_write_numbers_and_pictures(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "log_likelihoods", lambda base, prompts, rests, **kw: [-float(len(r)) for r in rests])
    (tmp_path / "csqa.jsonl").write_text(json.dumps(choice_record()) + "\n")
    (tmp_path / "qasper.jsonl").write_text(json.dumps(longbench_record()) + "\n")
    out = tmp_path / "out"
    for args, key, picture in (
        (["choice", "--limit", 5], "accuracy", None),
        (["choice", "--data", tmp_path / "csqa.jsonl"], "accuracy_per_token", None),
        (["niah", "--bins", "64-128", "--limit", 10], "worst_decile/in_context", "niah.png"),
        (
            ["niah", "--bins", "64-128", "--limit", 10, "--policies", "streaming", "--shares", ".5,.9"],
            "exact_match/streaming/0.9/64-128/decile_9",
            "niah.png",
        ),
        (["ruler", "--length", 512, "--limit", 2, "--tasks", "niah_single_1,fwe"], "mean/in_context", "ruler.png"),
        (["longbench", tmp_path], "qasper/in_context", "longbench.png"),
    ):
        code, shown, err = run(capsys, "eval", *args, "--out", out)
        assert code == 0, err
        assert "result.json" in shown
        assert key in result(out)
        assert picture is None or (out / picture).exists()
    assert result(out)["qasper/in_context"] == 1


def test_ruler_by_policies_says_which_tasks_count(capsys, tmp_path, monkeypatch):
    """With answers that are right where less than half is removed, and always wrong in the second task."""

    def answers(base, drawn, config, progress):
        right = [" ".join(item.answers) if "VAR" not in item.query.context else "" for item in drawn]
        kept = {name: wanted.share < 0.5 for name, wanted in config.columns.items()}
        return {name: right if kept.get(name, True) else [""] * len(right) for name in ("full", *kept)}

    monkeypatch.setattr(ruler_evict, "answers", answers)
    out = tmp_path / "out"
    args = ["eval", "ruler", "--length", 512, "--limit", 2, "--policies", "streaming,adakv", "--out", out]
    code, shown, err = run(capsys, *args, "--tasks", "niah_single_1,vt")
    assert code == 0, err
    written = result(out)
    assert (written["mean/full"], written["mean/adakv/0.25"], written["mean/streaming/0.9"]) == (1, 1, 0)
    assert (written["vt/full"], written["niah_single_1/streaming/0"], written["solved_tasks"]) == (0, 1, 1)
    assert written["setting"]["solved"] == ["niah_single_1"]
    assert written["setting"]["question_compressed"] is False
    assert (out / "ruler.png").exists()
    shown = " ".join(shown.split())
    assert "Scored (full cache at least 0.85): niah_single_1 1.00. Not scored: vt 0.00." in shown
    code, shown, err = run(capsys, *args, "--compress-question", "yes", "--shares", "0,.5", "--json", "--tasks", "vt")
    assert code == 0, err
    numbers = json.loads(shown)
    assert numbers["setting"]["question_compressed"] is True
    assert not any(key.startswith("mean") for key in numbers)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["qa", "--subjects", "oracle"], "in_context"),
        (["qa", "--subjects", "bank"], "--bank DIR"),
        (["qa", "--seeds", "0,x"], "--seeds 0,x"),
        (["qa", "--data", "nowhere.json"], "nowhere.json: cannot be read"),
        (["choice", "--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["niah", "--bins", "9"], "LOW-HIGH"),
        (["niah", "--how", "internalize"], "--hyper DIR"),
        (["qa", "--overlap", "4"], "--how internalize"),
        (["ruler", "--length", "4096"], "at most 1024"),
        (["ruler", "--length", "512", "--tasks", "qa_1"], "SQuAD"),
        (["ruler", "--length", "512", "--tasks", "niah_single_1,cwe"], "cwe does not fit into"),
        (["ruler", "--length", "512", "--shares", "0,.5"], "give that too"),
        (["niah", "--shares", ".5"], "give that too"),
        (["niah", "--bins", "2048-4096", "--policies", "snapkv"], "reads at most 1024"),
        (["ruler", "--length", "512", "--policies", "all", "--subjects", "no_context"], "leave --subjects"),
        (["ruler", "--length", "512", "--policies", "all", "--shares", "2"], "--shares 2"),
        (["longbench", "nowhere"], "no file of a LongBench set"),
        (["niah", "--bins", "1000-1050"], "--truncate"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(capsys, args, says):
    code, out, err = run(capsys, "eval", *args)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_context_beyond_the_window_is_cut_on_demand_and_counted(capsys):
    code, out, err = run(capsys, "eval", "niah", "--bins", "1000-1050", "--limit", 10, "--truncate", "--json")
    assert code == 0, err
    assert json.loads(out)["truncated"] == 10
