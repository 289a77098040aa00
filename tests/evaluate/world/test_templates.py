"""Forms are split-disjoint, yet a reader of train forms knows every word."""

import re
from itertools import combinations

import pytest

from memjax.evaluate.world import names, templates
from memjax.evaluate.world.relations import RELATIONS


def said(form):
    """A form as it stands in a text: with and without a capital."""
    return form[0].upper() + form[1:]


def words(form):
    return set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w\}(folk)?", " ", form)))


def test_no_form_is_in_two_splits():
    for one, other in combinations(names.SPLITS, 2):
        assert not set(templates.forms_of(one)) & set(templates.forms_of(other))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_word_of_a_held_out_form_is_in_a_train_form(split):
    known = set().union(*(words(form) | words(said(form)) for form in templates.forms_of("train")))
    for form in templates.forms_of(split):
        assert words(form) | words(said(form)) <= known, form


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_mark_of_a_held_out_form_is_in_a_train_form(split):
    def marks(forms):
        return set(re.findall(r"[^\w\s{}]", "".join(forms)))

    assert marks(templates.forms_of(split)) <= marks(templates.forms_of("train"))


def test_held_out_sentences_cannot_be_built_from_train_forms():
    """A told clause of one split is no clause of another, whatever stands in the slots."""
    for split in ("validation", "test"):
        for relation in RELATIONS:
            train = templates.SAYS.train + relation.says.train
            held = templates.SAYS.of(split) + relation.says.of(split)
            assert {form.format(s="S", o="O", n=relation.noun) for form in train}.isdisjoint(
                form.format(s="S", o="O", n=relation.noun) for form in held
            )


def test_relations_are_told_apart_by_their_forms():
    """No two relations share a way of being told or asked: a question has one meaning."""
    for split in names.SPLITS:
        for kind in ("says", "asks"):
            forms = [form for relation in RELATIONS for form in getattr(relation, kind).of(split)]
            assert len(forms) == len(set(forms))


def test_every_split_has_every_form():
    for split in names.SPLITS:
        for relation in RELATIONS:
            assert relation.says.of(split)
            assert relation.asks.of(split)
            assert all("{s}" in form and "{o}" in form for form in relation.says.of(split))
            assert all("{s}" in form and "{o}" not in form for form in relation.asks.of(split))
