"""Multiple choice: log-likelihoods against a plain forward pass, both file shapes, and wrong files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import DataError
from memjax.evaluate import choice as c
from memjax.models.decoder import unembed
from memjax.write.prompts import prompt_style
from tests.support import read, small_base

BASE = small_base()
PLAIN = prompt_style("plain")
QUESTIONS = [
    c.ChoiceQuestion("Where does Bavo live?", ("Tavin", "Koro and Tavin", "Bavo"), 0),
    c.ChoiceQuestion("1 plus 1?", ("2", "3"), 1),
]


def by_hand(prompt, rest):
    ids = jnp.asarray([[*prompt, *rest]])
    out = read(BASE.model, BASE.params, ids, jnp.arange(ids.shape[1])[None])
    logp = jax.nn.log_softmax(unembed(BASE.model, BASE.params, out.hidden[0]))
    return float(sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(rest)))


def test_log_likelihoods_equal_a_plain_forward_pass():
    prompts = [[1, 5, 9, 4], [1, 5, 7], [1, 5, 9, 4]]
    rests = [[11, 12, 13], [11], [20, 21]]
    told = []
    sums = c.log_likelihoods(BASE, prompts, rests, rows=2, progress=told.append)
    assert sums == pytest.approx([by_hand(p, r) for p, r in zip(prompts, rests, strict=True)], abs=1e-4)
    assert told == [2, 3]


def test_the_likeliest_choice_is_taken_by_sum_and_per_token(monkeypatch):
    sums = [-3.0, -3.5, -9.0, -5.0, -4.0]
    shown = []
    monkeypatch.setattr(c, "log_likelihoods", lambda base, prompts, rests, **kw: shown.extend(rests) or sums)
    scores = c.choice_item_scores(BASE, PLAIN, QUESTIONS)
    encode = BASE.tokenizer.encode
    assert shown == [encode(f" {choice}") for question in QUESTIONS for choice in question.choices]
    # " Tavin" has two tokens at -1.5 each, " Koro and Tavin" five at -0.7: the first by sum, the second per token.
    assert scores == {"accuracy": [1, 1], "accuracy_per_token": [0, 1], "chance": [1 / 3, 1 / 2]}


def test_common_knowledge_offers_its_answer_among_others():
    asked = c.common_choices(0)
    assert len(asked) == 230
    assert all(len(set(q.choices)) == len(q.choices) >= 3 for q in asked)
    places = np.bincount([q.right for q in asked])
    assert len(places) == 5  # the right answer has no place of its own
    assert min(places) > 20
    assert c.common_choices(1, 10) == c.common_choices(1, 10) != c.common_choices(2, 10)
    assert c.drawn(asked, 0, 500) == asked
    assert len(c.drawn(asked, 0, 7)) == 7


def record(**changes):
    choices = [{"label": label, "text": text} for label, text in zip("ABC", ("river", "bank", "bed"), strict=True)]
    return {"answerKey": "B", "id": "1", "question": {"stem": "Where is money?", "choices": choices}, **changes}


def test_both_shapes_of_commonsenseqa_are_read(tmp_path):
    flat = {"question": "Where?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"}
    path = tmp_path / "dev.jsonl"
    path.write_text(f"{json.dumps(record())}\n\n{json.dumps(flat)}\n")
    assert c.read_choices(path) == [
        c.ChoiceQuestion("Where is money?", ("river", "bank", "bed"), 1),
        c.ChoiceQuestion("Where?", ("x", "y"), 0),
    ]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (json.dumps(record(answerKey="E")), "line 2: the field 'answerKey' must be one of the labels.*'E'"),
        ('{"question": {"stem": "q", "choices": []}}', "line 2: the field 'answerKey' is missing"),
        (json.dumps(record(question={"choices": []})), "line 2, question: the field 'stem' is missing"),
        (json.dumps(record(question={"stem": "q", "choices": ["x"]})), r"question.choices\[0\]: must be an object"),
        (json.dumps(record(question="q")), "line 2: the field 'choices' is missing"),
        (json.dumps(record(question="q", choices={"label": ["A"], "text": [3]})), r"'text'\[0\] must be a text"),
        ("nothing", "line 2: is not JSON"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, match):
    path = tmp_path / "dev.jsonl"
    path.write_text(f"{json.dumps(record())}\n{line}\n")
    with pytest.raises(DataError, match=match) as caught:
        c.read_choices(path)
    assert str(path) in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "dev.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no question"):
        c.read_choices(tmp_path / "dev.jsonl")
