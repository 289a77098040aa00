"""The verbs over texts: what mem0's users would try, on a small random base."""

import dataclasses

import pytest

from memjax.bank.calibrate import read_gate
from memjax.bank.manage import MERGED, Memories, parts_in
from memjax.bank.store import open_bank
from memjax.errors import BankError, InputError
from tests.bank.test_add import BASE, CONFIG, TEXT
from tests.bank.test_store import writer

OVEN = "The oven of Brindle is black. The owner of the oven is Peter Wick. The oven bakes chestnut bread."


@pytest.fixture
def memories(tmp_path, monkeypatch):
    monkeypatch.setattr(BASE.tokenizer, "prompt_style", "plain")
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        yield Memories(bank, BASE, CONFIG)


def test_a_text_is_added_found_updated_rolled_back_and_deleted(memories):
    entry = memories.add(TEXT, "notes", metadata={"owner": "me"})
    assert memories.add(TEXT, "notes") == entry
    assert memories.get("notes") == memories.search("When does the Grey Heron leave?")[0].entry == entry
    assert memories.list() == [entry]
    first = read_gate(BASE, memories.bank)

    newer = memories.update("notes", OVEN)
    assert (newer.version, newer.metadata) == (2, {"owner": "me"})
    assert memories.bank.text("notes") == OVEN
    assert memories.search("Grey Heron") == ()
    assert [e.version for e in memories.history("notes")] == [1, 2]
    assert read_gate(BASE, memories.bank) != first

    assert memories.rollback("notes").id == entry.id
    gate = read_gate(BASE, memories.bank)
    assert dataclasses.replace(gate, bank_version=first.bank_version) == first
    back = memories.update("notes", OVEN)  # held already, as version 2: nothing is written, the questions come along
    assert (back.version, back.id) == (3, newer.id)
    assert read_gate(BASE, memories.bank) is not None

    assert memories.prune("notes").ids == (entry.id,)
    assert memories.delete("notes").ids == (newer.id,)
    assert memories.list() == []
    assert read_gate(BASE, memories.bank) is None


def test_writing_needs_a_base_a_free_name_or_a_known_one(memories):
    with pytest.raises(InputError, match="Memories"):
        Memories(memories.bank).add(TEXT)
    with pytest.raises(BankError, match="no memory named 'notes'"):
        memories.update("notes", TEXT)
    memories.bank.add("notes", *writer(1.0, BASE.id))
    with pytest.raises(BankError, match="notes"):
        memories.add(TEXT, "notes")


def test_deleting_tells_what_still_holds_it(tmp_path):
    with open_bank(tmp_path / "bank", create=True) as bank:
        part, whole = bank.add("part", *writer(1.0)), bank.add("whole", *writer(2.0))
        bank.set_record(MERGED, {whole.id: [part.id]}, "default")
        assert parts_in(bank, [part.id]) == ("whole",)
        gone = Memories(bank).delete("part")
        assert (gone.ids, gone.still_in) == ((part.id,), ("whole",))
        assert Memories(bank).delete("whole").still_in == ()


def test_delete_all_and_reset_forget_everything_they_should(tmp_path):
    with open_bank(tmp_path / "bank", create=True) as bank:
        memories = Memories(bank)
        mine, yours = bank.add("a", *writer(1.0), namespace="me"), bank.add("b", *writer(2.0), namespace="you")
        assert memories.delete_all("me").ids == (mine.id,)
        assert memories.delete_all("me").ids == ()
        assert memories.reset().ids == (yours.id,)
        assert bank.count(None) == 0
