"""Changed forms: slots stay, words are known ones, and nothing held out comes of them."""

import re
from collections import Counter
from random import Random

from memjax.evaluate.world import templates
from memjax.evaluate.world.documents import document, random_document
from memjax.evaluate.world.questions import ask
from memjax.evaluate.world.relations import RELATIONS
from memjax.evaluate.world.vary import Habits, changed, invented, pick, plain

TRAIN = templates.forms_of("train")
HELD_OUT = {split: templates.forms_of(split) for split in ("validation", "test")}


def slots(form):
    return re.findall(r"\{\w\}", form)


def words(form):
    return set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w\}", " ", form)))


def test_slots_stay_and_words_are_those_of_train_forms():
    rng, known = Random(0), {word.lower() for form in TRAIN for word in words(form)}
    made = {(form, changed(rng, form)) for form in TRAIN for _ in range(20)}
    assert sum(form != new for form, new in made) > len(made) / 2
    for form, new in made:
        assert sorted(slots(new)) == sorted(slots(form)), new
        assert {word.lower() for word in words(new)} <= known, new


def test_words_in_any_order_still_say_who_does_what_to_whom():
    rng = Random(4)
    bare = {changed(rng, "{o} rules {s}") for _ in range(400)}
    assert any(form.startswith("rules") for form in bare)
    assert all(form.index("{o}") < form.index("{s}") for form in bare)
    by = [form for form in (changed(rng, "{s} is ruled by {o}") for _ in range(400)) if len(form.split()) == 5]
    assert {form.index("{o}") < form.index("{s}") for form in by} == {True, False}
    assert all("by {o}" in form for form in by if sorted(form.split()) == sorted("{s} is ruled by {o}".split()))


def test_no_changed_form_is_held_out():
    """Neither as a form nor once the noun of a relation stands in it."""
    rng = Random(1)
    held = {plain(form) for forms in HELD_OUT.values() for form in forms}
    held |= {plain(form.replace("{n}", r.noun)) for form in held for r in RELATIONS}
    for relation in RELATIONS:
        forms = (*templates.SAYS.train, *templates.ASKS.train, *relation.says.train, *relation.asks.train)
        for form in forms:
            for _ in range(40):
                made = changed(rng, form)
                assert plain(made) not in held
                assert plain(made.replace("{n}", relation.noun)) not in held


def test_varied_documents_say_what_their_facts_are():
    rng = Random(2)
    texts = [random_document(Random(seed), "train", 120, vary).text for seed in range(5) for vary in (False, True)]
    assert len(set(texts)) == 10
    doc = random_document(rng, "train", 120, True)
    for fact in doc.facts:
        assert any(fact.subject in s and fact.object in s for s in doc.sentences)
    assert doc.tokens <= 120
    assert all(doc.text.count(q.answer) for q, _ in zip(ask(doc, rng, "one_hop"), range(5), strict=False))
    assert not document("test", 0, 0, 120).varied


def test_an_author_of_few_forms_tells_all_in_them():
    rng = Random(5)
    for most in (1, 3):
        for seed in range(40):
            told = {pick(rng, templates.SAYS, "train", True, Habits(seed, most)) for _ in range(30)}
            assert 1 <= len(told) <= most
    authors = {pick(rng, templates.SAYS, "train", True, Habits(seed, 1)) for seed in range(200)}
    assert len(authors) > 100
    held = {plain(form) for forms in HELD_OUT.values() for form in forms}
    assert not {plain(form) for form in authors} & held
    docs = [random_document(Random(seed), "train", 400, True) for seed in range(60)]
    alike = [Counter(" ".join(s.split()[:3]) for s in doc.sentences).most_common(1)[0][1] for doc in docs]
    assert 5 < sum(count >= 5 for count in alike) < 40  # many sentences that begin alike, in some documents


def test_invented_forms_have_their_slots_known_words_and_are_not_held_out():
    rng, known = Random(2), {word for form in TRAIN for word in words(form)}
    held = {plain(form) for forms in HELD_OUT.values() for form in forms}
    made = [invented(rng, ("{s}", "{n}", "{o}")) for _ in range(3000)]
    assert len(set(made)) > 2000  # a sixth has the slots alone
    for form in made:
        assert sorted(slots(form)) == ["{n}", "{o}", "{s}"]
        assert words(form) <= known
        assert not {plain(form), *(plain(form.replace("{n}", r.noun)) for r in RELATIONS)} & held


def test_invented_forms_keep_an_order_that_is_asked_for():
    rng = Random(3)
    made = [invented(rng, ("{s}", "{n}", "{o}"), ordered=("{s}", "{o}")) for _ in range(300)]
    assert all(form.index("{s}") < form.index("{o}") for form in made)
    assert {form.index("{n}") < form.index("{s}") for form in made} == {True, False}
