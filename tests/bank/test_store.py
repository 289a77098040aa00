"""The bank keeps exactly what was committed: names, versions, namespaces, forgetting, damage and full disks."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from memjax.bank import folders
from memjax.bank.store import open_bank
from memjax.errors import ArtefactError, BankError, BaseMismatchError, InputError
from memjax.memory.files import Meta, read_artefact, write_artefact
from memjax.memory.peft import Factors

SHAPES, MODULES = {"q": (4, 4)}, {"q": "self_attn.q_proj"}
BASE = "b" * 64


class Clock:
    """A clock that moves when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def writer(value=1.0, base_id=BASE, **recipe):
    """(key, write callback) of a tiny memory whose values and recipe are given."""
    meta = Meta(base_id, "t" * 64, "", {"writer": "test", "value": value, **recipe}, base_name="tiny")
    factors = Factors({"q": np.full((1, 1, 4), value)}, {"q": np.ones((1, 1, 4))}, 1.0)
    return meta.key, lambda folder: write_artefact(folder, factors, MODULES, meta)


def read(bank, entry):
    """The value that a memory was made of."""
    return float(read_artefact(bank.folder(entry.id), SHAPES, 1, MODULES).artefact.a["q"].flat[0])


def folders_of(bank):
    return sorted(path.name for path in (bank.path / "memories").iterdir())


def assert_clean(bank):
    """Nothing damaged, nothing left over."""
    report = bank.verify()
    assert report.problems == ()
    assert report.orphans == ()
    assert list((bank.path / "tmp").iterdir()) == []


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bank(tmp_path, clock):
    with open_bank(tmp_path / "bank", create=True, clock=clock) as bank:
        yield bank
        assert_clean(bank)


def never(folder):
    raise AssertionError("nothing was to be written")


# --------------------------------------------------------------------------------------------------- adding and finding


def test_a_memory_comes_back_as_it_was_added(bank):
    entry = bank.add("trip", *writer(2.0), text="The ferry leaves at nine.", questions=[{"q": "When?"}], metadata={"n": 1})
    assert (entry.name, entry.version, entry.state, entry.namespace) == ("trip", 1, "current", "default")
    assert (entry.kind, entry.base_id, entry.created_at, entry.expires_at) == ("adapter", BASE, 1000.0, None)
    assert entry.bytes == sum(path.stat().st_size for path in bank.folder(entry.id).iterdir())
    assert bank.get("trip") == bank.find_key(entry.key) == bank.find_id(entry.id) == entry
    assert bank.text("trip") == "The ferry leaves at nine."
    assert bank.questions("trip") == [{"q": "When?"}]
    assert entry.metadata == {"n": 1}
    assert read(bank, entry) == 2.0
    assert bank.texts() == [(entry.id, "The ferry leaves at nine.")]
    assert bank.base_id == BASE
    assert bank.base_name == "tiny"


def test_what_was_added_is_there_after_reopening(bank, clock):
    entry = bank.add("a", *writer(), text="x")
    version = bank.version
    with open_bank(bank.path, clock=clock) as again:
        assert again.list() == [entry]
        assert again.version == version
        assert read(again, entry) == 1.0


def test_adding_twice_is_one_memory_and_writes_nothing(bank):
    key, write = writer()
    entry = bank.add("a", key, write, text="x")
    version = bank.version
    assert bank.add("a", key, never, text="x") == entry
    assert bank.version == version
    assert folders_of(bank) == [entry.id]


def test_two_names_of_one_memory_share_its_files(bank):
    key, write = writer()
    first = bank.add("a", key, write, text="x", questions=[1])
    second = bank.add("b", key, never)
    assert second.id == first.id
    assert folders_of(bank) == [first.id]
    assert bank.texts() == [(first.id, "x")]
    assert bank.delete("a") == ()
    assert read(bank, bank.get("b")) == 1.0
    assert bank.text("b") == "x"
    assert bank.delete("b") == (first.id,)
    assert folders_of(bank) == []


def test_a_taken_name_is_refused_and_keeps_its_memory(bank):
    entry = bank.add("a", *writer(1.0))
    with pytest.raises(BankError, match="'a' is taken"):
        bank.add("a", writer(2.0)[0], never)
    assert bank.list() == [entry]


@pytest.mark.parametrize("name", ["", " a", "a\n", "tab\there", "x" * 201, "\x1b[31m"])
def test_names_that_cannot_be_typed_again_are_refused(bank, name):
    with pytest.raises(InputError, match="cannot be a name"):
        bank.add(name, writer()[0], never)
    with pytest.raises(InputError, match="cannot be a namespace"):
        bank.add("a", writer()[0], never, namespace=name)
    bank.add("São Paulo / 2. Übung 東京", *writer())


