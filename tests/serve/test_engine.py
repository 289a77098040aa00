"""Answering from a bank: what is read, what is left alone, what is refused, and that nothing compiles anew."""

import jax
import numpy as np
import pytest

from memjax.bank.gate import probe_prompts
from memjax.bank.store import open_bank
from memjax.errors import ArtefactError, BankError, BaseMismatchError, InputError
from memjax.models import generate as g
from memjax.serve import probe, slots
from memjax.write.prompts import ask_tokens
from tests.small_bank import BASE, SAMPLING, STYLE, TEXTS, add, base_text, engine, set_gate
from tests.support import random_adapter


def test_the_memory_of_the_question_is_chosen_and_changes_the_answer(bank):
    answer = engine(bank).ask("How many strings has the harp of Halvic?", gate=False, sampling=SAMPLING)
    assert answer.choice.memory == "harp"
    assert answer.choice.candidates[0].score > answer.choice.candidates[1].score
    assert answer.text != base_text("How many strings has the harp of Halvic?")
    named = engine(bank).ask("How many strings has the harp of Halvic?", memory="ferry", sampling=SAMPLING)
    assert (named.choice.memory, len(named.choice.candidates)) == ("ferry", 1)
    assert named.text != answer.text


def test_a_closed_gate_gives_the_bases_own_text(bank):
    set_gate(bank, 0.0)
    question = "When does the ferry to Vask leave?"
    answer = engine(bank).ask(question, sampling=SAMPLING)
    assert answer.choice.memory is None
    assert answer.text == base_text(question)
    set_gate(bank, 100.0)
    assert engine(bank).ask(question, sampling=SAMPLING).choice.memory == "ferry"


def test_entropies_of_the_probe_are_those_of_each_adapter_alone(bank):
    question = "When does the ferry to Vask leave?"
    answer = engine(bank).ask(question, gate=False, sampling=SAMPLING)
    tokens = ask_tokens(BASE.tokenizer, STYLE, question)
    for candidate in answer.choice.candidates:
        adapter = random_adapter(BASE.config, 1 + list(TEXTS).index(candidate.name), 4)
        (alone,) = probe_prompts(BASE, [tokens], adapter, 1)
        for name in ("entropy", "margin", "kl"):
            np.testing.assert_allclose(getattr(candidate, name), alone[name], atol=1e-4, err_msg=name)
        np.testing.assert_allclose(answer.choice.base_entropy, alone["base_entropy"], atol=1e-4)


def test_answers_do_not_depend_on_what_else_the_bank_holds_or_held(bank):
    question = "When does the ferry to Vask leave?"
    before = engine(bank).ask(question, memory="ferry", sampling=SAMPLING).text
    add(bank, "lamp", 9, text="The lamp of Vask is red.")
    warm = engine(bank)
    assert warm.ask(question, memory="ferry", sampling=SAMPLING).text == before
    bank.delete("lamp")
    bank.delete("harp")
    answer = warm.ask(question, gate=False, sampling=SAMPLING)
    assert answer.text == before
    assert {c.name for c in answer.choice.candidates} == {"ferry", "oven"}
    with pytest.raises(BankError, match="harp"):
        warm.ask(question, memory="harp", sampling=SAMPLING)


def test_one_name_with_other_weights_is_never_answered_from_the_old_ones(bank):
    question = "When does the ferry to Vask leave?"
    warm = engine(bank)
    old = warm.ask(question, memory="ferry", sampling=SAMPLING).text
    bank.delete("ferry")
    add(bank, "ferry", 7)
    new = warm.ask(question, memory="ferry", sampling=SAMPLING).text
    assert new == engine(bank).ask(question, memory="ferry", sampling=SAMPLING).text
    assert new != old


def test_a_second_ask_on_another_memory_compiles_nothing(bank):
    warm = engine(bank)
    warm.ask("When does the ferry leave?", gate=False, sampling=SAMPLING)
    programs = (probe.probe, slots.insert_donated, g.prefill, g.start, g.decode)
    compiled = [p._cache_size() for p in programs]
    add(bank, "lamp", 9, text="The lamp of Vask is red.")
    for question, memory in (("What has strings?", None), ("What is red?", "lamp"), ("Hello", None)):
        warm.ask(question, memory=memory, gate=False, sampling=SAMPLING)
    assert [p._cache_size() for p in programs] == compiled


def test_more_memories_than_slots_take_turns(bank):
    small = engine(bank, resident=2, candidates=2)
    fresh = {name: engine(bank).ask(TEXTS[name], memory=name, sampling=SAMPLING).text for name in TEXTS}
    for _ in range(2):
        for name in TEXTS:
            assert small.ask(TEXTS[name], memory=name, sampling=SAMPLING).text == fresh[name]


