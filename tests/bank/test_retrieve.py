"""Text retrieval: the right memory first, only from the namespace asked, and never from a stale or damaged index."""

import math
from collections import Counter

import bm25s
import numpy as np
import pytest

from memjax.bank import retrieve, versions
from memjax.bank.postings import build_part as build
from memjax.bank.postings import word_hash
from memjax.bank.retrieve import build_index, load_index, open_index, save_index, search, search_index
from memjax.bank.store import open_bank
from memjax.bank.words import tokenize
from memjax.memory.files import Meta, write_artefact
from memjax.memory.peft import Factors

TEXTS = {
    "ferry": "The ferry to Ilmar leaves the north pier at 07:45 on weekdays. Tickets cost 1,250 crowns.",
    "bakery": "Orla's bakery opens at six. The rye loaves are sold out by nine; children get a ferry-shaped cookie.",
    "tower": "The radio tower on Mount Besk is 312.5 metres tall and was finished in 1974.",
}


@pytest.fixture
def index():
    return build_index(TEXTS.values(), TEXTS)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def bank(tmp_path):
    with open_bank(tmp_path / "bank", create=True, clock=Clock()) as bank:
        yield bank


def add(bank, name, text, **options):
    meta = Meta("b" * 64, "t" * 64, "", {"name": name, "text": text})
    factors = Factors({"q": np.ones((1, 1, 4))}, {"q": np.ones((1, 1, 4))}, 1.0)
    write = lambda folder: write_artefact(folder, factors, {"q": "self_attn.q_proj"}, meta)
    return bank.add(name, meta.key, write, text=text, **options).id


def word_bytes(word):
    """What stands for a word in the files of an index."""
    return word_hash(word).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The FERRIES don't leave", ["ferry", "don", "leave"]),
        ("When does Orla's bakery open?", ["orla", "bakery", "open"]),
        ("1,250 crowns; 312.5 m, 07:45", ["1250", "crown", "312.5", "07:45"]),
        ("boxes classes buses glass bus its", ["box", "class", "buse", "glass", "bus"]),
        ("São Paulo, Zürich", ["sao", "paulo", "zurich"]),
        ("東京へ行く", ["東", "京", "へ", "行", "く"]),
        ("snake_case e-mail a", ["snake", "case", "e", "mail"]),
        ("", []),
    ],
)
def test_tokens(text, tokens):
    assert tokenize(text) == tokens


@pytest.mark.parametrize(
    ("query", "best"),
    [
        ("When does the ferry leave?", "ferry"),
        ("How much is a ticket for 1250 crowns?", "ferry"),
        ("What is sold at the BAKERY?", "bakery"),
        ("towers of 312.5 metres", "tower"),
        ("what happened in 1974", "tower"),
    ],
)
def test_the_text_that_answers_comes_first(index, query, best):
    assert search_index(index, query, 1)[0][0] == best


def test_only_texts_that_share_a_word_are_returned_unless_filled(index):
    assert [i for i, _ in search_index(index, "ferry", 3)] == ["ferry", "bakery"]
    filled = search_index(index, "ferry", 9, fill=True)
    assert [i for i, _ in filled] == ["ferry", "bakery", "tower"]
    assert filled[2][1] == 0.0
    for query in ("quantum chromodynamics", "what is it?", "", "?!"):
        assert search_index(index, query, 3) == []
        assert [i for i, _ in search_index(index, query, 2, fill=True)] == ["ferry", "bakery"]
    assert search_index(index, "ferry", 0) == []


def test_scores_are_bm25(index):
    """Against the formula of Lucene's BM25, k1 = 1.5 and b = 0.75, written out."""
    documents = {name: tokenize(text) for name, text in TEXTS.items()}
    mean = sum(map(len, documents.values())) / len(documents)
    query = tokenize("the north ferry at 07:45, the ferry")
    expected = {}
    for name, tokens in documents.items():
        counts, score = Counter(tokens), 0.0
        for word in query:
            df = sum(word in other for other in documents.values())
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            tf = counts[word]
            score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(tokens) / mean)) if tf else 0
        if score:
            expected[name] = score
    found = dict(search_index(index, "the north ferry at 07:45, the ferry", 3))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 7])
def test_scores_are_those_of_bm25s(parts):
    rng = np.random.default_rng(0)
    words = [f"w{n}x" for n in range(300)]
    texts = [" ".join(rng.choice(words, size, p=rng.dirichlet(np.full(300, 0.1)))) for size in rng.integers(0, 120, 90)]
    oracle = bm25s.BM25(method="lucene")
    oracle.index([tokenize(text) for text in texts], show_progress=False)
    cuts = np.array_split(np.arange(len(texts)), parts)
    each = {f"{n}": retrieve.build_part([(f"m{i:02d}", texts[i]) for i in cut]) for n, cut in enumerate(cuts)}
    index = retrieve.TextIndex(each)
    assert index.ids.tolist() == [f"m{i:02d}" for i in range(90)]
    for query in ("w7x", "w1x w2x w2x w299x", "w5x none w6x"):
        known = [word for word in tokenize(query) if word in oracle.vocab_dict]
        np.testing.assert_allclose(index.scores(query), oracle.get_scores(known), rtol=1e-5, atol=1e-6)


