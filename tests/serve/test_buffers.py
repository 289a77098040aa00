"""Buffers in a bank: read like adapters, mixed with them, gone when deleted; a slot per token is the text itself."""

import shutil

import numpy as np
import pytest

from memjax.bank.calibrate import probe_memory
from memjax.bank.exchange import BaseShape, export_memory, export_namespace, import_memory, import_namespace
from memjax.bank.store import open_bank
from memjax.errors import ArtefactError, BankError, BaseMismatchError, InputError
from memjax.models import generate as g
from memjax.serve import probe
from memjax.serve.chat import Chat
from memjax.serve.compose import compose
from memjax.write.distill import Written
from memjax.write.questions import Question
from tests import small_bank
from tests.small_bank import BASE, SAMPLING, STYLE, TEXTS, add_buffer, base_text, read_text, set_gate, whole_buffer

LAMP = "The lamp of Orvale is red and 12 years old."
ASKED = "How old is the lamp of Orvale?"


def engine(bank, **config):
    """One shape of probe for all tests here, so that they share their programs."""
    return small_bank.engine(bank, **{"candidates": 6, "resident": 6, **config})


@pytest.fixture
def mixed(bank):
    """Three adapters and a buffer."""
    add_buffer(bank, "lamp", LAMP)
    return bank


def test_a_slot_per_token_answers_as_the_text_in_the_prompt_does(mixed):
    answer = engine(mixed).ask(ASKED, gate=False, sampling=SAMPLING)
    assert answer.choice.memory == "lamp"
    assert answer.text == read_text(LAMP, ASKED)
    assert engine(mixed).ask(ASKED, memory="lamp", sampling=SAMPLING).text == answer.text
    assert answer.text != base_text(ASKED)


def test_adapters_answer_the_same_beside_buffers(bank):
    question = "When does the ferry to Vask leave?"
    before = engine(bank).ask(question, gate=False, sampling=SAMPLING)
    add_buffer(bank, "lamp", LAMP)
    warm = engine(bank)
    after = warm.ask(question, gate=False, sampling=SAMPLING)
    assert (after.choice.memory, after.text) == ("ferry", before.text)
    told = {c.name: c for c in after.choice.candidates}
    assert set(told) == {*TEXTS, "lamp"}
    for one in before.choice.candidates:
        np.testing.assert_allclose(told[one.name].entropy, one.entropy, atol=1e-5)
        np.testing.assert_allclose(told[one.name].kl, one.kl, atol=1e-5)


def test_a_probe_of_a_buffer_tells_what_its_calibration_told(mixed):
    written = Written(whole_buffer(LAMP), (Question(ASKED, "asked"),), {})
    (row,) = probe_memory(BASE, written, STYLE)["held_out"]
    seen = engine(mixed).observe(ASKED, ahead=True)
    one = next(c for c in seen.candidates if c.name == "lamp")
    for name in ("entropy", "margin", "kl"):
        np.testing.assert_allclose(getattr(one, name), row[name], atol=1e-4, err_msg=name)
    np.testing.assert_allclose(seen.base_entropy, row["base_entropy"], atol=1e-4)
    assert one.kl > 0
    assert one.mean_entropy is not None


def test_a_closed_gate_gives_the_bases_own_text(mixed):
    set_gate(mixed, 0.0)
    assert engine(mixed).ask(ASKED, sampling=SAMPLING).text == base_text(ASKED)
    set_gate(mixed, 100.0)
    assert engine(mixed).ask(ASKED, sampling=SAMPLING).text == read_text(LAMP, ASKED)


def test_a_conversation_stands_behind_the_buffer(mixed):
    chat = Chat(engine(mixed), memory="lamp")
    chat.ask(ASKED, sampling=SAMPLING)
    history = chat.messages()
    assert len(history) == 2
    later = "Is it red?"
    assert chat.ask(later, sampling=SAMPLING).text == read_text(LAMP, later, history)


