"""Metrics: lines survive kills and resumes, writers and pictures come on request."""

import json
import sys
import types

import numpy as np
import pytest

from memjax.errors import ConfigError, DataError
from memjax.train.metrics import Bar, Recorder, count_tokens, open_writer, read_metrics
from memjax.train.plot import loss_curve


def write(folder, steps, **kwargs):
    recorder = Recorder(folder, **kwargs)
    for step in steps:
        recorder.write(step, {"loss": 1.0 / step})
    recorder.close()
    return read_metrics(recorder.path)


def test_resuming_drops_lines_of_steps_that_will_be_redone(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    lines = write(tmp_path, [3, 4, 5], step=2)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert write(tmp_path, [1]) == [{"step": 1, "loss": 1.0}]  # a fresh run starts a fresh file


def test_a_half_written_last_line_is_ignored_and_any_other_is_an_error(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert [line["step"] for line in write(tmp_path, [3], step=2)] == [1, 2, 3]
    path.write_text('{"step": 1}\n[]\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2"):
        read_metrics(path)


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.write(1, {"loss": float("nan"), "rate": float("inf")})
    recorder.close()
    json.loads(recorder.path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    line = read_metrics(recorder.path)[0]
    assert np.isnan(line["loss"])
    assert line["rate"] == np.inf


def test_unknown_and_missing_writers(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="known: tensorboard, wandb"):
        open_writer("tensorbord", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now fails
    with pytest.raises(ConfigError, match="pip install wandb"):
        open_writer("wandb", tmp_path, {})


def test_wandb_gets_numbers_of_a_run_that_can_go_on(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    fake = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        recorder = Recorder(tmp_path, writers=["wandb"], run={"steps": 3})
        recorder.write(1, {"loss": 2, "note": "text"})
        recorder.close()
    assert calls[0]["id"] == calls[3]["id"]
    assert calls[0]["resume"] == "allow"
    assert calls[0]["config"] == {"steps": 3}
    assert calls[1:3] == [(1, {"loss": 2.0}), "end"]


def test_tokens_are_counted_without_padding():
    assert count_tokens({"tokens": np.zeros((2, 3)), "segments": np.array([[1, 1, 0], [1, 2, 2]])}) == 5
    assert count_tokens({"tokens": np.zeros((2, 3))}) == 6
    assert count_tokens([1]) == 0
    assert count_tokens({"x": 1}) == 0


def test_the_bar_is_silent_when_nobody_looks(capsys):
    with Bar("x", 3) as bar:
        bar.advance()
        bar.note({"loss": 1.0, "tokens_per_second": 5.0})
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_loss_and_speed(capsys):
    with Bar("train", 3, show=True) as bar:
        bar.advance()
        bar.note({"loss": 1.25, "tokens_per_second": 1234.0})
    assert "loss 1.2500  1,234 tokens/s" in " ".join(capsys.readouterr().err.split(" "))


def test_loss_curve_is_a_picture(tmp_path):
    lines = [{"step": s, "loss": 100.0 / s, "learning_rate": 0.1} for s in range(1, 30)] + [{"step": 29, "eval/loss": 3.0}]
    assert loss_curve(lines, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert loss_curve([], tmp_path / "b.png").exists()
