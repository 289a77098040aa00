"""Questions about a text in a bounded cache: exact where all of it stays, read once, bounded where it does not."""

import pytest

from memjax.errors import InputError
from memjax.evict.compact import Budget
from memjax.evict.policies import policy_named
from memjax.models import generate as g
from memjax.serve import text as t
from memjax.write.prompts import prompt_style, read_tokens
from tests.support import small_base

BASE = small_base(max_positions=512)
STYLE = prompt_style("plain")
TEXT = "The ferry to Vask leaves at 6:40 and the harp of Halvic has 72 strings. " * 8
SAMPLING = g.Sampling(max_tokens=6)
QUESTIONS = ("When does the ferry leave?", "How many strings has the harp?")


def talk(budget, policy="snapkv"):
    return t.TextChat(BASE, STYLE, TEXT, policy_named(policy), Budget.parse(budget))


def plain(question, history=()):
    tokens = read_tokens(BASE.tokenizer, STYLE, TEXT, question, history)
    (made,) = g.generate(BASE.model, BASE.params, [tokens], BASE.tokenizer.eos_ids, SAMPLING)
    return BASE.tokenizer.decode(made).strip(), len(tokens)


def test_a_budget_for_all_answers_like_the_plain_prompt_turn_after_turn():
    held = talk("512")
    for question in (*QUESTIONS, QUESTIONS[0]):
        expected = plain(question, t.messages(STYLE, held.turns))
        answer = held.ask(question, sampling=SAMPLING)
        assert (answer.text, answer.prompt_tokens) == expected
        assert answer.kept_tokens == answer.prompt_tokens
    held.reset()
    assert held.ask(QUESTIONS[1], sampling=SAMPLING).text == plain(QUESTIONS[1])[0]


def test_a_small_budget_keeps_so_much_whatever_was_said(monkeypatch):
    held, fed = talk("48"), []
    read_on = t.read_on
    monkeypatch.setattr(t, "read_on", lambda *args, **how: fed.append(len(args[3][0])) or read_on(*args, **how))
    answers = [held.ask(question, sampling=SAMPLING) for question in (*QUESTIONS, *QUESTIONS)]
    assert {answer.kept_tokens for answer in answers} == {48}
    assert len({answer.cache_bytes for answer in answers}) == 1
    assert max(fed) < 40  # the text was read before: only questions, and what was said, are read now
    assert answers[0].text != plain(QUESTIONS[0])[0]
    held.reset()
    again = held.ask(QUESTIONS[0], sampling=SAMPLING)
    assert again.text == answers[0].text  # /new forgets what was said and keeps the text as it was


def test_what_does_not_fit_the_positions_is_refused_by_name():
    with pytest.raises(InputError, match="at most 512"):
        t.TextChat(BASE, STYLE, TEXT * 4, policy_named("snapkv"), Budget(tokens=32))
    held = talk("48")
    with pytest.raises(InputError, match="at most 512"):
        held.ask("Why? " * 200)
    assert held.turns == []
