"""Retrieval by meaning: nearest chunk first, only new texts encoded, nothing kept of what is gone or read of others."""

import dataclasses
import json

import numpy as np
import pytest

from memjax.bank.neighbours import build_graph, graph_bytes, load_graph
from memjax.bank.retrieve import load_index, open_index
from memjax.bank.store import open_bank
from memjax.bank.vectors import (
    build_vectors,
    chunks,
    load_vectors,
    open_vectors,
    save_vectors,
)
from memjax.ids import text_hash
from memjax.models.encoder import Encoder, encode
from tests.bank.test_retrieve import Clock, add

KEYS, ABOUT = "vectors-.safetensors", "vectors.json"

TOPICS = ("boat ferry ship", "bread bakery rye", "tower mast radio", "cat dog animal")


class Counting:
    """An encoder of four topics that notes which texts it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, texts):
        self.seen += texts
        return np.array([[0.1 + sum(word in text for word in topic.split()) for topic in TOPICS] for text in texts])


@pytest.fixture
def run():
    return Counting()


@pytest.fixture
def encoder(run):
    return Encoder("topics", 4, run)


@pytest.fixture
def bank(tmp_path):
    with open_bank(tmp_path / "bank", create=True, clock=Clock()) as bank:
        yield bank


def test_the_nearest_memory_comes_first_by_its_best_chunk(encoder):
    filler = "nothing at all " * 200
    texts = {"sea": f"{filler} a ferry, a boat {filler}", "food": "rye bread", "air": "a radio mast"}
    vectors = build_vectors(texts.values(), texts, encoder)
    assert len(vectors.parts[""].keys) > 10
    assert vectors.search("a ship", 3)[0][0] == "sea"
    assert vectors.search("bakery", 1)[0][0] == "food"
    best = max(encode(encoder, ["a ship"])[0] @ key for key in encode(encoder, chunks(texts["sea"])))
    assert dict(vectors.search("a ship", 3))["sea"] == pytest.approx(best, rel=1e-6)
    assert vectors.search("a ship", 0) == []
    assert build_vectors([], [], encoder).search("a ship", 3) == []


def test_chunks_cover_the_text_and_overlap():
    words = [f"w{n}" for n in range(100)]
    made = chunks(" ".join(words), words=30, overlap=10)
    assert [part.split()[0] for part in made] == ["w0", "w20", "w40", "w60", "w80"][: len(made)]
    assert all(len(part.split()) <= 30 for part in made)
    assert {word for part in made for word in part.split()} == set(words)
    assert chunks("") == [""] == chunks("  \n")
    assert chunks(" a  b\nc ") == ["a  b\nc"]
    ideographs = chunks("東京" * 40, words=30, overlap=10)
    assert len(ideographs) > 1
    assert max(map(len, ideographs)) <= 30
    assert len(chunks("x" * 5000, words=30, overlap=10)) > 5  # what has no spaces is not one word


def test_texts_of_one_memory_count_as_one_and_must_follow_each_other(encoder):
    vectors = build_vectors(["rye", "ferry", "mast"], ["a", "a", "b"], encoder)
    assert vectors.search("boat", 2)[0][0] == "a"
    assert len(vectors.ids) == 2
    with pytest.raises(ValueError, match="follow each other"):
        build_vectors(["x", "y", "z"], ["a", "b", "a"], encoder)


def test_saved_vectors_are_mapped_and_answer_alike(tmp_path, encoder):
    vectors = build_vectors(["rye bread", "", "a ferry"], ["food", "ü", "sea"], encoder)
    save_vectors(vectors, tmp_path)
    again = load_vectors(tmp_path, encoder)
    for query in ("ship", "bread"):
        assert again.search(query, 3) == vectors.search(query, 3)
    assert again.ids.tolist() == ["food", "ü", "sea"]
    assert isinstance(again.parts[""].keys.base, np.memmap)
    assert load_vectors(tmp_path, Encoder("other", 4, encoder.run)) is None


@pytest.mark.parametrize("harm", ["truncate", "delete", "flip", "format"])
def test_damaged_vectors_are_made_again(bank, encoder, run, harm):
    add(bank, "a", "the ferry leaves")
    expected = open_vectors(bank, encoder).search("ship", 1)
    for name in (KEYS, ABOUT):
        path = bank.keys_folder() / name
        data = path.read_bytes()
        if harm == "truncate":
            path.write_bytes(data[: len(data) // 2])
        elif harm == "delete":
            path.unlink()
        elif harm == "flip":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 0x40]))
        else:
            (bank.keys_folder() / ABOUT).write_text(json.dumps({"format": 0}))
        assert load_vectors(bank.keys_folder(), encoder) is None
        run.seen.clear()
        assert open_vectors(bank, encoder).search("ship", 1) == expected
        assert run.seen == ["ship"]  # the bank still has the keys
        assert load_vectors(bank.keys_folder(), encoder) is not None


def test_only_new_texts_are_encoded(bank, encoder, run):
    for text_first in (False, True):
        add(bank, f"a{text_first}", f"the ferry {text_first}")
        add(bank, f"b{text_first}", f"rye bread {text_first}")
        if text_first:
            open_index(bank)  # the text index is made again first
        open_vectors(bank, encoder)
    assert sorted(run.seen) == sorted(f"{text} {first}" for text in ("the ferry", "rye bread") for first in (False, True))
    open_vectors(bank, encoder)
    assert len(run.seen) == 4
    assert len(open_vectors(bank, encoder).search("ship", 9)) == 4
    other = Counting()
    open_vectors(bank, Encoder("other", 4, other))
    assert len(other.seen) == 4


def test_text_index_and_vectors_lie_beside_each_other(bank, encoder, monkeypatch):
    add(bank, "a", "the ferry")
    index, vectors = open_index(bank), open_vectors(bank, encoder)
    assert load_index(bank.keys_folder()).version == index.version
    monkeypatch.setattr(bank, "snapshot", None)  # neither is made again
    assert open_index(bank).search("ferry", 1) == index.search("ferry", 1)
    assert open_vectors(bank, encoder).search("ship", 1) == vectors.search("ship", 1)
    assert open_vectors(bank, encoder, held=vectors) is vectors


def test_what_is_deleted_leaves_no_key(bank, encoder, run):
    add(bank, "a", "the ferry")
    kept = add(bank, "b", "rye bread")
    open_vectors(bank, encoder)
    own = encode(encoder, ["the ferry"])[0].tobytes()
    files = lambda: b"".join(path.read_bytes() for path in bank.path.rglob("*") if path.is_file())
    assert own in files()
    bank.delete("a")
    assert own not in files()
    assert not (bank.keys_folder() / KEYS).exists()
    run.seen.clear()
    now = open_vectors(bank, encoder)
    assert run.seen == []  # what is left is not encoded again
    assert [i for i, _ in now.search("ship", 3)] == [kept]
    assert len(load_vectors(bank.keys_folder(), encoder).parts[""].keys) == 1


def test_damaged_keys_are_encoded_again(bank, encoder, run):
    add(bank, "a", "the ferry")
    expected = open_vectors(bank, encoder).search("ship", 1)
    for harm in (
        "rows = substr(rows, 1, length(rows) - 2)",
        "rows = CAST(substr(rows, 1, 1024) || 'ooooooooooooooo?' AS BLOB)",
    ):
        with bank._index.transaction() as db:
            db.execute(f"UPDATE keys SET {harm}")
        (bank.keys_folder() / KEYS).unlink()
        run.seen.clear()
        assert open_vectors(bank, encoder).search("ship", 1) == expected
        assert run.seen[0] == "the ferry"


def test_keys_are_kept_for_texts_that_the_namespace_still_holds(bank, encoder):
    add(bank, "a", "the ferry")
    add(bank, "b", "the ferry", namespace="you")
    bank.keep_keys("topics", {text_hash("the ferry"): b"keys", text_hash("never added"): b"keys"})
    assert bank.keys(text_hash("the ferry"), "topics") == b"keys"
    assert bank.keys(text_hash("never added"), "topics") is None
    assert bank.keys(text_hash("the ferry"), "topics", "you") is None
    bank.delete("a")
    assert bank.keys(text_hash("the ferry"), "topics") is None


def test_deleting_a_text_does_not_read_through_all_keys(bank):
    plan = bank._index.db.execute("EXPLAIN QUERY PLAN SELECT 1 FROM keys WHERE source = 'x'").fetchall()
    assert [row[-1].split()[0] for row in plan] == ["SEARCH"]  # as the foreign key is checked


def test_what_has_expired_is_not_searched(bank, encoder, run):
    add(bank, "a", "the ferry", expires_at=2000.0)
    add(bank, "b", "rye bread")
    open_vectors(bank, encoder)
    bank._clock.now = 2000.0
    open_index(bank)  # knows nothing of the encoder
    run.seen.clear()
    assert len(open_vectors(bank, encoder).search("ship", 3)) == 1
    assert run.seen == ["ship"]


def test_only_the_namespace_asked_is_read(bank, encoder, run):
    mine = add(bank, "a", "a boat", namespace="me")
    before = open_vectors(bank, encoder, "me").search("ship", 3)
    add(bank, "b", "a ship, a ferry", namespace="you")
    run.seen.clear()
    assert open_vectors(bank, encoder, "me").search("ship", 3) == before
    assert run.seen == ["ship"]
    assert [i for i, _ in before] == [mine]
    assert open_vectors(bank, encoder).search("ship", 3) == []


def test_many_keys_are_searched_through_a_graph(bank):
    rng = np.random.default_rng(0)
    place = {f"text {number}": x for number, x in enumerate(rng.normal(size=(300, 16)))}
    encoder = Encoder("sixteen", 16, lambda asked: np.array([place[text] for text in asked]))
    ids = {text: add(bank, f"n{number}", text) for number, text in enumerate(place)}
    assert open_vectors(bank, encoder).parts[""].graph is None
    bank.delete("n7")  # whatever held the deleted key is made anew, the graph too
    made = open_vectors(bank, encoder, exact=100)
    assert len(made.parts[""].graph) == 299
    held = load_vectors(bank.keys_folder(), encoder)
    assert len(held.parts[""].graph) == 299
    plain = dataclasses.replace(made, parts={"": dataclasses.replace(made.parts[""], graph=None)})
    for number in range(8, 300, 37):
        want = plain.scores(f"text {number}")
        for vectors in (made, held):
            assert vectors.search(f"text {number}", 1)[0][0] == ids[f"text {number}"]
            got = vectors.scores(f"text {number}")
            near = got > got.min()
            assert near.sum() > 200
            np.testing.assert_allclose(got[near], want[near], atol=1e-6)


def test_parts_get_their_graphs_when_there_are_too_many_keys(bank, encoder):
    ids = [add(bank, topic, topic) for topic in TOPICS]
    few = open_vectors(bank, encoder, part=1)
    assert [part.graph for part in few.parts.values()] == [None] * len(few.parts)
    ids.append(add(bank, "more", "a lamp"))
    for vectors in (open_vectors(bank, encoder, exact=3, part=1), load_vectors(bank.keys_folder(), encoder)):
        assert [len(part.graph) for part in vectors.parts.values()] == [len(part.keys) for part in vectors.parts.values()]
        assert vectors.search("rye bread", 1)[0][0] == ids[1]


def test_a_graph_that_cannot_be_read_is_none(tmp_path):
    unit = np.eye(4, dtype=np.float32)
    data = graph_bytes(build_graph(unit))
    assert load_graph(data, 4).search(unit[2], 1).keys.tolist() == [2]
    assert load_graph(data, 5) is None
    assert load_graph(data[: len(data) // 2], 4) is None


# --------------------------------------------------------------------------------------------------------- many parts


@pytest.fixture
def many(bank):
    """{name: id} of sixty memories, whose index has sixteen parts if parts are to hold eight."""
    return {f"n{n}": add(bank, f"n{n}", f"{TOPICS[n % 4].split()[n % 3]} {n}") for n in range(60)}


def part_files(bank):
    return {path.name: path.stat().st_ino for path in bank.keys_folder().iterdir() if path.suffix != ".json"}


def test_parts_score_as_one_does(bank, encoder, many):
    one = open_vectors(bank, encoder)
    bank.rename("n0", "first")  # a new version, with the same texts
    parts = open_vectors(bank, encoder, part=3)
    assert len(parts.parts) > 8
    assert parts.ids.tolist() == one.ids.tolist() == sorted(many.values())
    np.testing.assert_allclose(parts.scores("ship 7"), one.scores("ship 7"), rtol=1e-6)


def test_what_a_deletion_has_not_reached_yet_is_not_carried_over(bank, encoder, many):
    """A process that has committed a deletion, and not yet removed files, while another one installs an index."""
    open_index(bank, part=8)
    open_vectors(bank, encoder, part=8)
    gone = many["n7"][0]
    held = {name: (bank.keys_folder() / name).read_bytes() for name in part_files(bank)}
    bank.delete("n7")
    for index in ("words", "vectors"):  # as it lay there between commit and removal
        (bank.keys_folder() / f"{index}-{gone}.safetensors").write_bytes(held[f"{index}-{gone}.safetensors"])
    open_index(bank, part=8)
    assert not (bank.keys_folder() / f"vectors-{gone}.safetensors").exists()
    assert len([name for name in part_files(bank) if name.startswith("vectors")]) > 8  # the others are


def test_a_change_makes_one_part_anew(bank, encoder, run, many):
    open_index(bank, part=8)
    held = open_vectors(bank, encoder, part=8)
    before = part_files(bank)
    assert {name.split("-")[0] for name in before} == {"words", "vectors"}
    run.seen.clear()
    new = add(bank, "new", "a radio mast")
    for where in (None, held):
        now = open_vectors(bank, encoder, held=where, part=8)
        assert run.seen == ["a radio mast"]
        assert new in now.ids
    open_index(bank, part=8)  # which leaves the vectors alone
    after = part_files(bank)
    assert {name for name in after if before.get(name) != after[name]} == {
        f"words-{new[0]}.safetensors", f"vectors-{new[0]}.safetensors"
    }  # fmt: skip
    bank.delete("n7")
    gone = {f"{index}-{many['n7'][0]}.safetensors" for index in ("words", "vectors")}
    assert part_files(bank) == {name: inode for name, inode in after.items() if name not in gone}
    assert load_vectors(bank.keys_folder(), encoder) is None
    assert many["n7"] not in open_vectors(bank, encoder, part=8).ids
    assert run.seen == ["a radio mast"]
