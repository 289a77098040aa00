"""Documents: pure, seeded, disjoint, of the length asked for. Questions: answered by the document, and only by it."""

import re
from collections import Counter

import pytest

from memjax.errors import ConfigError
from memjax.evaluate import metrics
from memjax.evaluate.pretrain_rows import make_encoder
from memjax.evaluate.world import SPLITS, document, documents, near_duplicates, questions, split_of
from memjax.evaluate.world.relations import NUMBER, PLACE
from memjax.evaluate.world.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def encode():
    return make_encoder(build_tokenizer()).tokenizer.encode


def test_a_document_is_a_function_of_its_address():
    batch = documents("test", 3, 5, 120)
    assert batch[4] == document("test", 3, 4, 120) == documents("test", 3, 1, 120, start=4)[0]
    assert len({doc.text for doc in batch}) == 5
    assert document("test", 4, 4, 120).text != batch[4].text


@pytest.mark.parametrize("tokens", [40, 200, 448, 2000])
@pytest.mark.parametrize("split", SPLITS)
def test_documents_have_the_length_asked_for(split, tokens, encode):
    for doc in documents(split, 0, 8, tokens):
        count = len(encode(" " + doc.text).ids)
        assert count == doc.tokens
        assert tokens - 30 < count <= tokens
        assert " ".join(doc.sentences) == doc.text


def test_documents_of_a_seed_share_no_entity():
    docs = documents("test", 0, 200, 200)
    seen = [name for doc in docs for name in doc.kinds]
    assert len(seen) == len(set(seen))


def test_words_of_a_document_belong_to_its_split():
    for split in SPLITS:
        for doc in documents(split, 1, 20, 150):
            for fact in doc.facts:
                assert split_of(fact.subject) == split_of(fact.object) == split


def test_every_fact_is_told_and_has_one_object():
    for doc in documents("test", 2, 30, 200):
        assert len({(fact.subject, fact.relation.noun) for fact in doc.facts}) == len(doc.facts)
        for fact in doc.facts:
            assert any(fact.subject in s and fact.object in s for s in doc.sentences)
        assert not any(re.match(r"[a-z]", sentence) for sentence in doc.sentences)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_in_the_document(split):
    for doc in documents(split, 0, 30, 200):
        table = {(fact.subject, fact.relation.noun): fact.object for fact in doc.facts}
        for question in questions(doc, ("one_hop", "two_hop")):
            assert re.search(rf"\b{question.answer}\b", doc.text)
        for question in questions(doc, ("one_hop",)):
            # The question names the subject, and the subject's relation has that object.
            subjects = [name for name in doc.kinds if re.search(rf"\b{name}\b", question.text)]
            assert [table[name, question.relation] for name in subjects] == [question.answer]
        for question in questions(doc, ("list",)):
            members = question.answer.split(", ")
            assert all(name in doc.kinds for name in members)
            named = {table[name, question.relation] for name in members}
            assert len(named) == 1
            assert named.pop() in question.text


def test_two_hops_need_both_facts():
    found = 0
    for doc in documents("test", 0, 20, 200):
        table = {(fact.subject, fact.relation.noun): fact.object for fact in doc.facts}
        for question in questions(doc, ("two_hop",)):
            start = next(name for name in doc.kinds if re.search(rf"\b{name}\b", question.text))
            bridges = {obj for (subject, _), obj in table.items() if subject == start}
            # The bridge is not named; from it the last relation leads to the answer.
            reached = {b for b in bridges if table.get((b, question.relation)) == question.answer}
            assert reached
            assert not any(re.search(rf"\b{b}\b", question.text) for b in reached)
            found += 1
    assert found > 100


def test_yes_no_is_balanced_and_right():
    counts = Counter()
    for doc in documents("test", 5, 40, 200):
        for question in questions(doc, ("yes_no",)):
            counts[question.answer] += 1
            if question.relation in ("friend", "teacher", "market"):
                continue  # both ends are of one kind, so the text alone does not say which is the subject
            true = any(
                fact.relation.noun == question.relation
                and re.search(rf"\b{fact.subject}\b", question.text)
                and re.search(rf"\b{fact.object}\b", question.text.replace(fact.subject, "", 1))
                for fact in doc.facts
            )
            assert true == (question.answer == "yes"), question
    assert 0.4 < counts["yes"] / counts.total() < 0.65


def test_not_stated_is_not_stated():
    for doc in documents("test", 6, 20, 200):
        told = {(fact.subject, fact.relation.noun) for fact in doc.facts}
        asked = questions(doc, ("not_stated",), limit=20)
        assert asked
        for question in asked:
            assert question.answer == "not stated"
            assert not any(r == question.relation and re.search(rf"\b{s}\b", question.text) for s, r in told)


def test_closed_book_is_at_chance_by_design():
    """Answers are nearly all different, so guessing the commonest one of each relation is worth next to nothing."""
    answers: dict[str, list[str]] = {}
    for doc in documents("test", 0, 100, 200):
        for question in questions(doc, ("one_hop",)):
            answers.setdefault(question.relation, []).append(question.answer)
    assert metrics.chance(answers) < 0.05


def test_limits_seeds_and_kinds():
    doc = document("test", 0, 0, 200)
    assert [q.kind for q in questions(doc, ("yes_no", "one_hop"), limit=2)] == ["yes_no"] * 2 + ["one_hop"] * 2
    assert questions(doc) == questions(doc)
    assert questions(doc, seed=1) != questions(doc, seed=2)
    with pytest.raises(ConfigError, match=r"two_hops.*one_hop"):
        questions(doc, ("two_hops",))
    with pytest.raises(ConfigError, match=r"dev.*train"):
        document("dev", 0, 0, 200)
    with pytest.raises(ConfigError, match="tokens=20"):
        document("test", 0, 0, 20)


def test_near_duplicates_differ_in_one_word_that_the_question_hides():
    pairs = near_duplicates("test", 0, 32, 200)
    texts = [doc.text for doc, _ in pairs]
    assert len(set(texts)) == 32
    first = texts[0].split()
    for doc, question in pairs:
        other = doc.text.split()
        assert len(first) == len(other)
        changed = [(a, b) for a, b in zip(first, other, strict=True) if a != b]
        assert len(changed) <= 1
        place = next(name for name, kind in doc.kinds.items() if kind == PLACE and f"{name}folk" in question.text)
        assert not set(re.findall(r"\w+", question.text)) & {place}
        fact = next(fact for fact in doc.facts if fact.subject == place)
        assert question.answer == fact.object
        assert fact.relation.noun == question.relation
    assert len({question.answer for _, question in pairs}) == 1


def test_near_duplicates_with_answers_of_their_own():
    pairs = near_duplicates("test", 1, 32, 200, vary_answer=True)
    assert len({question.answer for _, question in pairs}) == 32
    for doc, question in pairs:
        assert re.search(rf"\b{question.answer}\b", doc.text)
    with pytest.raises(ConfigError, match="n=1000"):
        near_duplicates("test", 1, 1000, 200)


def test_numbers_have_three_digits():
    facts = [fact for doc in documents("train", 0, 20, 200) for fact in doc.facts if fact.relation.object == NUMBER]
    assert facts
    assert all(re.fullmatch(r"[1-9]\d\d", fact.object) for fact in facts)
