"""Several processes write what one writes, and say what went wrong in one of them."""

import dataclasses

import pytest

from memjax.bank.store import open_bank
from memjax.config import from_dict, to_dict
from memjax.errors import BankError
from memjax.evaluate import world
from memjax.evaluate.writers import Share, shares, write_texts
from memjax.models.base import load
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
    share = Share("distill", base.name, base.id, style, to_dict(RECIPE), "bank", TEXTS)
    again = from_dict(Share, to_dict(share))
    assert again == share
    assert from_dict(DistillConfig, again.recipe) == RECIPE


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
