"""Scores against the reference rules, on strings chosen to tell wrong implementations from right ones."""

import pytest

from memjax.errors import DataError
from memjax.evaluate import metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Tower of London.", "tower of london"),
        ("an  apple\n a day", "apple day"),
        ("a.n", ""),  # marks go before articles: "an" is left and dropped
        ("theatre and another", "theatre and another"),  # articles are whole words
        ("don't", "dont"),
        ("state-of-the-art", "stateoftheart"),
        ("“Quoted” – dash", "“quoted” – dash"),  # only ASCII marks are marks
        ("ÉCOLE", "école"),
        ("a", ""),
        ("", ""),
        ("$1,000.50", "100050"),
    ],
)
def test_normalize_follows_squad(text, expected):
    assert metrics.normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("the Tavin!", ["Tavin"], 1, 1),
        ("Tavin", ["Bavo", "tavin."], 1, 1),  # best of several answers
        ("Tavin town", ["Tavin"], 0, 2 / 3),
        ("x x x", ["x"], 0, 0.5),  # a bag, not a set: 1 of 3, 1 of 1
        ("x y", ["y x"], 0, 1),
        ("", [], 1, 1),  # v2: no answer, nothing said
        ("something", [], 0, 0),
        ("", ["Tavin"], 0, 0),
        ("the", ["Tavin"], 0, 0),
        ("", ["", "Tavin"], 0, 0),  # empty golds are dropped when others exist
        ("", ["the", "?"], 1, 1),  # golds that normalise to nothing mean "no answer"
        ("red blue", ["blue green", "red"], 0, 2 / 3),
    ],
)
def test_squad_em_and_f1(prediction, answers, em, f1):
    assert metrics.exact_match(prediction, answers) == em
    assert metrics.f1(prediction, answers) == pytest.approx(f1)


def test_one_string_for_answers_is_refused():
    with pytest.raises(DataError, match="list"):
        metrics.exact_match("Tavin", "Tavin")


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It is in Tavin, I think.", ["Tavin"], 1),
        ("TAVIN'S walls", ["tavin"], 1),
        ("Tavinish", ["Tavin"], 0),
        ("I do not know.\nTavin", ["Tavin"], 0),  # first line only
        ("\n Tavin", ["Tavin"], 1),  # blank space before it is not a line
        ("not stated here", ["Not stated."], 1),
        ("475", ["47"], 0),
        ("x", ["", "!"], 0),  # an empty gold is contained in nothing
        ("Paris", ["London", "Paris"], 1),
        ("the year 1,200", ["1 200"], 1),
    ],
)
def test_contains(prediction, answers, expected):
    assert metrics.contains(prediction, answers) == expected


# What rouge-score 0.1.2 says: prediction, answers, stemmed, precision, recall, F1.
ROUGE = [
    ("the cat sat on the mat", ["the cat was on the mat"], False, 0.833333, 0.833333, 0.833333),
    ("", ["x"], False, 0, 0, 0),
    ("x", [""], False, 0, 0, 0),
    ("Bavo lives in Tavin!", ["bavo LIVES, in tavin"], False, 1, 1, 1),
    ("1234", ["1234", "12"], False, 1, 1, 1),
    ("The number is 0042.", ["0042"], False, 0.25, 1, 0.4),
    ("naïve café", ["naive cafe"], False, 0, 0, 0),
    ("a b c d e", ["e d c b a", "a c e"], False, 0.6, 1, 0.75),
    ("世界", ["世界"], False, 0, 0, 0),
    ("don't stop", ["dont stop"], False, 0.333333, 0.5, 0.4),
    ("a a a a", ["a a"], False, 0.5, 1, 0.666667),
    ("x_y", ["x y"], False, 1, 1, 1),
    ("İstanbul 5", ["istanbul 5"], False, 0.333333, 0.5, 0.4),
    ("running quickly", ["run quick"], False, 0, 0, 0),
    ("running quickly", ["run quick"], True, 0.5, 0.5, 0.5),
]


@pytest.mark.parametrize(("prediction", "answers", "stemmed", "precision", "recall", "f1"), ROUGE)
def test_rouge_l_equals_rouge_score(prediction, answers, stemmed, precision, recall, f1):
    stem = {"running": "run", "quickly": "quickli", "quick": "quick"}.__getitem__ if stemmed else None
    score = metrics.rouge_l(prediction, answers, stem)
    assert score == pytest.approx((precision, recall, f1), abs=1e-6)


def test_ruler_matchers():
    assert metrics.string_match_all("Alpha and beta", ["alpha", "BETA", "gamma"]) == pytest.approx(2 / 3)
    assert metrics.string_match_all("12345", ["234"]) == 1  # substrings, not words
    assert metrics.string_match_part("the answer: Paris", ["London", "paris"]) == 1
    assert metrics.string_match_part("", ["x"]) == 0
    # Control characters become line breaks, so they separate: "al\tpha" does not hold "alpha".
    assert metrics.string_match_all("al\tpha", ["alpha"]) == 0
    assert metrics.string_match_all("\x00alpha\x1f", ["alpha"]) == 1


def test_intervals():
    # Three seeds: t = 4.303 with 2 degrees of freedom, s = 0.1.
    mean = metrics.over_seeds([0.8, 0.9, 1.0])
    half = 4.303 * 0.1 / 3**0.5
    assert mean == pytest.approx((0.9, 0.9 - half, 0.9 + half))
    assert metrics.over_seeds([0.7]) == (0.7, 0.7, 0.7)
    items = metrics.over_items([1.0] * 90 + [0.0] * 10)
    assert items.mean == 0.9
    assert 0.80 < items.low < 0.87 < 0.93 < items.high < 0.98
    assert items == metrics.over_items([1.0] * 90 + [0.0] * 10)
    assert metrics.over_items([1.0] * 5) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("values", [[], [float("nan")], [[1.0]]])
def test_a_mean_of_nothing_is_refused(values):
    with pytest.raises(DataError):
        metrics.over_seeds(values)


def test_chance_is_the_commonest_answer_of_each_relation():
    assert metrics.chance({"home": ["Tavin", "Tavin", "Bavo"], "age": ["1", "2", "3"]}) == pytest.approx(3 / 6)
