"""What is deleted is gone: from every file of the bank, from the answers, and from what was calibrated on it."""

import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest

from memjax.bank.calibrate import GATE
from memjax.bank.retrieve import open_index
from memjax.bank.store import open_bank
from tests.bank.test_retrieve import word_bytes
from tests.bank.test_store import writer
from tests.small_bank import BASE, SAMPLING, TEXTS, add, engine, set_gate


@pytest.fixture
def folder():
    """In memory where that is possible: these tests write a few hundred memories."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name) / "bank"


def holders(folder, *needles):
    """(file, needle) of whatever can still be read anywhere under a folder, free pages and logs included."""
    data = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [(path.name, needle) for path, bytes_ in data.items() for needle in needles if needle in bytes_]


def pieces(path, size=24):
    """The values of a safetensors file cut up, without its header and those runs that say nothing."""
    data = path.read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little") :]
    cut = (data[i : i + size] for i in range(0, len(data) - size, size))
    return [piece for piece in cut if len(set(piece)) > 12]


def test_no_byte_of_text_questions_index_or_adapter_is_left(folder):
    with open_bank(folder, create=True, base_id=BASE.id) as bank:
        add(bank, "ferry", 1)
        entry = add(bank, "harp", 2, text="The harp of Halvic is tuned with a xylospoon. " * 30)
        bank.update("harp", *writer(2.0, BASE.id), text="A younger xylospoon.", questions=[{"q": "Is it a xylospoon?"}])
        open_index(bank)  # saves the words of all texts
        weights = pieces(bank.folder(entry.id) / "adapter_model.safetensors")
        assert len(weights) > 500
        assert holders(folder, b"xylospoon", *weights[-50:])
        assert holders(folder, word_bytes("xylospoon"))
        bank.delete("harp")
        assert holders(folder, b"xylospoon", word_bytes("xylospoon"), *weights[:200], *weights[-200:]) == []
        assert bank.verify().ok
        assert holders(folder, b"ferry")
    assert holders(folder, b"xylospoon", *weights[-50:]) == []


def test_nothing_of_any_text_survives_many_changes(folder):
    # SQLite leaves copies behind when rows move between pages; without the padding this seed finds one.
    rng, live, dead = random.Random(1), {}, []
    with open_bank(folder, create=True) as bank:
        for i in range(250):
            if live and rng.random() < 0.45:
                name = rng.choice(sorted(live))
                bank.delete(name)
                dead += live.pop(name)
            else:
                size, marks = (
                    rng.choice([10, 60, 300, 900, 3000, 9000]),
                    [f"{kind}{i:05d}x" for kind in ("text", "ques", "meta")],
                )
                text, question, metadata = f"{marks[0]}{'y' * size}{marks[0]}", marks[1], {"m": marks[2]}
                bank.add(f"n{i}", *writer(float(i)), text=text, questions=[question], metadata=metadata)
                live[f"n{i}"] = [mark.encode() for mark in marks]
        assert len(dead) > 250
        assert holders(folder, *dead) == []
        assert len(holders(folder, *(mark for marks in live.values() for mark in marks))) >= 3 * len(live)
        assert bank.verify().ok


@pytest.mark.parametrize("how", ["delete", "delete_all", "reset", "expire"])
def test_every_way_to_forget_forgets_the_text(folder, how):
    now = [1000.0]
    with open_bank(folder, create=True, clock=lambda: now[0]) as bank:
        bank.add("a", *writer(1.0), text="the password is xyzzy", questions=["xyzzy?"], expires_at=1010.0)
        open_index(bank)
        now[0] = 2000.0 if how == "expire" else 1001.0
        {
            "delete": lambda: bank.delete("a"),
            "delete_all": bank.delete_all,
            "reset": bank.reset,
            "expire": bank.purge,
        }[how]()
        assert holders(folder, b"xyzzy") == []
        assert list((folder / "memories").iterdir()) == list((folder / "keys").iterdir()) == []


def test_pruned_versions_are_forgotten_and_the_current_one_is_not(folder):
    with open_bank(folder, create=True) as bank:
        bank.add("a", *writer(1.0), text="the password is xyzzy")
        bank.update("a", *writer(2.0), text="the password is plugh")
        assert holders(folder, b"xyzzy")
        bank.prune("a")
        assert holders(folder, b"xyzzy") == []
        assert bank.text("a") == "the password is plugh"


def test_answers_are_bit_for_bit_those_of_a_bank_that_never_held_it(tmp_path):
    question, options = "When does the ferry to Vask leave?", {"gate": False, "sampling": SAMPLING}
    tokens = BASE.tokenizer.encode(question)
    with (
        open_bank(tmp_path / "held", create=True, base_id=BASE.id) as held,
        open_bank(tmp_path / "never", create=True, base_id=BASE.id) as never,
    ):
        warm = engine(held)
        for seed, name in enumerate(TEXTS, start=1):
            add(held, name, seed)
            if name != "harp":
                add(never, name, seed)
        with_it = warm.ask(question, **options)
        assert "harp" in {c.name for c in with_it.choice.candidates}
        (gone,) = held.delete("harp")
        rank, slot = warm.pools.place(gone)
        assert any(np.asarray(x[:, slot]).any() for x in warm.pools.slots(rank).a.values())
        for asked in (warm, engine(held)):
            answer, expected = asked.ask(question, **options), engine(never).ask(question, **options)
            assert answer.choice == expected.choice  # names, scores and entropies, to the last bit
            assert answer.text == expected.text
            losses = asked.answer_losses(tokens, "6:40", [None, "ferry", "oven"])
            np.testing.assert_array_equal(losses, engine(never).answer_losses(tokens, "6:40", [None, "ferry", "oven"]))
        assert gone not in warm.pools.ids()
        slots = warm.pools.slots(rank)
        assert not any(np.asarray(x[:, slot]).any() for x in (*slots.a.values(), *slots.b.values()))


def test_a_gate_that_saw_it_is_stale(tmp_path):
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id) as bank:
        add(bank, "ferry", 1)
        set_gate(bank, 1.0)
        assert not bank.record(GATE, "default").stale
        bank.delete("ferry")
        assert bank.record(GATE, "default").stale