def test_a_damaged_memory_is_named_and_the_rest_answers(bank):
    path = bank.folder(bank.get("ferry").id) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    answer = engine(bank).ask("When does the ferry to Vask leave?", gate=False, sampling=SAMPLING)
    assert answer.choice.damaged == ("ferry",)
    assert answer.choice.memory in ("harp", "oven")
    with pytest.raises(ArtefactError, match="adapter_model"):
        engine(bank).ask("When?", memory="ferry", sampling=SAMPLING)


def test_an_empty_bank_leaves_everything_to_the_base(tmp_path):
    with open_bank(tmp_path / "new", create=True, base_id=BASE.id) as bank:
        answer = engine(bank).ask("Hello", sampling=SAMPLING)
    assert answer.choice.memory is None
    assert answer.text == base_text("Hello")


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused_before_a_base_makes_something_of_it(bank, question):
    for asked in (engine(bank).ask, engine(bank).observe):
        with pytest.raises(InputError, match="the question is empty"):
            asked(question)
    with pytest.raises(InputError, match="the question is empty"), engine(bank).probing(question, list(TEXTS), 8):
        pass


def test_another_base_is_refused_by_gate_and_bank(bank, tmp_path):
    set_gate(bank, 1.0, base_id="f" * 64)
    with pytest.raises(BaseMismatchError, match="ffff"):
        engine(bank).ask("Hello", sampling=SAMPLING)
    with pytest.raises(BaseMismatchError) as error:
        open_bank(bank.path, base_id="e" * 64)
    assert "e" * 12 in str(error.value)
    assert BASE.id[:12] in str(error.value)


def test_the_probe_reads_the_prefix_and_does_not_write_it(bank):
    warm = engine(bank)
    entries = [bank.get(name) for name in TEXTS]
    places, _ = warm.pools.fill(entries, warm.pools.read(bank, entries))
    prefix = g.read_prefix(BASE.model, BASE.params, [5, 6, 7])
    before = jax.tree.map(np.array, prefix.segment)
    held = [probe.Held(entry, 0.0, places[entry.id]) for entry in entries]
    forward = warm._probe(prefix, [5, 6, 7, 8], held, "", (), 8).batches[4].first.entropy
    backward = warm._probe(prefix, [5, 6, 7, 8], held[::-1], "", (), 8).batches[4].first.entropy
    np.testing.assert_array_equal(forward[1:4], backward[1:4][::-1])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(prefix.segment), strict=True):
        np.testing.assert_array_equal(old, new)


def test_candidates_of_different_ranks_are_probed_in_buckets_of_their_own(bank):
    add(bank, "lamp", 9, text="The lamp of Vask is red.", rank=12)
    mixed = engine(bank, rank=16, candidates=4)
    question = "Which lamp of Vask, ferry, harp or oven?"
    seen = {c.name: c for c in mixed.observe(question).candidates}
    assert {mixed.pools.place(c.id).rank for c in seen.values()} == {8, 16}
    tokens = ask_tokens(BASE.tokenizer, STYLE, question)
    (alone,) = probe_prompts(BASE, [tokens], random_adapter(BASE.config, 9, 12), 1)
    np.testing.assert_allclose(seen["lamp"].entropy, alone["entropy"], atol=1e-4)
    for name in ("lamp", "ferry"):
        text = mixed.ask(question, memory=name, sampling=SAMPLING).text
        assert text == engine(bank, rank=12).ask(question, memory=name, sampling=SAMPLING).text
    losses = mixed.answer_losses(tokens, "red", [None, "lamp", "ferry"])
    np.testing.assert_allclose(
        losses, engine(bank, rank=12).answer_losses(tokens, "red", [None, "lamp", "ferry"]), atol=1e-5
    )


def test_an_adapter_beyond_the_largest_slot_is_left_out_by_name(bank):
    add(bank, "lamp", 9, text="The lamp of Vask is red.", rank=12)
    answer = engine(bank, rank=8).ask("What lamp is red?", gate=False, sampling=SAMPLING)
    assert answer.choice.damaged == ("lamp",)


def test_losses_are_those_of_the_rows_alone(bank):
    tokens = ask_tokens(BASE.tokenizer, STYLE, "When does it leave?")
    both = engine(bank).answer_losses(tokens, "6:40", [None, "ferry"])
    one = engine(bank).answer_losses(tokens, "6:40", [None])
    np.testing.assert_allclose(both[0], one[0], atol=1e-5)
    assert abs(both[1] - both[0]) > 1e-3
