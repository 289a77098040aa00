"""LongBench: metrics against the packages and rules of its reference, its files, and its prompts put to a subject."""

import json
from pathlib import Path

import pytest

from memjax.errors import DataError
from memjax.evaluate import longbench as lb
from tests.evaluate.support import oracle, silent

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "longbench.json").read_text("utf-8"))


@pytest.mark.parametrize(("prediction", "answer", "expected"), GOLDENS["rouge"])
def test_rouge_equals_the_package(prediction, answer, expected):
    assert lb.rouge(prediction, answer) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("prediction", "answer", "expected"), GOLDENS["code"])
def test_code_similarity_equals_fuzzywuzzy_on_difflib(prediction, answer, expected):
    assert lb.code_similarity(prediction, answer) == pytest.approx(expected, abs=1e-9)


def test_code_is_its_first_line_without_comment_or_fence():
    assert lb.code_similarity("\n\n```python\n# a note\nx = 1 // 2\nx = 1\ny = 2", "x = 1") == 1
    assert lb.code_similarity("# nothing\n// else", "x = 1") == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The Tavin!", "tavin", 1),
        ("", "", 0),  # unlike SQuAD: nothing in common is 0
        ("the", "a", 0),
        ("red red", "red", 2 / 3),
        ("x y", "y x", 1),
    ],
)
def test_qa_f1(prediction, answer, expected):
    assert lb.qa_f1(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "expected"),
    [
        ("Type: Human", "Human", ["Human", "Number"], 1),
        ("Human or Number", "Human", ["Human", "Number"], 1 / 2),
        ("human", "Human", ["Human"], 0),  # case counts
        ("Other number", "Other number", ["number", "Other number"], 1),  # part of the right name
        # The reference removes from the list it walks through: the class after a removed one is not looked at.
        ("a b ab", "ab", ["a", "b", "ab"], 1 / 2),
        ("Human", "Number", ["Human", "Number"], 0),
        ("", "Human", ["Human"], 0),
    ],
)
def test_classification(prediction, answer, classes, expected):
    assert lb.classification(prediction, answer, classes) == expected


def test_numbers():
    assert lb.retrieval("Paragraph 3", "Paragraph 3") == 1
    assert lb.retrieval("It is 3, not 13.", "Paragraph 3") == 1 / 2
    assert lb.retrieval("none", "Paragraph 3") == 0
    assert lb.retrieval_zh("段落7", "段落7") == 1
    assert lb.count("12 or 012", "12") == 1 / 2
    with pytest.raises(DataError, match="answers"):
        lb.retrieval("3", "3")


def test_the_best_answer_counts_and_few_shot_sets_end_with_their_line():
    example = lb.Example("q", "c", ("Bavo", "Tavin"), ("Bavo", "Tavin"))
    assert lb.score("hotpotqa", "Tavin", example) == 1
    assert lb.score("trec", "\nBavo\nTavin", example) == 1
    assert lb.score("hotpotqa_e", "Bavo\nTavin", example) == pytest.approx(2 / 3)


def test_every_set_has_a_prompt_that_holds_its_context():
    assert set(lb.prompts()) == set(lb.TASKS)
    for name, prompt in lb.prompts().items():
        query = lb.as_query(name, lb.Example("QUESTION", "CONTEXT {input}", ("a",), ()), prompt)
        assert query.context.endswith("CONTEXT {input}")  # what looks like a field in the text is left alone
        assert query.context + query.gap + query.question == prompt.replace("{input}", "QUESTION").replace(
            "{context}", "CONTEXT {input}"
        )
        assert query.chat == (name not in lb.FEW_SHOT)


def record(**changes):
    return {"input": "Who?", "context": "Bavo.", "answers": ["Bavo"], "all_classes": None, "length": 1, **changes}


def test_files_become_scores(tmp_path):
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record()) + "\n\n" + json.dumps(record(context="Koro.")) + "\n")
    (tmp_path / "trec_e.jsonl").write_text(json.dumps(record(all_classes=["Bavo", "Koro"])) + "\n")
    (tmp_path / "notes.jsonl").write_text("not of LongBench\n")
    sets = {name: lb.read_set(path) for name, path in lb.find_sets(tmp_path).items()}
    assert {name: len(examples) for name, examples in sets.items()} == {"qasper": 2, "trec_e": 1}
    scores, cut = lb.longbench_item_scores([oracle(lambda query: "Bavo"), silent()], sets)
    assert (scores["qasper/oracle"], scores["trec_e/oracle"], scores["mean/oracle"]) == ([1, 1], [1], [1, 1])
    assert (scores["qasper/silent"], scores["trec_e/silent"], cut) == ([0, 0], [0], 0)
    assert len(lb.longbench_item_scores([silent()], sets, limit=1)[0]["qasper/silent"]) == 1


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{bad", "line 2: is not JSON"),
        ("[1]", "line 2: is a list"),
        (json.dumps(record(context=3)), "line 2: the field 'context' must be a text, but is a number"),
        (json.dumps(record(answers="Bavo")), "line 2: the field 'answers' must be a list, but is a text"),
        (json.dumps(record(answers=["a", None])), r"line 2: the field 'answers'\[1\] must be a text, but is null"),
        (json.dumps(record(answers=[])), "line 2: the field 'answers' is empty"),
        ('{"input": "q", "context": "c"}', "line 2: the field 'answers' is missing"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, match):
    path = tmp_path / "qasper.jsonl"
    path.write_text(f"{json.dumps(record())}\n{line}\n")
    with pytest.raises(DataError, match=match) as caught:
        lb.read_set(path)
    assert str(path) in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file of a LongBench set"):
        lb.find_sets(tmp_path)