def test_a_long_text_scores_as_its_best_chunk():
    filler = " ".join(f"word{n}" for n in range(3000))
    texts = {"long": f"{filler} the zebra eats marmalade {filler}", "short": "a zebra", "other": filler}
    index = build_index(texts.values(), texts)
    assert len(index.parts[""].starts) == 3
    assert len(index.parts[""].lengths) > 60
    assert [i for i, _ in search_index(index, "does the zebra eat marmalade", 3)] == ["long", "short"]
    assert len(search_index(index, "word7", 3)) == 2


def test_every_word_of_a_long_text_is_indexed():
    words = [f"w{n}x" for n in range(500)]
    index = build_index([" ".join(words)], ["m"], chunk=16, overlap=4)
    assert all(search_index(index, word, 1) for word in words)


def test_equal_scores_keep_the_order_of_indexing():
    ids = [f"m{n}" for n in range(20)]
    index = build_index(["same words"] * 20, ids)
    assert [i for i, _ in search_index(index, "same", 7)] == ids[:7]


def test_texts_of_one_memory_count_as_one_and_must_follow_each_other():
    index = build_index(["red apple", "green pear", "blue plum"], ["a", "a", "b"])
    assert [i for i, _ in search_index(index, "pear and apple", 3)] == ["a"]
    with pytest.raises(ValueError, match="follow each other"):
        build_index(["x", "y", "z"], ["a", "b", "a"])


@pytest.mark.parametrize("texts", [[], [""], ["the of and", "?"]])
def test_nothing_to_find(tmp_path, texts):
    ids = [f"m{n}" for n in range(len(texts))]
    index = build_index(texts, ids)
    save_index(index, tmp_path)
    for each in (index, load_index(tmp_path)):
        assert search_index(each, "ferry", 2) == []
        assert [i for i, _ in search_index(each, "ferry", 5, fill=True)] == ids


def test_a_saved_index_gives_the_same_answers_from_mapped_files(tmp_path, index):
    save_index(index, tmp_path)
    again = load_index(tmp_path)
    for query in ("ferry", "1974 tower metres", "nothing at all"):
        assert search_index(again, query, 3) == search_index(index, query, 3)
    assert isinstance(again.parts[""].count.base.base, np.memmap)
    assert (again.version, again.valid_until) == (0, None)


def test_indexing_and_searching_are_silent(tmp_path, capfd, caplog):
    caplog.set_level(0)
    index = build_index(TEXTS.values(), TEXTS)
    save_index(index, tmp_path)
    search_index(load_index(tmp_path), "ferry", 2)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# ------------------------------------------------------------------------------------------------------ beside a bank


def test_search_follows_every_change_of_the_bank(bank):
    assert search(bank, "ferry", 3) == []
    ferry, bakery = add(bank, "ferry", TEXTS["ferry"]), add(bank, "bakery", TEXTS["bakery"])
    assert [i for i, _ in search(bank, "ferry pier", 3)] == [ferry, bakery]
    bank.delete("ferry")
    assert [i for i, _ in search(bank, "ferry pier", 3)] == [bakery]
    assert add(bank, "again", TEXTS["ferry"]) in dict(search(bank, "ferry pier", 3))


def test_only_the_namespace_asked_is_searched_and_scored(bank):
    mine = add(bank, "a", "the ferry leaves at nine", namespace="me")
    before = search(bank, "ferry", 3, "me")
    assert [i for i, _ in before] == [mine]
    add(bank, "b", "the ferry, the ferry, the ferry", namespace="you")
    add(bank, "c", "the ferry leaves at nine", namespace="you")
    assert search(bank, "ferry", 3, "me") == before
    assert search(bank, "ferry", 3) == []


def test_the_expired_is_not_found(bank):
    add(bank, "a", "the ferry", expires_at=2000.0)
    kept = add(bank, "b", "the ferry")
    held = open_index(bank)
    assert len(search_index(held, "ferry", 3)) == 2
    bank._clock.now = 2000.0
    assert [i for i, _ in search(bank, "ferry", 3)] == [kept]
    assert open_index(bank, held=held) is not held


def test_an_index_is_made_once_and_kept(bank, monkeypatch):
    add(bank, "a", "the ferry")
    first = open_index(bank)
    assert open_index(bank, held=first) is first
    monkeypatch.setattr(bank, "snapshot", None)  # the texts are not read again
    assert search(bank, "ferry", 1) == search_index(first, "ferry", 1) != []


