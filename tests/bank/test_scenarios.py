"""What has gone wrong in other stores of adapters, each as a story: stale caches, half deletes, lost metadata, crashes."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from memjax.bank.retrieve import search
from memjax.bank.store import open_bank
from memjax.errors import ArtefactError, BankError
from tests.bank.test_store import read, writer
from tests.small_bank import SAMPLING, TEXTS, add, engine

QUESTION = "When does the ferry to Vask leave?"


@pytest.fixture
def small(tmp_path):
    """A bank of tiny memories that only need to be kept."""
    with open_bank(tmp_path / "small", create=True) as bank:
        yield bank


def test_one_name_with_other_weights_is_never_answered_from_the_old_ones(bank, tmp_path):
    warm = engine(bank)
    old = warm.ask(QUESTION, gate=False, sampling=SAMPLING)
    assert old.choice.memory == "ferry"
    bank.delete("ferry")
    new = add(bank, "ferry", 7)
    answer = warm.ask(QUESTION, gate=False, sampling=SAMPLING)
    assert {c.name: c.id for c in answer.choice.candidates}["ferry"] == new.id
    assert answer.choice == engine(bank).ask(QUESTION, gate=False, sampling=SAMPLING).choice
    assert answer.text != old.text


def test_a_rollback_is_answered_from_the_version_that_is_current(bank):
    warm = engine(bank)
    first = warm.ask(QUESTION, memory="ferry", sampling=SAMPLING)
    kept = bank.get("ferry")
    other = add(bank, "spare", 7, text=TEXTS["ferry"])
    bank.update("ferry", other.key, None, text=TEXTS["ferry"])  # in the bank already: nothing is written
    second = warm.ask(QUESTION, memory="ferry", sampling=SAMPLING)
    assert second.choice.candidates[0].id == other.id
    assert second.text != first.text
    bank.rollback("ferry")
    back = warm.ask(QUESTION, memory="ferry", sampling=SAMPLING)
    assert back.choice.candidates[0].id == kept.id
    assert back.text == first.text


def test_what_was_deleted_is_not_found_listed_or_answered_from(bank):
    warm = engine(bank)
    warm.ask(QUESTION, gate=False, sampling=SAMPLING)
    (gone,) = bank.delete("ferry")
    answer = warm.ask(QUESTION, gate=False, sampling=SAMPLING)
    assert "ferry" not in {c.name for c in answer.choice.candidates}
    assert gone not in {memory_id for memory_id, _ in search(bank, QUESTION, 9)}
    assert "ferry" not in bank.names()
    with pytest.raises(BankError, match="no memory named 'ferry'"):
        warm.ask(QUESTION, memory="ferry", sampling=SAMPLING)


def test_a_damaged_adapter_is_refused_by_name_while_the_rest_answers(bank):
    path = bank.folder(bank.get("ferry").id) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    answer = engine(bank).ask(QUESTION, gate=False, sampling=SAMPLING)
    assert answer.choice.damaged == ("ferry",)
    assert answer.choice.memory in ("harp", "oven")
    with pytest.raises(ArtefactError, match=r"adapter_model\.safetensors is damaged"):
        engine(bank).ask(QUESTION, memory="ferry", sampling=SAMPLING)
    assert [line for line in bank.verify().problems if "'ferry'" in line]
    bank.delete("ferry")
    assert engine(bank).ask(QUESTION, gate=False, sampling=SAMPLING).choice.damaged == ()


def test_two_names_for_one_file_go_one_by_one(small):
    key, write = writer(1.0)
    first = small.add("a", key, write, text="x")
    assert small.add("b", key, write, text="x").id == first.id
    assert [hit for hit, _ in search(small, "x", 9)] == [first.id]
    assert small.delete("a") == ()
    assert read(small, small.get("b")) == 1.0
    assert [hit for hit, _ in search(small, "x", 9)] == [first.id]
    assert small.delete("b") == (first.id,)
    assert search(small, "x", 9) == []


def test_adding_twice_is_one_memory_of_one_version(small):
    key, write = writer(1.0)
    first = small.add("a", key, write, text="x", metadata={"n": 1})
    assert small.add("a", key, write, text="x", metadata={"n": 2}) == first
    assert small.history("a") == [first]
    assert small.count() == 1


def test_an_update_keeps_metadata_and_expiry_and_the_version_being_read(small):
    small.add("a", *writer(1.0), text="old", metadata={"owner": "me"}, expires_at=9e9)
    reading = small.get("a")
    entry = small.update("a", *writer(2.0), text="new")
    assert (entry.metadata, entry.expires_at, entry.version) == ({"owner": "me"}, 9e9, 2)
    assert read(small, reading) == 1.0  # whoever began with the old one may finish with it
    assert small.update("a", *writer(3.0), metadata={"owner": "you"}).metadata == {"owner": "you"}


def test_an_update_back_to_an_earlier_text_keeps_its_questions(small):
    key, write = writer(1.0)
    small.add("a", key, write, text="x", questions=["what?"])
    small.update("a", *writer(2.0), text="y")
    small.update("a", key, write, text="x")
    assert small.questions("a") == ["what?"]


def test_delete_all_in_one_namespace_leaves_the_others_whole(small):
    for namespace in ("me", "you"):
        for value in (1.0, 2.0):
            small.add(f"m{value}", *writer(value), namespace=namespace, text=f"text {value}", questions=[value])
        small.set_record("gate", {"threshold": 1.0}, namespace)
    kept = small.list("you")
    assert len(small.delete_all("me")) == 2
    assert small.list("me") == []
    assert small.list("you") == kept
    assert [read(small, entry) for entry in kept] == [1.0, 2.0]
    assert small.questions("m1.0", "you") == [1.0]
    assert not small.record("gate", "you").stale
    assert small.verify().ok


@pytest.mark.parametrize("where", ["before the commit", "after the commit"])
def test_a_process_that_dies_between_artefact_and_index_leaves_all_or_nothing(small, where):
    small.add("kept", *writer(1.0), text="x")
    script = textwrap.dedent(
        """
        import os, signal, sys
        from memjax.bank import publish, versions
        from memjax.bank.store import open_bank
        from tests.bank.test_store import writer

        die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        bank = open_bank(sys.argv[1])
        if sys.argv[2] == "before the commit":
            versions.insert = die  # the files are in their place, the index does not know
        else:
            publish.folders.Claim.release = die
        bank.add("new", *writer(2.0), text="y")
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(small.path), where]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    committed = where == "after the commit"
    assert len(list((small.path / "memories").iterdir())) == 2
    with open_bank(small.path) as again:  # opening clears away what the dead left
        assert again.names() == (["kept", "new"] if committed else ["kept"])
        assert len(list((again.path / "memories").iterdir())) == (2 if committed else 1)
        assert list((again.path / "tmp").iterdir()) == []
        assert again.verify().problems == again.verify().orphans == ()
        again.add("new", *writer(2.0), text="y")
        assert read(again, again.get("new")) == 2.0
