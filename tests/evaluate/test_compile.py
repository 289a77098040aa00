"""The experiment of compiled buffers at a small size: what is asked and kept, and what a compiler may see."""

import dataclasses
import json

import pytest

from memjax.bank.store import open_bank
from memjax.errors import ConfigError
from memjax.evaluate import compile as c
from memjax.write.compile import CompileConfig
from memjax.write.prompts import prompt_style
from tests.support import small_base

BASE = small_base(max_positions=1024)
STYLE = prompt_style("plain")
RECIPE = CompileConfig(
    rank=2, sites=("q",), steps=2, windows=2, queries=2, window=8, cue=4, general=6, answer_tokens=4, eval_every=2
)
CONFIG = c.CompileEval(documents=1, questions=6, general=4, ratios=(16.0,), methods=("compiled", "direct"), answer_tokens=4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("compile")
    return out, c.run_compile(BASE, STYLE, RECIPE, CONFIG, out)


def test_every_column_answers_every_question(ran):
    out, found = ran
    numbers = found["numbers"]
    for column in ("none", "full", "16", "direct-16", "truncated-16"):
        assert numbers[f"right/{column}_items"] == 6
    for column in ("none", "full", "16", "direct-16"):
        assert numbers[f"general/{column}_items"] == 4
    wanted = {"retain_16x", "retain_16x_direct", "retain_16x_truncated", "harm_points", "harm_points_16x_direct"}
    assert wanted <= set(numbers)
    assert numbers["harm_points"] == numbers["harm_points_16x"]
    assert numbers["seconds/direct-16_items"] == numbers["held_out_kl_recon/16_items"] == 1
    assert c.draw_ratios(out / "ratios.png", numbers, CONFIG).stat().st_size > 1000


def test_buffers_have_a_slot_for_so_many_tokens_and_know_no_question(ran):
    out, _ = ran
    texts, items = c.world_items(CONFIG, 0)
    assert {item.name for item in items} == set(texts)
    for ratio in CONFIG.ratios:
        with open_bank(out / "seed-0" / f"bank-{ratio:g}") as bank:
            for name, text in texts.items():
                tokens = len(BASE.tokenizer.encode(text))
                assert bank.text(name) == text
                assert not bank.questions(name)
                manifest = json.loads((bank.folder(bank.get(name).id) / "memory.json").read_text())
                assert not any(item.question in json.dumps(manifest) for item in items)
                assert abs(manifest["provenance"]["metrics"]["slots"] - tokens / ratio) <= 1


def test_a_second_run_goes_on_with_what_there_is(ran, monkeypatch):
    out, found = ran
    refuse = lambda *args, **more: pytest.fail("was made already")
    monkeypatch.setattr(c, "compile_context", refuse)
    monkeypatch.setattr(c, "make_subjects", refuse)
    monkeypatch.setattr(c, "Engine", refuse)
    again = c.run_compile(BASE, STYLE, RECIPE, CONFIG, out)["numbers"]
    assert {key: value for key, value in again.items() if key != "seconds"} == {
        key: value for key, value in found["numbers"].items() if key != "seconds"
    }


def test_the_beginning_has_as_many_tokens_as_there_are_slots():
    text = next(iter(c.world_items(CONFIG, 0)[0].values()))
    start = c.beginning(BASE, text, 16.0)
    assert text.startswith(start.strip())
    assert len(BASE.tokenizer.encode(start)) == -(-len(BASE.tokenizer.encode(text)) // 16)


def test_every_method_has_a_column_for_every_ratio():
    columns = c.CompileEval(ratios=(4.0, 16.0), methods=("compiled", "coupled")).columns()
    assert columns == {
        "4": ("compiled", 4),
        "16": ("compiled", 16),
        "coupled-4": ("coupled", 4),
        "coupled-16": ("coupled", 16),
    }
    for changes in c.METHODS.values():
        dataclasses.replace(RECIPE, **changes)


def test_wrong_sizes_are_refused():
    with pytest.raises(ConfigError, match="ratios"):
        c.CompileEval(ratios=(0.5,))
    with pytest.raises(ConfigError, match="'magic' is unknown"):
        c.CompileEval(methods=("magic",))
    with pytest.raises(ConfigError, match="general is 0"):
        c.CompileEval(general=0)