def test_an_unknown_name_is_answered_with_the_nearest(bank):
    bank.add("ferry", *writer())
    with pytest.raises(BankError, match="no memory named 'fery'; did you mean 'ferry'"):
        bank.get("fery")
    for method in (bank.delete, bank.history, bank.text, bank.questions, bank.rollback, bank.prune):
        with pytest.raises(BankError, match="no memory named 'zzz'"):
            method("zzz")


def test_listing_is_sorted_and_pages(bank):
    for name in ("c", "a", "b"):
        bank.add(name, *writer(), text=name)
        bank.add(name, *writer(), namespace="other")
    assert [e.name for e in bank.list()] == bank.names() == ["a", "b", "c"]
    assert [e.name for e in bank.list(limit=2)] == ["a", "b"]
    assert [e.name for e in bank.list(limit=2, after="b")] == ["c"]
    assert len(bank.list(None)) == bank.count(None) == 6
    assert bank.count() == 3
    assert bank.namespaces() == ["default", "other"]


def test_a_write_that_fails_leaves_nothing(bank):
    key, write = writer()

    def half(folder):
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bank.add("a", key, half)
    with pytest.raises(ArtefactError, match="was to have key"):
        bank.add("a", "0" * 64, write)
    assert bank.version == 0
    assert bank.list() == []
    assert_clean(bank)
    assert bank.add("a", key, write).version == 1


def test_metadata_must_be_plain_json(bank):
    for bad in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises(InputError, match="metadata must be plain, finite JSON"):
            bank.add("a", writer()[0], never, metadata=bad)
    bank.add("a", *writer(), metadata={"x": np.float32(0.5)})
    assert bank.set_metadata("a", {"y": [1]}).metadata == bank.get("a").metadata == {"y": [1]}


# ------------------------------------------------------------------------------------------------------------- versions


def test_update_keeps_the_old_version_and_the_metadata_and_rolls_back(bank, clock):
    first = bank.add("a", *writer(1.0), text="old", metadata={"owner": "me"})
    clock.now += 5
    second = bank.update("a", *writer(2.0), text="new")
    assert (second.version, second.metadata, second.created_at) == (2, {"owner": "me"}, 1005.0)
    assert bank.texts() == [(second.id, "new")]
    assert [(e.version, e.state) for e in bank.history("a")] == [(1, "past"), (2, "current")]
    assert read(bank, first) == 1.0
    clock.now += 5
    back = bank.rollback("a")
    assert (back.id, back.version, back.updated_at) == (first.id, 1, 1010.0)
    assert bank.texts() == [(first.id, "old")]
    with pytest.raises(BankError, match="no earlier version; its versions are 1, 2"):
        bank.rollback("a")
    with pytest.raises(BankError, match="no version 7"):
        bank.rollback("a", 7)
    assert bank.rollback("a", 2).id == second.id
    third = bank.update("a", *writer(3.0))
    assert third.version == 3
    assert bank.text("a") is None


def test_update_to_an_earlier_content_shares_its_files(bank):
    first = bank.add("a", *writer(1.0), text="x")
    bank.update("a", *writer(2.0))
    third = bank.update("a", writer(1.0)[0], never)
    assert (third.id, third.version) == (first.id, 3)
    assert bank.update("a", writer(1.0)[0], never) == third
    assert len(folders_of(bank)) == 2
    assert bank.text("a") == "x"


def test_prune_removes_past_versions_only(bank):
    entries = [bank.add("a", *writer(0.0))] + [bank.update("a", *writer(float(n))) for n in range(1, 4)]
    assert bank.prune("a", keep=1) == tuple(sorted(e.id for e in entries[:2]))
    assert [e.version for e in bank.history("a")] == [3, 4]
    assert bank.prune("a") == (entries[2].id,)
    assert bank.get("a") == entries[3]


def test_update_needs_the_name_and_delete_takes_all_versions(bank):
    with pytest.raises(BankError, match="no memory named 'a'"):
        bank.update("a", writer()[0], never)
    ids = {bank.add("a", *writer(1.0)).id, bank.update("a", *writer(2.0)).id}
    assert set(bank.delete("a")) == ids
    assert folders_of(bank) == []
    with pytest.raises(BankError, match="no memory named 'a'"):
        bank.history("a")


def test_rename_moves_all_versions(bank):
    bank.add("a", *writer(1.0))
    bank.update("a", *writer(2.0))
    bank.add("b", *writer(3.0))
    with pytest.raises(BankError, match="'b' is taken"):
        bank.rename("a", "b")
    assert bank.rename("a", "c").version == 2
    assert len(bank.history("c")) == 2
    assert bank.names() == ["b", "c"]


