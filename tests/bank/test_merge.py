"""Several memories as one: votes, mixtures, and a merged memory in the bank."""

import numpy as np
import pytest

from memjax.bank import merge as m
from memjax.bank.manage import parts_in
from memjax.errors import ArtefactError, BankError, InputError
from memjax.memory.adapter import Adapter
from memjax.memory.files import read_artefact
from memjax.models.decoder import site_shapes
from memjax.models.weights import SITE_MODULES
from tests.memory.test_adapter import assert_deltas, deltas
from tests.small_bank import BASE, TEXTS
from tests.support import random_adapter


def adapter_of(bank, name):
    folder = bank.folder(bank.get(name).id)
    return Adapter(*read_artefact(folder, site_shapes(BASE.config), BASE.config.num_layers, SITE_MODULES).artefact)


def test_answers_that_say_the_same_are_counted_together():
    answers = ["Paris.", "Lyon", "paris", "Rome"]
    assert m.vote(answers) == (0, 0.5)
    assert m.vote(answers, [0.1, 0.3, 0.4, 0.2]) == (2, pytest.approx(0.5))
    assert m.vote(answers, [0.1, 0.7, 0.1, 0.1])[0] == 1
    assert m.vote(["b", "a"]) == (0, 0.5)
    assert m.vote(["only"], [0.3]) == (0, 1.0)
    for bad in (([], None), (["a"], [1, 2]), (["a"], [0]), (["a", "b"], [1, -1])):
        with pytest.raises(InputError, match="a vote needs"):
            m.vote(*bad)


def test_a_mixture_of_tokens_is_the_mean_of_probabilities():
    logits = np.random.default_rng(0).normal(0, 3, (3, 50)).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    weights = np.array([2.0, 1.0, 1.0], np.float32)
    np.testing.assert_allclose(np.exp(m.mix_tokens(logits, weights)), weights / 4 @ probabilities, atol=1e-6)
    alone = m.mix_tokens(logits, np.array([0.0, 1.0, 0.0], np.float32))
    np.testing.assert_allclose(alone, np.log(probabilities[1]), atol=1e-5)
    np.testing.assert_allclose(m.mix_tokens(logits[:1], weights[:1]), np.log(probabilities[0]), atol=1e-5)


def test_merging_one_is_itself_and_a_weight_of_one_is_the_first():
    first, second = random_adapter(BASE.config, 1), random_adapter(BASE.config, 2)
    for way in m.WAYS:
        one, error = m.merge_adapters([first], way, density=1.0)
        assert error < 1e-3
        assert_deltas(one, deltas(first), 1e-4)
        one, _ = m.merge_adapters([first, second], way, [1.0, 0.0], density=1.0)
        assert_deltas(one, deltas(first), 1e-4)
    both, error = m.merge_adapters([first, second], "sum", rank=8)
    assert error < 1e-3
    assert_deltas(both, {site: deltas(first)[site] + deltas(second)[site] for site in deltas(first)}, 1e-4)
    assert m.merge_adapters([first, second], "sum")[1] > 0.3  # rank 4 does not hold it
    with pytest.raises(InputError, match="no way to merge"):
        m.merge_adapters([first], "average")


def test_a_merged_memory_is_a_memory(bank):
    entry, error = m.merge(bank, BASE.config, ["ferry", "harp"], "both", way="sum", rank=8)
    assert error < 1e-3
    assert bank.verify().ok
    assert bank.text("both") == f"{TEXTS['ferry']}\n\n{TEXTS['harp']}"
    ferry, harp = deltas(adapter_of(bank, "ferry")), deltas(adapter_of(bank, "harp"))
    assert_deltas(adapter_of(bank, "both"), {site: ferry[site] + harp[site] for site in ferry}, 1e-4)
    again, _ = m.merge(bank, BASE.config, ["ferry", "harp"], "both", way="sum", rank=8)
    assert again == entry
    assert m.merge(bank, BASE.config, ["ferry", "harp"], "other", way="sum", rank=8)[0].id == entry.id
    with pytest.raises(InputError, match="two different"):
        m.merge(bank, BASE.config, ["ferry", "ferry"], "x")
    with pytest.raises(BankError, match="'both' is taken"):
        m.merge(bank, BASE.config, ["ferry", "oven"], "both", way="sum")


def test_what_a_merged_memory_still_holds_is_told(bank):
    m.merge(bank, BASE.config, ["ferry", "harp"], "both", way="sum")
    m.merge(bank, BASE.config, ["both", "oven"], "all", way="sum")
    ferry, oven = bank.get("ferry").id, bank.get("oven").id
    assert parts_in(bank, [ferry]) == ("all", "both")
    assert parts_in(bank, [oven]) == ("all",)
    gone = bank.delete("ferry")
    assert parts_in(bank, gone) == ("all", "both")
    bank.delete("both")
    assert parts_in(bank, gone) == ("all",)
    assert parts_in(bank, gone, "elsewhere") == ()


def test_a_damaged_part_is_named(bank):
    (bank.folder(bank.get("harp").id) / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtefactError, match=r"adapter_model\.safetensors is damaged"):
        m.merge(bank, BASE.config, ["ferry", "harp"], "both")
