"""The experiment of compiled buffers at a small size: what is asked and kept, and what a compiler may see."""

import dataclasses
import json

import numpy as np
import pytest

from memjax.bank.store import open_bank
from memjax.errors import ConfigError
from memjax.evaluate import compile as c
from memjax.evaluate import compile_evict as evict
from memjax.evaluate.corpora import Item
from memjax.models.generate import Sampling, generate_all
from memjax.write.compile import CompileConfig
from memjax.write.prompts import prompt_style, read_tokens
from memjax.write.reading import split_prompts
from tests.support import small_base

BASE = small_base(max_positions=1024)
STYLE = prompt_style("plain")
TEXT = "Tavin lives in Orvale. The harp of Halvic is old. Mira keeps the oven. " * 3
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
    for column in ("none", "full", "16", "direct-16", "truncated-16", "snapkv-16"):
        assert numbers[f"right/{column}_items"] == 6
    for column in ("none", "full", "16", "direct-16"):
        assert numbers[f"general/{column}_items"] == 4
    wanted = {f"retain_16x{name}" for name in ("", "_direct", "_truncated", "_snapkv")}
    wanted |= {"harm_points", "harm_points_16x_direct"}
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
    monkeypatch.setattr(c, "ask_kept", refuse)
    again = c.run_compile(BASE, STYLE, RECIPE, CONFIG, out)["numbers"]
    assert {key: value for key, value in again.items() if key != "seconds"} == {
        key: value for key, value in found["numbers"].items() if key != "seconds"
    }


def test_the_beginning_has_as_many_tokens_as_there_are_slots():
    text = next(iter(c.world_items(CONFIG, 0)[0].values()))
    start = c.beginning(BASE, text, 16.0)
    assert text.startswith(start.strip())
    assert len(BASE.tokenizer.encode(start)) == -(-len(BASE.tokenizer.encode(text)) // 16)


def test_snapkv_keeps_the_bytes_of_a_buffer_and_has_not_seen_the_question():
    text, header = TEXT, len(split_prompts(BASE.tokenizer, STYLE, TEXT).header)
    tokens = len(split_prompts(BASE.tokenizer, STYLE, text).context)
    for ratio in (2.0, 16.0):
        kept = evict.kept_tokens(BASE, STYLE, text, ratio)
        slots = -(-tokens // int(ratio))
        at = np.asarray(kept.position)
        held = at >= 0
        assert set(held.sum(axis=-1).ravel()) == {header + slots}
        for row, here in zip(at.reshape(-1, at.shape[-1]), held.reshape(-1, at.shape[-1]), strict=True):
            assert set(range(header)) <= set(row[here])  # the prompt's beginning, as beside a buffer
            assert set(range(header + tokens - slots // 2, header + tokens)) <= set(row[here])  # what observed
        assert int(kept.length[0]) == header + tokens  # behind the text, not behind what is left of it


def test_all_tokens_kept_answer_as_the_text_in_the_prompt_does():
    items = [Item("a", "Where does Tavin live?", ("x",)), Item("a", "Who keeps the oven?", ("x",))]
    said = evict.ask_kept(BASE, STYLE, {"b": "Not asked about.", "a": TEXT}, items, 1.0, 4)
    prompts = [read_tokens(BASE.tokenizer, STYLE, TEXT, item.question) for item in items]
    made = generate_all(BASE.model, BASE.params, prompts, BASE.tokenizer.eos_ids, Sampling(max_tokens=4))
    assert said == [BASE.tokenizer.decode(tokens).strip() for tokens in made]


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