# ----------------------------------------------------------------------------------------------- namespaces, forgetting


def test_namespaces_do_not_see_each_other(bank):
    key, write = writer()
    mine = bank.add("a", key, write, namespace="me", text="secret")
    assert bank.find_key(key) is bank.find_id(mine.id) is bank.find("a") is None
    assert bank.texts() == []
    yours = bank.add("a", key, write, namespace="you", text="secret")
    assert yours.id == mine.id
    assert bank.namespace_version("you") == bank.namespace_version("me") == 1
    assert bank.delete_all("me") == (mine.id,)
    assert bank.namespace_version("you") == 1
    assert read(bank, yours) == 1.0
    assert bank.texts("you") == [(yours.id, "secret")]
    with pytest.raises(BankError, match="in namespace 'me'; `memjax bank list`"):
        bank.get("a", "me")


def test_deleted_text_is_in_no_file_of_the_bank(bank):
    bank.add("a", *writer(1.0), text="the password is xyzzy-plugh", questions=["what is xyzzy-plugh?"])
    bank.add("b", *writer(2.0), text="harmless")
    bank.install_keys(bank.namespace_version(), lambda folder: (folder / "keys").write_text("xyzzy-plugh") and None)
    assert (bank.keys_folder() / "keys").exists()
    bank.delete("a")
    assert not (bank.keys_folder() / "keys").exists()
    for path in bank.path.rglob("*"):
        assert path.is_dir() or b"xyzzy-plugh" not in path.read_bytes(), path


def test_delete_then_add_again(bank):
    key, write = writer()
    first = bank.add("a", key, write)
    assert bank.delete("a") == (first.id,)
    assert bank.find_key(key) is None
    again = bank.add("a", key, write)
    assert again.id == first.id
    assert read(bank, again) == 1.0


def test_reset_forgets_everything_but_the_version(bank):
    bank.add("a", *writer(), namespace="x")
    bank.add("b", *writer(2.0))
    bank.set_record("gate", {})
    version = bank.version
    assert len(bank.reset()) == 2
    assert bank.count(None) == 0
    assert bank.base_id is bank.record("gate") is None
    assert bank.version > version
    bank.add("a", *writer(base_id="c" * 64))


def test_the_expired_is_absent_then_gone(bank, clock):
    key, write = writer()
    entry = bank.add("a", key, write, text="x", expires_at=1010.0)
    bank.update("a", *writer(2.0))
    bank.add("b", *writer(3.0))
    with bank.snapshot() as snapshot:
        assert snapshot.valid_until == 1010.0
    clock.now = 1010.0
    assert bank.names() == ["b"]
    assert bank.count() == 1
    assert bank.find("a") is bank.find_key(key) is bank.find_id(entry.id) is None
    assert bank.texts() == []
    with pytest.raises(BankError, match="no memory named 'a'"):
        bank.history("a")
    assert bank.add("a", key, write).version == 1  # an expired name is free, and the same memory may return
    bank.set_expiry("a", 1020.0)
    clock.now = 1020.0
    assert bank.purge() == (entry.id,)
    assert folders_of(bank) == [bank.get("b").id]


def test_records_go_stale_when_what_they_saw_is_deleted(bank):
    bank.add("a", *writer(1.0))
    bank.add("b", *writer(2.0), namespace="other")
    for namespace in ("", "default", "other"):
        bank.set_record("gate", {"threshold": 0.5}, namespace)
    assert bank.record("gate").version == bank.version
    bank.add("c", *writer(3.0))
    assert not bank.record("gate").stale
    bank.delete("a")
    assert [bank.record("gate", n).stale for n in ("", "default", "other")] == [True, True, False]
    bank.set_record("gate", {"threshold": 0.6})
    assert bank.record("gate").value == {"threshold": 0.6}
    assert not bank.record("gate").stale
    bank.delete_all("other")
    assert bank.record("gate", "other") is None
    bank.delete_record("gate")
    assert bank.record("gate") is None


def test_every_change_raises_the_version(bank):
    seen = [bank.version]
    for change in (
        lambda: bank.add("a", *writer(1.0)),
        lambda: bank.add("b", *writer(1.0)),
        lambda: bank.update("a", *writer(2.0)),
        lambda: bank.rollback("a"),
        lambda: bank.rename("b", "c"),
        lambda: bank.delete("c"),
        lambda: bank.delete_all(),
    ):
        change()
        seen.append(bank.version)
        assert bank.namespace_version() == bank.version
    assert seen == sorted(set(seen))