def test_several_buffers_are_one_batch_and_compile_once(bank):
    for name in TEXTS:
        add_buffer(bank, f"{name}-buffer", TEXTS[name])
    warm = engine(bank)
    warm.ask("When does the ferry to Vask leave?", gate=False, sampling=SAMPLING)
    programs = (probe.probe, probe.probe_buffers, g.prefill, g.start, g.decode)
    compiled = [p._cache_size() for p in programs]
    for name in TEXTS:
        answer = warm.ask("How many strings has the harp?", memory=f"{name}-buffer", sampling=SAMPLING)
        assert answer.text == read_text(TEXTS[name], "How many strings has the harp?")
    seen = warm.ask("How many strings has the harp of Halvic?", gate=False, sampling=SAMPLING)
    assert len(seen.choice.candidates) == 6
    assert [p._cache_size() for p in programs][:3] == compiled[:3]


def test_more_buffers_than_places_take_turns_and_a_deleted_one_is_gone(mixed):
    add_buffer(mixed, "well", "The well of Brindle is 40 steps deep.")
    warm = engine(mixed, resident=1)
    for name, text in (("lamp", LAMP), ("well", "The well of Brindle is 40 steps deep."), ("lamp", LAMP)):
        assert warm.ask(ASKED, memory=name, sampling=SAMPLING).text == read_text(text, ASKED)
    assert len(warm.pools.ids()) == 1
    mixed.delete("lamp")
    with pytest.raises(BankError, match="lamp"):
        warm.ask(ASKED, memory="lamp", sampling=SAMPLING)
    assert warm.pools.ids() == ()


def test_an_exported_buffer_comes_back_and_another_template_is_refused(mixed, tmp_path):
    export_memory(mixed, "lamp", tmp_path / "lamp")
    export_namespace(mixed, tmp_path / "all.tar")
    with open_bank(tmp_path / "other", create=True, base_id=BASE.id, base_name=BASE.name) as other:
        entry = import_memory(other, BaseShape.of(BASE), tmp_path / "lamp", "lamp", text=LAMP)
        assert entry.kind == "buffer"
        assert engine(other).ask(ASKED, memory="lamp", sampling=SAMPLING).text == read_text(LAMP, ASKED)
        import_namespace(other, tmp_path / "all.tar", "copy")
        assert {one.name: one.kind for one in other.list("copy")}["lamp"] == "buffer"
        add_buffer(other, "theirs", LAMP, template_id="another")
        export_memory(other, "theirs", tmp_path / "theirs")
        with pytest.raises(BaseMismatchError, match="another prompt template"):
            import_memory(other, BaseShape.of(BASE), tmp_path / "theirs", "theirs-2")


def test_what_a_buffer_cannot_do_is_refused_by_name(mixed):
    add_buffer(mixed, "odd", LAMP, header=1)
    with pytest.raises(ArtefactError, match="'odd' was written with another prompt style"):
        engine(mixed).ask(ASKED, memory="odd", sampling=SAMPLING)
    answer = engine(mixed).ask(ASKED, gate=False, sampling=SAMPLING)
    assert (answer.choice.memory, answer.choice.damaged) == ("lamp", ("odd",))
    with pytest.raises(InputError, match="buffers"):
        compose(engine(mixed), ASKED, ["lamp", "ferry"], "mix", SAMPLING)
    with pytest.raises(InputError, match="buffers out"):
        engine(mixed).answer_losses([1, 2, 3], "red", ["lamp"])
    voted = compose(engine(mixed), ASKED, ["lamp", "ferry"], "vote", SAMPLING)
    assert voted.said[0] == read_text(LAMP, ASKED)


def test_a_damaged_buffer_is_named_while_the_rest_answers(mixed):
    folder = mixed.folder(mixed.get("lamp").id)
    shutil.copyfile(folder / "memory.json", folder / "buffer.safetensors")
    answer = engine(mixed).ask(ASKED, gate=False, sampling=SAMPLING)
    assert answer.choice.damaged == ("lamp",)
    assert answer.choice.memory in TEXTS
