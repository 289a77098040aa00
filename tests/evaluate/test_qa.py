"""Questions with short answers: a subject that knows scores 1 everywhere, one that does not 0; SQuAD by its own rules."""

import json

import pytest

from memjax.errors import DataError
from memjax.evaluate import qa
from memjax.evaluate.report import summarize
from memjax.evaluate.squad import Paragraph, SquadQuestion, read_articles
from memjax.evaluate.subjects import Query
from tests.evaluate.support import oracle, silent
from tests.support import small_base

ENCODE = small_base().tokenizer.encode
LIMIT = 24


def count(text):
    return len(ENCODE(text))


def gold(seed=0):
    items = [*qa.world_items(seed, LIMIT), *qa.repeat_items(seed, LIMIT)]
    items += [item for document in (True, False) for item in qa.common_items(seed, LIMIT, document=document)]
    items += [item for _, item in qa.needle_items(seed, 48, count)]
    return {item.query: item.answer for item in items}


def test_items_are_what_the_marks_say():
    items = qa.world_items(0, 240)
    kinds = [item.kind for item in items]
    assert {kind: kinds.count(kind) >= 100 for kind in set(kinds)} == dict.fromkeys(qa.PER_DOCUMENT, True)
    assert kinds.count("one_hop") == 240
    assert kinds.count("two_hop") >= 200
    assert all(170 <= count(item.query.context) <= 200 for item in items)
    assert qa.world_items(0, 30) == qa.world_items(0, 30)
    assert qa.world_items(0, 30) != qa.world_items(1, 30)
    needles = qa.needle_items(0, 40, count)
    assert sorted({decile for decile, _ in needles}) == list(range(10))
    assert all(430 <= count(item.query.context) <= 470 for _, item in needles)
    with_document, alone = (qa.common_items(0, 300, document=document) for document in (True, False))
    assert [i.answer for i in with_document] == [i.answer for i in alone]
    assert len(alone) == 230
    assert all(i.answer not in i.query.context.split() for i in with_document)


def test_who_knows_scores_one_and_who_does_not_zero():
    known = gold()
    right = oracle(lambda query: known[query], "in_context")
    numbers = summarize(
        [qa.world_item_scores([right, oracle(lambda query: known.get(query, "?"), "no_context")], ENCODE, 0, LIMIT)[0]]
    )
    over_chance = numbers.pop("closed_book_over_chance")
    assert 0.9 < over_chance < 1  # chance is taken off what is known by heart
    assert {key: numbers[key] for key in qa.MARKS if key in numbers} == dict.fromkeys(
        set(qa.MARKS) - {"closed_book_over_chance"}, 1
    )
    wrong = [silent(name) for name in ("in_context", "no_context", "retrieval")]
    scores, cut = qa.world_item_scores(wrong, ENCODE, 0, LIMIT)
    assert cut == 0
    numbers = summarize([scores])
    assert -0.1 < numbers.pop("closed_book_over_chance") < 0
    assert {numbers[key] for key in qa.MARKS if key in numbers} == {0}
    assert numbers["one_hop/retrieval"] == 0  # other subjects stand beside the marks, under their names


def test_the_worst_decile_counts():
    known = gold()
    worst = {item.query for decile, item in qa.needle_items(0, 48, count) if decile == 7}
    subject = oracle(
        lambda query: "0" if query in worst and query.context.startswith("The grass") else known[query], "in_context"
    )
    scores, _ = qa.world_item_scores([subject], ENCODE, 0, LIMIT)
    assert scores["needle_450"] == [0] * len(scores["needle_450"])


def test_token_accuracy_is_strict():
    assert qa.token_accuracy([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert qa.token_accuracy([1, 2, 9, 4], [1, 2, 3, 4]) == 0.75
    assert qa.token_accuracy([2, 3, 4], [1, 2, 3, 4]) == 0  # one left out spoils what follows
    assert qa.token_accuracy([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4]) == 0.5  # and going on is wrong
    assert qa.token_accuracy([], []) == 0


def squad(v2=True):
    asked = [
        {
            "id": "a",
            "question": "Who?",
            "answers": [{"text": "the Bavo"}, {"text": "Bavo of Tavin"}],
            "is_impossible": False,
        },
        {"id": "b", "question": "When?", "answers": [], "is_impossible": True},
    ]
    if not v2:
        asked = [{"id": "a", "question": "Who?", "answers": [{"text": "Bavo", "answer_start": 0}]}]
    return {"version": "x", "data": [{"title": "t", "paragraphs": [{"context": "Bavo lives.", "qas": asked}]}]}


def write(tmp_path, value):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(value))
    return path


def test_squad_v2_scores_no_answer_as_the_empty_string(tmp_path):
    articles = read_articles(write(tmp_path, squad()))
    says = {"Who?": "bavo!\nand more", "When?": "Not stated."}
    subjects = [oracle(lambda query: says[query.question]), silent(), oracle(lambda query: "1999", "bold")]
    scores, _ = qa.squad_item_scores(subjects, articles)
    assert scores["exact_match/oracle"] == scores["f1/oracle"] == [1, 1]
    assert scores["exact_match/silent"] == [0, 1]
    assert scores["exact_match/bold"] == [0, 0]
    assert scores["exact_match_unanswerable/oracle"] == [1]
    assert scores["exact_match_answerable/silent"] == [0]


def test_squad_v1_takes_words_as_they_are(tmp_path):
    value = squad(v2=False)
    value["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["text"] = "unknown"
    scores, _ = qa.squad_item_scores([oracle(lambda query: "unknown")], read_articles(write(tmp_path, value)))
    assert scores == {"exact_match/oracle": [1], "f1/oracle": [1]}


def test_a_limit_draws_questions_by_seed():
    paragraph = Paragraph("c", tuple(SquadQuestion(str(i), f"q{i}?", ("a",), False) for i in range(50)))
    asked: list[Query] = []
    subject = oracle(lambda query: asked.append(query) or "a")
    for seed in (0, 0, 1):
        assert len(qa.squad_item_scores([subject], [[paragraph]], seed, 10)[0]["f1/oracle"]) == 10
    assert asked[:10] == asked[10:20] != asked[20:]
    assert [int(q.question[1:-1]) for q in asked[:10]] == sorted(int(q.question[1:-1]) for q in asked[:10])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.pop("data"), "the field 'data' is missing"),
        (
            lambda d: d["data"][0].update(paragraphs={}),
            r"data\[0\]: the field 'paragraphs' must be a list, but is an object",
        ),
        (lambda d: d["data"][0]["paragraphs"][0].pop("context"), r"paragraphs\[0\]: the field 'context' is missing"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][1].update(question=None), r"qas\[1\]: the field 'question'"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].pop("answers"), r"qas\[0\]: the field 'answers' is missing"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(answers=["x"]), r"answers\[0\]: must be an object"),
        (
            lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(is_impossible=0),
            "'is_impossible' must be true or false",
        ),
    ],
)
def test_wrong_squad_files_name_record_and_field(tmp_path, change, match):
    value = squad()
    change(value)
    with pytest.raises(DataError, match=match) as caught:
        read_articles(write(tmp_path, value))
    assert "squad.json" in str(caught.value)


def test_a_file_without_questions_is_refused():
    with pytest.raises(DataError, match="no question"):
        qa.squad_item_scores([silent()], [])