def test_keys_made_from_an_older_version_are_not_installed(bank):
    bank.add("a", *writer(1.0))
    version = bank.namespace_version()
    bank.add("b", *writer(2.0))
    assert not bank.install_keys(version, lambda folder: None)
    assert not bank.keys_folder().exists()
    for text in ("one", "two"):
        assert bank.install_keys(
            bank.namespace_version(), lambda folder, text=text: (folder / "x").write_text(text) and None
        )
        assert (bank.keys_folder() / "x").read_text() == text


# -------------------------------------------------------------------------------------------------------- bases, damage


def test_another_base_is_refused_with_both_ids(bank):
    bank.add("a", *writer())
    for attempt in (
        lambda: open_bank(bank.path, base_id="c" * 64, base_name="other"),
        lambda: bank.bind_base("c" * 64, "other"),
        lambda: bank.add("c", *writer(base_id="c" * 64)),
    ):
        with pytest.raises(BaseMismatchError) as caught:
            attempt()
        assert BASE in str(caught.value)
        assert "c" * 64 in str(caught.value)
        assert "tiny" in str(caught.value)
    open_bank(bank.path, base_id=BASE).close()


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "folder", "manifest"])
def test_verify_names_what_is_damaged_and_the_rest_works(tmp_path, harm):
    with open_bank(tmp_path, create=True) as bank:
        bad, good = bank.add("bad", *writer(1.0)), bank.add("good", *writer(2.0))
        path = bank.folder(bad.id) / ("memory.json" if harm == "manifest" else "adapter_model.safetensors")
        data = bytearray(path.read_bytes())
        if harm == "manifest":  # valid by itself, but not what was added
            path.write_bytes(data.replace(b'"licence": ""', b'"licence": "x"'))
        elif harm == "flip":
            data[-1] ^= 1
            path.write_bytes(data)
        elif harm == "truncate":
            path.write_bytes(data[:-1])
        elif harm == "delete":
            path.unlink()
        else:
            path = path.parent.rename(tmp_path / "elsewhere") and path.parent
        report = bank.verify()
        assert not report.ok
        assert report.checked == 2
        assert [line for line in report.problems if "memory 'bad'" in line and str(path) in line]
        assert not [line for line in report.problems if "good" in line]
        assert read(bank, good) == 2.0
        if harm != "manifest":
            with pytest.raises(ArtefactError):
                read(bank, bad)
        bank.delete("bad")
        assert bank.verify().ok


def test_a_damaged_text_is_named(tmp_path):
    with open_bank(tmp_path, create=True) as bank:
        entry = bank.add("a", *writer(), text="truth")
        with sqlite3.connect(tmp_path / "bank.sqlite") as db:
            db.execute("UPDATE sources SET text = 'lies'")
        assert [line for line in bank.verify().problems if entry.source_hash in line]


def test_folders_that_nobody_knows_are_reported_and_swept(bank):
    entry = bank.add("a", *writer())
    stray = bank.path / "memories" / ("f" * 64)
    stray.mkdir()
    assert bank.verify().orphans == (str(stray),)
    assert bank.verify().ok
    assert bank.sweep() == (str(stray),)
    assert folders_of(bank) == [entry.id]


def damage_header(path):
    path.write_bytes(b"not sqlite at all" * 500)


def damage_empty(path):
    path.write_bytes(b"")


def damage_pages(path):
    data = bytearray(path.read_bytes())
    data[100:] = b"\xff" * (len(data) - 100)
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [damage_header, damage_empty, damage_pages, Path.unlink])
@pytest.mark.parametrize("create", [False, True])
def test_a_damaged_index_is_one_line_and_is_never_overwritten(tmp_path, harm, create):
    with open_bank(tmp_path, create=True) as bank:
        bank.add("a", *writer())
    path = tmp_path / "bank.sqlite"
    harm(path)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(BankError) as caught, open_bank(tmp_path, create=create) as bank:
        bank.list()
    assert "bank.sqlite" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.exists() else None) == before
    assert len(list((tmp_path / "memories").iterdir())) == 1