@pytest.mark.parametrize("harm", ["truncate", "delete", "flip", "format", "extra"])
def test_a_damaged_index_is_made_again(bank, harm):
    add(bank, "a", "the ferry leaves")
    expected = search(bank, "ferry", 1)
    files = sorted(path.name for path in bank.keys_folder().iterdir())
    assert files == ["words-.safetensors", "words.json"]
    for name in files:
        path = bank.keys_folder() / name
        data = path.read_bytes()
        if harm == "truncate":
            path.write_bytes(data[: len(data) // 2])
        elif harm == "delete":
            path.unlink()
        elif harm == "flip":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 0x40]))
        elif harm == "format":
            (bank.keys_folder() / "words.json").write_text('{"format": 0}')
        else:
            (bank.keys_folder() / "extra").write_bytes(b"x")
        assert load_index(bank.keys_folder()) is None
        assert search(bank, "ferry", 1) == expected
        assert load_index(bank.keys_folder()) is not None
        assert sorted(path.name for path in bank.keys_folder().iterdir()) == files


@pytest.mark.parametrize(
    "about", ["[]", "{", '{"format": 3}', '{"format": 3, "parts": ["a"]}', '{"format": 3, "parts": {"../x": {}}}',
              '{"format": 3, "maker": "", "parts": {"": 5}, "version": 1, "valid_until": null}',
              '{"format": 3, "maker": "", "parts": ["a"], "version": 1, "valid_until": null}'],
)  # fmt: skip
def test_a_damaged_description_of_an_index_is_no_index(bank, about):
    entry = add(bank, "a", "the ferry leaves")
    search(bank, "ferry", 1)
    (bank.keys_folder() / "words.json").write_text(about)
    assert load_index(bank.keys_folder()) is None
    assert [i for i, _ in search(bank, "ferry", 1)] == [entry]
    assert load_index(bank.keys_folder()) is not None


def test_an_index_that_cannot_be_saved_is_still_used(bank):
    entry = add(bank, "a", "the ferry")
    (bank.path / "keys").rmdir()
    assert [i for i, _ in search(bank, "ferry", 1)] == [entry]


# --------------------------------------------------------------------------------------------------------- many parts


@pytest.fixture
def many(bank):
    """{name: id} of sixty memories, whose index has sixteen parts if parts are to hold eight."""
    return {f"n{n}": add(bank, f"n{n}", f"the ferry of harbour h{n}x leaves at {n}") for n in range(60)}


def files(bank):
    return {path.name: path.stat().st_ino for path in bank.keys_folder().iterdir() if path.name != "words.json"}


def test_parts_score_as_a_single_index_does(bank, many):
    whole, parts = open_index(bank, part=1000), open_index(bank, held=None, part=8)
    assert list(whole.parts) == [""]
    assert parts is not whole
    bank.rename("n0", "first")  # a new version, with the same texts
    parts = open_index(bank, part=3)
    assert len(parts.parts) > 8
    assert parts.ids.tolist() == whole.ids.tolist() == sorted(many.values())
    for query in ("harbour h7x", "the ferry at 12", "nothing"):
        np.testing.assert_array_equal(parts.scores(query), whole.scores(query))


def test_a_change_makes_one_part_anew_and_leaves_the_others_files(bank, many, monkeypatch):
    held = open_index(bank, part=8)
    before = files(bank)
    assert len(before) > 8
    built = []
    monkeypatch.setattr(retrieve, "build_part", lambda pairs, holds: built.append(1) or build(pairs, holds=holds))
    new = add(bank, "new", "a zeppelin")
    assert search_index(open_index(bank, part=8, held=held), "zeppelin", 2) == search(bank, "zeppelin", 2)
    assert len(built) == 1
    after = files(bank)
    assert [name for name in before if before[name] != after[name]] in ([], [f"words-{new[0]}.safetensors"])
    bank.delete("n7")
    gone = f"words-{many['n7'][0]}.safetensors"
    assert files(bank) == {name: inode for name, inode in after.items() if name != gone}
    assert word_bytes("h7x") not in b"".join(path.read_bytes() for path in bank.path.rglob("*") if path.is_file())
    assert load_index(bank.keys_folder()) is None
    assert search_index(open_index(bank, part=8), "h7x", 1) == []
    assert len(built) == 2
    assert len(search_index(open_index(bank, part=8), "ferry", 100)) == 59


def test_only_a_damaged_part_is_made_again(bank, many, monkeypatch):
    expected = open_index(bank, part=8).scores("ferry at 12")
    path = bank.keys_folder() / f"words-{many['n3'][0]}.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    built = []
    monkeypatch.setattr(retrieve, "build_part", lambda pairs, holds: built.append(1) or build(pairs, holds=holds))
    np.testing.assert_array_equal(open_index(bank, part=8).scores("ferry at 12"), expected)
    assert len(built) == 1
    assert path.read_bytes() == data


def test_of_many_deletions_at_once_the_index_goes_whole(bank, many, monkeypatch):
    monkeypatch.setattr(versions, "_MANY", 3)
    open_index(bank, part=8)
    for name in list(many)[:5]:
        bank.set_expiry(name, 1001.0)
    open_index(bank, part=8)
    bank._clock.now = 2000.0
    assert len(bank.purge()) == 5
    assert not bank.keys_folder().exists()
    assert len(search_index(open_index(bank, part=8), "ferry", 100)) == 55
