"""From a text to a committed memory: once, whole or not at all, with a gate that follows the bank."""

import numpy as np
import pytest

from memjax.bank import add as a
from memjax.bank import calibrate as c
from memjax.bank.store import open_bank
from memjax.errors import BankError, BaseMismatchError, InputError
from memjax.write.distill import DistillConfig, replay_lesson
from memjax.write.prompts import prompt_style
from tests.support import small_base

BASE = small_base(max_positions=1024)
STYLE = prompt_style("plain")
CONFIG = DistillConfig(rank=2, sites=("down",), steps=2, rows=2, keep_batch=2, general=4, top_k=4, held_out=0.3)
TEXT = "The Grey Heron leaves at 6:40. The captain of the Grey Heron is Marta Quill. The harp is tuned with a spoon."


@pytest.fixture
def bank(tmp_path):
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        yield bank


@pytest.fixture(scope="module")
def replay():
    return replay_lesson(BASE, STYLE, CONFIG)


def write(bank, text=TEXT, name="notes", replay=None):
    return a.add_text(BASE, bank, text, name, STYLE, CONFIG, replay=replay)


def test_a_text_becomes_a_memory_with_its_questions_and_a_gate(bank, replay):
    entry, written = write(bank, replay=replay)
    assert bank.verify().ok
    assert bank.text("notes") == TEXT
    probes = bank.questions("notes")
    assert len(probes["held_out"]) == len(written.held_out) > 0
    assert len(probes["general"]) == c.CALIBRATION_PROMPTS
    gate = c.read_gate(BASE, bank)
    assert (gate.questions, gate.general) == (len(probes["held_out"]), len(probes["general"]))
    assert entry.key == a.text_meta(BASE, TEXT, STYLE, CONFIG).key


def test_writing_twice_is_one_memory_and_a_second_name_a_pointer(bank, replay):
    entry, _ = write(bank, replay=replay)
    again, written = write(bank, replay=replay)
    assert written is None
    assert again == entry
    other, written = write(bank, name="other", replay=replay)
    assert written is None
    assert other.id == entry.id
    assert bank.names() == ["notes", "other"]


def test_the_same_text_gives_the_same_bytes(bank, tmp_path, replay):
    one, _ = write(bank, replay=replay)
    with open_bank(tmp_path / "second", create=True, base_id=BASE.id) as second:
        two, _ = write(second, replay=replay)
    assert one.id == two.id


def test_a_taken_name_is_refused_before_anything_is_written(bank, replay, monkeypatch):
    write(bank, replay=replay)
    monkeypatch.setattr(a, "distill", lambda *args, **kwargs: pytest.fail("it was written all the same"))
    with pytest.raises(BankError, match="notes"):
        write(bank, text=TEXT + " It is red.", replay=replay)


def test_the_gate_follows_deletion(bank, replay):
    write(bank, replay=replay)
    write(bank, text="The oven of Brindle is black. The owner of the oven is Peter Wick.", name="oven", replay=replay)
    both = c.read_gate(BASE, bank)
    bank.delete("oven")
    one = c.recalibrate(bank)
    assert one.questions < both.questions
    assert one == c.read_gate(BASE, bank)
    bank.delete("notes")
    assert c.recalibrate(bank) is None
    assert c.read_gate(BASE, bank) is None


def test_a_gate_of_another_base_is_refused(bank, replay):
    write(bank, replay=replay)
    with pytest.raises(BaseMismatchError):
        c.read_gate(small_base(seed=1), bank)


def test_a_text_beyond_the_window_is_refused_with_its_length(bank):
    long = "Rilo lives in Vask. " * 400
    tokens = len(BASE.tokenizer.encode(long))
    with pytest.raises(InputError, match=f"{tokens:,} tokens"):
        write(bank, text=long)
    with pytest.raises(InputError, match="empty"):
        write(bank, text=" \n")
    assert bank.count() == 0
    assert not list((bank.path / "memories").iterdir())


def test_an_interrupted_write_leaves_nothing(bank, replay, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(a, "probe_memory", stop)
    with pytest.raises(KeyboardInterrupt):
        write(bank, replay=replay)
    assert bank.count() == 0
    assert bank.verify().orphans == ()


def test_calibration_probes_are_those_of_the_adapter(bank, replay):
    _, written = write(bank, replay=replay)
    probes = bank.questions("notes")
    again = c.probe_memory(BASE, written, STYLE, CONFIG.marker)
    for row, other in zip(probes["general"], again["general"], strict=True):
        assert row["question"] == other["question"]
        np.testing.assert_allclose(row["entropy"], other["entropy"], atol=1e-5)