def test_what_is_no_bank_is_refused(tmp_path):
    with pytest.raises(BankError, match="no bank at"):
        open_bank(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(BankError, match="is a file"):
        open_bank(tmp_path / "file", create=True)
    with pytest.raises(BankError, match="holds other files"):
        open_bank(tmp_path, create=True)
    with open_bank(tmp_path / "new", create=True) as bank, sqlite3.connect(bank.path / "bank.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(BankError, match="has format 99"):
        open_bank(tmp_path / "new")


def test_a_closed_bank_says_so(tmp_path):
    bank = open_bank(tmp_path, create=True)
    bank.close()
    bank.close()
    with pytest.raises(BankError, match="is closed"):
        bank.list()


# ---------------------------------------------------------------------------------------- full disks and other OSErrors


def test_a_full_disk_while_writing_is_one_line_and_changes_nothing(bank):
    def write(folder):
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BankError, match="disk is full: cannot write to bank"):
        bank.add("a", writer()[0], write)
    assert bank.list() == []
    assert_clean(bank)


@pytest.mark.parametrize("step", ["sync_tree", "sync_folder"])
def test_a_full_disk_while_committing_changes_nothing(bank, monkeypatch, step):
    kept = bank.add("kept", *writer(1.0))

    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(folders, step, full)
        with pytest.raises(BankError, match="disk is full"):
            bank.add("a", *writer(2.0))
    assert bank.list() == [kept]
    bank.sweep()  # what could not be taken back while the disk was full
    assert_clean(bank)
    bank.add("a", *writer(2.0))


def test_a_full_index_changes_nothing(bank):
    bank.add("a", *writer(1.0))
    pages = bank._index.one("PRAGMA page_count")[0]
    bank._index.all(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(BankError, match="disk is full"):
        bank.add("b", *writer(2.0), text="x" * 100_000)
    assert bank.names() == ["a"]
    assert_clean(bank)
    bank._index.all("PRAGMA max_page_count = 1000000")
    bank.add("b", *writer(2.0), text="x" * 100_000)


# -------------------------------------------------------------------------------------------- concurrency, housekeeping


def test_threads_add_at_once(bank):
    failed = []

    def work(offset):
        try:
            for n in range(5):
                bank.add(f"{offset}-{n}", *writer(float(10 * offset + n)))
                bank.add(f"same-{offset}-{n}", *writer(-1.0))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert bank.count() == 40
    assert len(folders_of(bank)) == 21


def test_a_living_writers_folder_is_left_alone_and_a_dead_ones_is_not(tmp_path):
    living = folders.claim(tmp_path)
    dead = folders.claim(tmp_path)
    dead.intend("something")
    dead.abandon()
    (tmp_path / "no-lock").mkdir()
    found = list(folders.abandoned(tmp_path))
    assert [(claim.folder, claim.intent) for claim in found] == [(dead.folder, "something")]
    found[0].release()
    assert {path.name for path in tmp_path.iterdir()} == {living.folder.name, living.lock.name}
    living.release()
    assert list(tmp_path.iterdir()) == []


def test_a_memory_added_again_before_its_files_were_removed_is_kept(bank, clock, monkeypatch):
    key, write = writer()
    bank.add("a", key, write)
    with open_bank(bank.path, clock=clock) as other:
        # One process has committed a delete and not yet removed the files when another adds the same memory.
        for each in (bank, other):
            monkeypatch.setattr(each, "_empty_trash", lambda: None)
        bank.delete("a")
        entry = other.add("a", key, write)
        monkeypatch.undo()
        bank._empty_trash()
        assert read(other, entry) == 1.0


def test_files_left_by_a_crash_are_replaced_not_trusted(bank):
    key, write = writer()
    entry = bank.add("a", key, write)
    bank.delete("a")
    bank.folder(entry.id).mkdir()
    (bank.folder(entry.id) / "adapter_model.safetensors").write_bytes(b"half")
    assert read(bank, bank.add("a", key, write)) == 1.0


def test_a_big_bank_opens_without_being_read(tmp_path):
    with open_bank(tmp_path, create=True) as bank:
        entry = bank.add("a", *writer(), text="x")
        with bank._index.transaction() as db:
            db.execute(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) INSERT INTO memories "
                "(namespace, name, version, state, id, key, source, metadata, created_at, updated_at) "
                "SELECT 'default', 'm' || i, 1, 'current', ?, ? || i, ?, '{}', 0, 0 FROM n",
                (entry.id, entry.key, entry.source_hash),
            )
    with open_bank(tmp_path) as bank:
        steps = [0]
        bank._index.db.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1000)
        with open_bank(tmp_path, base_id=BASE) as other:
            assert other.find("m99999") is not None
        bank.add("b", *writer(2.0), text="y")
        bank.delete("b")
        bank.get("m5")
        bank.list(limit=10, after="m5")
        # A scan of the rows would take several hundred thousand steps of SQLite's machine.
        assert steps[0] < 20
        assert bank.count() == 100_001


def test_the_store_does_not_load_jax():
    code = "import sys, memjax.bank.store; print(json.dumps('jax' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
