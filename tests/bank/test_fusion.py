"""Fusion: words and meaning together, each rule against its formula, and one interface to all kinds of retrieval."""

import numpy as np
import pytest

from memjax.bank.fusion import RULES, Fusion, FusionConfig, fuse, open_retriever
from memjax.bank.retrieve import TextIndex, build_index
from memjax.bank.store import open_bank
from memjax.bank.vectors import Vectors, build_vectors
from memjax.errors import ConfigError
from memjax.models.encoder import Encoder
from tests.bank.test_retrieve import add
from tests.bank.test_vectors import TOPICS, Counting

TEXTS = {
    "sea": "The ferry leaves at nine.",
    "food": "Orla sells rye bread.",
    "air": "Vask has a radio mast.",
    "pets": "Brindle keeps a dog.",
}


@pytest.fixture
def encoder():
    return Encoder("topics", len(TOPICS), Counting())


@pytest.fixture
def bank(tmp_path):
    with open_bank(tmp_path / "bank", create=True) as bank:
        yield bank


@pytest.mark.parametrize("rule", RULES)
def test_names_and_paraphrases_are_both_found(encoder, rule):
    text, vectors = build_index(TEXTS.values(), TEXTS), build_vectors(TEXTS.values(), TEXTS, encoder)
    both = Fusion(text, vectors, FusionConfig(rule, 0.5))
    assert text.search("any ship?", 4) == []  # no word in common
    assert both.search("any ship?", 1)[0][0] == "sea"
    assert np.ptp(vectors.scores("what of Brindle")) == pytest.approx(0, abs=0.5)  # a name means nothing to the encoder
    assert both.search("what of Brindle", 1)[0][0] == "pets"
    assert len(both.search("ship", 9)) == 4
    assert both.search("ship", 0) == []


def test_rules_are_their_formulas():
    text, dense = np.array([0, 3, 0, 1.5], np.float32), np.array([0.9, 0.1, 0.5, 0.3], np.float32)
    rrf = fuse(text, dense, FusionConfig("rrf", 0.25, 10))
    # Places: text 2nd, 4th of those found; dense 1st, -, 2nd, 3rd (the least is not found).
    wanted = [0.25 / 11, 0.75 / 11, 0.25 / 12, 0.75 / 12 + 0.25 / 13]
    np.testing.assert_allclose(rrf, wanted, rtol=1e-6)
    z = lambda s: (s - s.mean()) / s.std()
    np.testing.assert_allclose(fuse(text, dense, FusionConfig("zscore", 0.25)), 0.75 * z(text) + 0.25 * z(dense), rtol=1e-5)
    m = lambda s: (s - s.min()) / np.ptp(s)
    np.testing.assert_allclose(fuse(text, dense, FusionConfig("minmax", 0.25)), 0.75 * m(text) + 0.25 * m(dense), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_where_one_kind_knows_nothing_the_other_decides(rule):
    nothing, scores = np.zeros(4, np.float32), np.array([0.2, 0.7, 0.1, 0.4], np.float32)
    for a, b in ((nothing, scores), (scores, nothing)):
        assert np.argsort(-fuse(a, b, FusionConfig(rule)))[:3].tolist() == [1, 3, 0]
    assert not fuse(nothing, nothing, FusionConfig(rule)).any()
    assert fuse(nothing[:0], nothing[:0], FusionConfig(rule)).shape == (0,)
    assert np.isfinite(fuse(scores[:1], scores[:1], FusionConfig(rule))).all()


def test_equal_scores_share_a_place():
    tied = fuse(np.array([1, 1, 0.5, 0], np.float32), np.zeros(4, np.float32), FusionConfig("rrf", 0.5, 60))
    assert tied[0] == tied[1] > tied[2] > tied[3]


def test_memories_in_another_order_are_matched_by_id(encoder):
    text = build_index(TEXTS.values(), TEXTS)
    names = ["pets", "air", "sea"]
    both = Fusion(text, build_vectors([TEXTS[n] for n in names], names, encoder))
    found = dict(zip(both.ids.tolist(), both.aligned(np.array([3.0, 2.0, 1.0], np.float32)), strict=True))
    assert found == {"sea": 1, "food": 1, "air": 2, "pets": 3}  # "food", which has no vectors, as the worst


def test_the_kind_of_retrieval(bank, encoder):
    for name, text in TEXTS.items():
        add(bank, name, text)
    kinds = {"bm25": TextIndex, "dense": Vectors, "fusion": Fusion, "auto": Fusion}
    for kind, cls in kinds.items():
        got = open_retriever(bank, kind, encoder)
        assert isinstance(got, cls)
        again = open_retriever(bank, kind, encoder, held=got)
        assert again is got
        assert got.search("the ferry", 1) == again.search("the ferry", 1) != []
    assert isinstance(open_retriever(bank), TextIndex)
    both = open_retriever(bank, "fusion", encoder)
    assert open_retriever(bank, "bm25", held=both) is both.text
    assert open_retriever(bank, "dense", encoder, held=both) is both.vectors
    new = add(bank, "more", "a ship")
    assert new in dict(open_retriever(bank, "fusion", encoder, held=both).search("boat", 2))


def test_what_cannot_be_is_refused(bank):
    with pytest.raises(ConfigError, match="retrieval 'fast' is unknown; use one of auto, bm25, dense, fusion"):
        open_retriever(bank, "fast")
    for kind in ("dense", "fusion"):
        with pytest.raises(ConfigError, match=f"retrieval '{kind}' needs an encoder"):
            open_retriever(bank, kind)
    for wrong in ({"rule": "best"}, {"weight": 1.5}, {"rank": -1.0}):
        with pytest.raises(ConfigError, match="fusion wants"):
            FusionConfig(**wrong)
