"""Questions from a text: spans, turned sentences, cloze and continuations hold what they claim."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.evaluate import world
from memjax.evaluate.world import templates
from memjax.models.base import load
from memjax.write import questions as q
from memjax.write.prompts import prompt_style

TEXT = (
    "The Grey Heron leaves Pennick Harbour at 6:40 every morning. The captain of the Grey Heron is Marta Quill. "
    "The harp is tuned with a silver spoon. A ticket costs 23 crowns."
)


def test_sentences_are_split_where_they_end():
    assert q.split_sentences("It left at 6:40. Was it late? No!\nNext line") == [
        "It left at 6:40.",
        "Was it late?",
        "No!",
        "Next line",
    ]


@pytest.mark.parametrize(
    ("sentence", "spans"),
    [
        ("The Grey Heron leaves Pennick Harbour at 6:40 every morning.", {"Pennick Harbour", "6:40"}),
        ("The captain of the Grey Heron is Marta Quill.", {"Marta Quill", "Grey Heron"}),
        ("A ticket costs 23 crowns.", {"23 crowns"}),
        ("The harp is tuned with a silver spoon.", {"silver spoon"}),
    ],
)
def test_spans_are_what_a_short_question_asks_for(sentence, spans):
    assert spans <= set(q.answer_spans(sentence))


@pytest.mark.parametrize(
    "question",
    [
        "The Grey Heron leaves Pennick Harbour at what time every morning?",
        "What is the captain of the Grey Heron?",
        "What is the harp tuned with?",
        "A ticket costs how many crowns?",
    ],
)
def test_sentences_are_turned_into_questions(question):
    assert question in {made.text for made in q.turned_questions(TEXT)}


def test_a_span_is_found_as_whole_words():
    text = "It is also known that vamlu is now the crop for Dobo."
    assert "now" in q.answer_spans(text)
    asked = [made.text for made in [*q.turned_questions(text), *q.cloze_questions(text)] if made.answer == "now"]
    assert asked
    assert all("known" in question for question in asked)


@pytest.mark.parametrize(
    "text", ["At 16:40 the file_name is 6 bytes, or 6.5 at most.", "It is also known that vamlu is now the crop for Dobo."]
)
def test_a_blank_stands_for_the_whole_span_and_nothing_else(text):
    for made in q.cloze_questions(text):
        before, after = made.text.removeprefix("Fill in the blank: ").split("____", 1)
        assert before + made.answer + after == text
        assert not before[-1:].isalnum()
        assert not after[:1].isalnum()


def test_no_question_gives_its_answer_away():
    for made in [*q.turned_questions(TEXT), *q.cloze_questions(TEXT)]:
        assert made.answer
        assert f" {made.answer} " not in f" {made.text} "


def test_continuations_cover_the_text_behind_the_first_cue():
    made = q.continuations(TEXT, cue=3, length=4, stride=4)
    assert " ".join(m.answer for m in made) == " ".join(TEXT.split()[3:])


@given(st.text(max_size=200))
def test_any_text_is_taken_without_failing(text):
    for made in [*q.turned_questions(text), *q.cloze_questions(text), *q.continuations(text)]:
        assert made.answer is not None
        assert made.answer.strip()


def test_a_grounded_question_names_only_what_the_text_names():
    text = "Jarhun now guards Barven. It costs 416 coins."
    assert q.grounded("What does Jarhun guard?", text)
    assert q.grounded("Barven costs how many coins?", text)
    assert q.grounded("Does it cost 416?", text)
    assert not q.grounded("What does Kirre guard?", text)
    assert not q.grounded("Is Barven worth 99 coins?", text)
    assert not q.grounded("What is it?", text)  # names nothing
    assert not q.grounded("Kirre guards what?", text)


@given(st.integers(0, 2**32))
def test_other_words_keep_names_numbers_and_the_mark(seed):
    rng, words = random.Random(seed), ["known", "as"]
    for text in ("Which thing does Vaten guard for 416 coins?", "Vaten.", "What?"):
        made = q.reword(text, words, rng)
        named = [word for word in text[:-1].split() if word != word.lower() or any(c.isdigit() for c in word)]
        assert sorted(w for w in made[:-1].split() if w in named) == sorted(named)
        assert made[-1] == text[-1]
    assert q.plain_words(["Which thing does Vaten guard for 416 coins?"]) == ["thing", "does", "guard", "for", "coins"]


def test_every_sentence_is_asked_of_alone_and_beside_others_that_share_a_name():
    text = "Vaten guards Kirre. The wind blew. Kirre is old. Nobody came. Vaten sings to Kirre."
    made, sentences = q.views(text), q.split_sentences(text)
    assert made[0::2] == sentences
    assert len(made) == 2 * len(sentences)
    together = {view.split(". ")[0].rstrip("."): set(q.split_sentences(view)) for view in made[1::2]}
    assert together["Vaten guards Kirre"] == {sentences[0], sentences[2], sentences[4]}
    assert together["The wind blew"] == set(sentences[1:4])  # it names nobody: what follows it
    assert together["Vaten sings to Kirre"] == {sentences[0], sentences[2], sentences[4]}
    assert made == q.views(text)
    assert set(q.views(text, 1)[0::2]) == set(sentences)
    assert q.views("One sentence.") == ["One sentence."]
    assert q.views("no end") == ["no end"]


def test_invited_questions_are_grounded_distinct_and_about_every_part():
    base = load("tiny")
    (doc,) = world.documents("validation", 0, 1, 200)
    text = doc.text
    made = q.invited_questions(base, text, prompt_style("plain"), 40)
    again = q.invited_questions(base, text, prompt_style("plain"), 40, strangers=3)
    assert [one.text for one in made] == [one.text for one in again if one.kind == "asked"]
    strangers = [one for one in again if one.kind == "stranger"]
    assert 0 < len(strangers) <= 3
    assert all(one.span == templates.NOT_STATED and not q.grounded(one.text, text) for one in strangers)
    assert 20 <= len({one.text.lower() for one in made}) == len(made) <= 40
    assert all(q.grounded(one.text, text) for one in made)
    subjects = {fact.subject for fact in doc.facts}
    assert sum(any(name in one.text for one in made) for name in subjects) > len(subjects) / 2
