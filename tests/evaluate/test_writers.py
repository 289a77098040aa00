"""Several processes write what one writes, and say what went wrong in one of them."""

import dataclasses

import pytest

from memjax.bank.store import open_bank
from memjax.config import from_dict, to_dict
from memjax.errors import BankError, ConfigError
from memjax.evaluate import world, writers
from memjax.evaluate.writers import Share, compile_at_ratios, shares, write_texts
from memjax.models.base import load
from memjax.write import compile as compiling
from memjax.write.compile_config import CompileConfig
from memjax.write.distill import DistillConfig
from memjax.write.prompts import prompt_style

RECIPE = DistillConfig(
    rank=2, asked=32, turned=0, cloze=0, continued=0, trust=0.0, steps=3, rows=4, general=6, keep_batch=2
)
TEXTS = {f"text-{n}": doc.text for n, doc in enumerate(world.documents("validation", 3, 2, 40))}


@pytest.fixture(scope="module")
def base():
    return load("tiny")


def opened(folder, base):
    return open_bank(folder, create=True, base_id=base.id, base_name=base.name)


def test_names_are_dealt_out_in_turn_to_as_many_as_get_any():
    assert shares("abcde", 2) == [["a", "c", "e"], ["b", "d"]]
    assert shares("ab", 3) == [["a"], ["b"]]
    assert shares("", 2) == []


def test_a_share_is_the_same_after_its_way_through_json(base):
    style = prompt_style("chat")
    share = Share("distill", base.name, base.id, style, (to_dict(RECIPE),), ("bank",), TEXTS)
    again = from_dict(Share, to_dict(share))
    assert again == share
    assert from_dict(DistillConfig, again.recipes[0]) == RECIPE


def test_what_goes_wrong_in_one_process_is_said_and_the_others_are_stopped(base, tmp_path):
    stranger = dataclasses.replace(base, id="0" * 64)
    with opened(tmp_path / "bank", base) as bank:
        with pytest.raises(BankError, match=r"failed.*base tiny is .* where it was asked for"):
            write_texts(stranger, bank, TEXTS, prompt_style("plain"), RECIPE, jobs=2)
        assert bank.count() == 0


@pytest.mark.slow
def test_two_processes_write_what_one_writes(base, tmp_path):
    style, told = prompt_style("plain"), []
    with opened(tmp_path / "one", base) as one, opened(tmp_path / "two", base) as two:
        write_texts(base, one, TEXTS, style, RECIPE)
        write_texts(base, two, TEXTS, style, RECIPE, jobs=2, progress=told.append)
        assert [two.get(name).id for name in TEXTS] == [one.get(name).id for name in TEXTS]
        assert told[-1] == len(TEXTS)
        write_texts(base, two, TEXTS, style, RECIPE, jobs=2)  # nothing is left to write
        assert two.count() == len(TEXTS)


def test_one_lesson_of_a_text_compiles_it_at_every_ratio_as_alone(base, tmp_path, monkeypatch):
    style, recipe = prompt_style("plain"), CompileConfig(
        rank=2, asks=2, asked=16, turned=0, cloze=0, trust=0.0, windows=1, queries=1, general=6, steps=2, eval_every=2,
        probes=0, window=16, scope="buffer", layout="spread", written="within",
    )  # fmt: skip
    text = {"text-0": world.documents("validation", 3, 1, 120)[0].text}
    lessons = []

    def counted(*args):
        lessons.append(args)
        return real(*args)

    real = compiling._lesson
    monkeypatch.setattr(compiling, "_lesson", counted)
    told = []
    with (
        opened(tmp_path / "4", base) as four,
        opened(tmp_path / "8", base) as eight,
        opened(tmp_path / "alone", base) as alone,
    ):
        banks = [(bank, dataclasses.replace(recipe, ratio=ratio)) for bank, ratio in ((four, 4.0), (eight, 8.0))]
        compile_at_ratios(base, banks, text, style, progress=told.append)
        assert (len(lessons), told) == (1, [1, 2])
        write_texts(base, alone, text, style, banks[1][1])
        assert len(lessons) == 2
        assert alone.get("text-0").id == eight.get("text-0").id != four.get("text-0").id
        monkeypatch.setattr(writers, "compile_context", lambda *args, **more: pytest.fail("was written already"))
        compile_at_ratios(base, banks, text, style)
        with pytest.raises(ConfigError, match="differ in more"):
            compile_at_ratios(base, [(four, recipe), (eight, dataclasses.replace(recipe, rank=4))], text, style)
    assert compiling.make_lesson(base, text["text-0"], style, dataclasses.replace(recipe, layout="in_place")) is None
