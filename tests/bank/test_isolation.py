"""What happens in one namespace is not to be seen, counted or felt in another."""

import pytest

from memjax.bank.calibrate import GATE
from memjax.bank.manage import Memories
from memjax.bank.retrieve import open_index, search
from memjax.bank.store import open_bank
from memjax.errors import BankError
from tests.bank.test_retrieve import word_bytes
from tests.bank.test_store import writer


@pytest.fixture
def bank(tmp_path):
    """`alice` holds a secret; `bob` one harmless memory."""
    with open_bank(tmp_path / "bank", create=True) as bank:
        bank.add("payroll", *writer(1.0), namespace="alice", text="the salary of Rilo is ninety", metadata={"x": "private"})
        bank.update("payroll", *writer(2.0), namespace="alice", text="the salary of Rilo is a hundred", questions=[1])
        bank.add("lunch", *writer(3.0), namespace="bob", text="the canteen serves soup")
        yield bank


def test_search_finds_nothing_of_another_and_scores_do_not_feel_it(bank, tmp_path):
    assert search(bank, "salary of Rilo", 5, "alice")
    assert search(bank, "salary of Rilo", 5, "bob") == []
    with open_bank(tmp_path / "alone", create=True) as alone:
        alone.add("lunch", *writer(3.0), namespace="bob", text="the canteen serves soup")
        assert search(alone, "soup in the canteen", 5, "bob") == search(bank, "soup in the canteen", 5, "bob")


def test_lists_counts_and_names_are_of_one_namespace(bank):
    assert bank.names("bob") == ["lunch"]
    assert [e.name for e in bank.list("bob")] == ["lunch"]
    assert bank.count("bob") == 1
    assert bank.names() == []
    assert bank.count() == 0
    assert [text for _, text in bank.texts("bob")] == ["the canteen serves soup"]


@pytest.mark.parametrize("verb", ["get", "history", "text", "questions", "rollback", "delete", "prune"])
def test_an_error_does_not_tell_whether_a_name_exists_elsewhere(bank, verb):
    method = getattr(bank, verb)
    messages = []
    for name in ("payroll", "paywall"):  # one exists in another namespace, one nowhere
        with pytest.raises(BankError) as caught:
            method(name, namespace="bob")
        messages.append(str(caught.value).replace(name, "NAME"))
    assert messages[0] == messages[1]
    assert "did you mean" not in messages[0]


def test_ids_and_keys_of_another_namespace_lead_nowhere(bank):
    entry = bank.get("payroll", "alice")
    assert bank.find_id(entry.id, "bob") is bank.find_key(entry.key, "bob") is bank.find("payroll", "bob") is None


def test_the_same_memory_is_written_again_and_not_taken_from_another(bank):
    # A write that ended at once would tell that somebody holds this text.
    written = []
    key, write = writer(2.0)
    entry = bank.add("copy", key, lambda folder: written.append(1) or write(folder), namespace="bob", text="mine")
    assert written == [1]
    assert (entry.version, entry.metadata, bank.questions("copy", "bob")) == (1, {}, None)
    assert bank.text("copy", "bob") == "mine"
    assert bank.text("payroll", "alice") == "the salary of Rilo is a hundred"


def test_a_deletion_does_not_tell_who_else_holds_the_memory(bank):
    key, write = writer(2.0)
    shared, own = bank.add("copy", key, write, namespace="bob"), bank.get("lunch", "bob")
    assert bank.delete("copy", "bob") == (shared.id,)
    assert bank.delete("lunch", "bob") == (own.id,)
    assert bank.verify().ok
    assert bank.folder(shared.id).is_dir()
    assert not bank.folder(own.id).exists()


def test_versions_and_records_do_not_move_with_another_namespace(bank):
    bank.set_record(GATE, {"threshold": 1.0}, "bob")
    before = bank.namespace_version("bob"), bank.record(GATE, "bob")
    bank.delete_all("alice")
    bank.add("new", *writer(4.0), namespace="alice")
    assert (bank.namespace_version("bob"), bank.record(GATE, "bob")) == before
    assert bank.record(GATE, "alice") is None
    assert bank.record(GATE, "bob").version == bank.namespace_version("bob") == 1


def test_saved_indices_are_apart_and_go_with_their_own_namespace_only(bank):
    for namespace in ("alice", "bob"):
        open_index(bank, namespace)
    words = {n: b"".join(p.read_bytes() for p in bank.keys_folder(n).rglob("*") if p.is_file()) for n in ("alice", "bob")}
    assert word_bytes("salary") in words["alice"]
    assert word_bytes("salary") not in words["bob"]
    bank.delete_all("alice")
    assert not bank.keys_folder("alice").exists()
    assert bank.keys_folder("bob").exists()


def test_memories_of_a_namespace_are_reached_through_it_only(bank):
    memories = Memories(bank)
    assert [hit.entry.name for hit in memories.search("salary", "alice")] == ["payroll"]
    assert memories.search("salary", "bob") == ()
    lunch = bank.get("lunch", "bob").id
    assert memories.delete_all("bob").ids == (lunch,)
    assert bank.names("alice") == ["payroll"]


def test_a_salt_is_of_one_namespace_and_ends_with_it(bank):
    salts = {bank.salt("alice"), bank.salt("bob"), bank.salt()}
    assert len(salts) == 3
    assert all(len(salt) == 32 for salt in salts)
    with open_bank(bank.path) as again:
        assert again.salt("alice") == bank.salt("alice")
    bob = bank.salt("bob")
    bank.delete_all("alice")
    assert bank.salt("alice") not in salts
    assert bank.salt("bob") == bob
    bank.reset()
    assert bank.salt("bob") != bob
