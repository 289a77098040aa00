"""Pretraining examples: pure, within the window, in the chat format, and without a trace of the test world."""

import re
from random import Random

import numpy as np
import pytest

from memjax.errors import ConfigError
from memjax.evaluate import pretrain
from memjax.evaluate.pretrain_rows import COPY_WEIGHT, make_encoder
from memjax.evaluate.world import documents, names, questions
from memjax.evaluate.world.relations import RELATIONS
from memjax.evaluate.world.tokenizer import SPECIALS, build_tokenizer, lexicon


@pytest.fixture(scope="module")
def encoder():
    return make_encoder(build_tokenizer())


def held_out():
    """Names and values of the validation and test world."""
    pools = [table[split] for split in ("validation", "test") for table in (names.NAMES, names.VALUES)]
    return {s + e for pool in pools for s, ends in zip(pool.starts, pool.ends, strict=True) for e in ends}


ALL = pretrain.MIXES["bound"]  # a mix of every task but the long ones
LONG = pretrain.MIXES["long"]


def task_of(index, mix=ALL):
    """The task that an example of a mix was drawn for, with seed 0."""
    return Random(f"pretrain/0/{index}").choices(list(mix), list(mix.values()))[0]


def test_examples_are_pure(encoder):
    for index in (0, 7, 123456789):
        ids, weights = pretrain.example(encoder, 1, index)
        again = pretrain.example(make_encoder(build_tokenizer()), 1, index)
        np.testing.assert_array_equal(ids, again[0])
        np.testing.assert_array_equal(weights, again[1])
    assert not np.array_equal(pretrain.example(encoder, 1, 0)[0], pretrain.example(encoder, 2, 0)[0])


def test_a_window_too_small_is_refused(encoder):
    with pytest.raises(ConfigError, match=r"window=64: .* at least 128"):
        pretrain.example(encoder, 0, 0, 64)
    with pytest.raises(ConfigError, match=r"window=256: .* at least 512"):
        pretrain.example(encoder, 0, 0, 256, LONG)


@pytest.mark.parametrize(
    ("window", "mix", "count"), [(128, ALL, 400), (256, ALL, 400), (512, ALL, 400), (512, LONG, 200), (2048, LONG, 60)]
)
def test_examples_fit_and_teach_something(encoder, window, mix, count):
    lengths = []
    for index in range(count):
        ids, weights = pretrain.example(encoder, 0, index, window, mix)
        assert ids.shape == weights.shape
        assert ids.dtype == np.int32
        assert weights.dtype == np.float32
        assert len(ids) <= window
        assert ids[0] == encoder.special["<bos>"]
        assert weights[0] == 0
        assert (weights >= COPY_WEIGHT).any(), task_of(index, mix)
        lengths.append(len(ids))
    assert np.mean(lengths) > 0.6 * window


@pytest.mark.parametrize(("window", "mix"), [(256, ALL), (1024, LONG)])
def test_examples_are_in_the_chat_format(encoder, window, mix):
    """Decoded and encoded again as one text they are the same ids; answers and ends of turns carry full weight."""
    shape = re.compile(r"<bos>(<sys>[^<]*)?(<doc>[^<]*</doc>)?(<q>[^<]*<a>[^<]*<end>)+")
    for index in range(200):
        if task_of(index, mix) in ("copy", "recite"):  # random ids need not be what the tokenizer would choose
            continue
        ids, weights = pretrain.example(encoder, 0, index, window, mix, vary=index % 2 == 0)
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        assert shape.fullmatch(text), text
        assert encoder.tokenizer.encode(text).ids == ids.tolist()
        ends = ids == encoder.special["<end>"]
        assert (weights[ends] >= COPY_WEIGHT).all()
        asked = np.isin(ids, [encoder.special["<q>"], encoder.special["<a>"], encoder.special["<doc>"]])
        assert (weights[asked] == 0).all()


def test_all_tasks_occur(encoder):
    occurring = {task_of(i, mix) for i in range(600) for mix in (ALL, LONG, pretrain.MIXES["keys"])}
    assert occurring == {task for mix in pretrain.MIXES.values() for task in mix}


def test_encoder_equals_the_tokenizer(encoder):
    for split in names.SPLITS:
        for doc in documents(split, 0, 20, 300):
            assert encoder.encode(" " + doc.text) == encoder.tokenizer.encode(" " + doc.text).ids
            for question in questions(doc, limit=5):
                assert encoder.encode(" " + question.text) == encoder.tokenizer.encode(" " + question.text).ids


@pytest.mark.parametrize(("window", "mix", "count"), [(256, ALL, 1500), (1024, LONG, 200)])
def test_no_test_entity_occurs_in_training(encoder, window, mix, count):
    """By construction (`split_of`, see world/test_names.py), and by looking at what training really sees."""
    held = held_out()
    known = set(lexicon())
    seen = 0
    for index in range(count):
        if task_of(index, mix) in ("copy", "recite", "counts", "codes"):  # no words of the world; numbers of a list
            continue
        ids, _ = pretrain.example(encoder, 0, index, window, mix, vary=index % 2 == 0)
        text = encoder.tokenizer.decode(ids)
        for word in re.findall(r"[A-Za-z]+", text):
            word = word.removesuffix("folk")
            assert word not in held, word
            seen += word not in known
        # Numbers, too: attribute values and needles belong to the train split.
        for number in re.findall(r"(?<![\da-f-])\d{3,}(?![\da-f-])", text):  # but parts of a UUID
            assert names.split_of(number) == "train"
    assert seen > 10_000


def test_random_copies_hold_no_held_out_name(encoder):
    """Tokens are drawn one by one; a chance pair may spell a test name, so copied pairs are checked like the rest."""
    first, held = len(SPECIALS), held_out()
    for index in range(2000):
        if task_of(index) not in ("copy", "recite"):
            continue
        ids, _ = pretrain.example(encoder, 0, index, 256, ALL, vary=index % 2 == 0)
        text = encoder.tokenizer.decode(ids[ids >= first])
        for word in re.findall(r"[A-Za-z]+", text):
            assert word not in held, index


def test_what_is_repeated_is_the_document_in_strange_forms_too(encoder):
    answer, end = encoder.special["<a>"], encoder.special["</doc>"]
    seen = set()
    for index in range(120):
        ids, _ = pretrain.example(encoder, 3, index, 256, {"repeat": 1.0}, True)
        ids = ids.tolist()
        told, again = ids[2 : ids.index(end)], ids[ids.index(answer) + 1 : -1]
        assert again == told
        seen.add(encoder.pieces[told[-1]])
    assert {".", ";", "and"} <= seen  # the marks of documents told in forms that nobody would write


def test_questions_over_two_hops_follow_the_made_up_facts(encoder):
    """The noun next to the subject is followed first; what it leads to has the other noun's object."""
    nouns, known = {relation.noun for relation in RELATIONS}, set(lexicon())

    def split(words):
        return [w for w in words if w not in known], [w for w in words if w in nouns]

    hops = 0
    for index in range(100):
        ids, _ = pretrain.example(encoder, 0, index, 256, {"hops": 1.0})
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False).removeprefix("<bos><doc>")
        told, *turns = re.split("</doc>|<end>", text)
        facts = {}
        for sentence in told.rstrip(".").split("."):
            (subject, obj), (noun,) = split(sentence.split())
            facts[subject, noun] = obj
        for turn in turns[:-1]:
            asked, answer = turn.removeprefix("<q>").split("?<a> ")
            (subject,), asked_nouns = split(asked.split())
            if asked.split().index(asked_nouns[0]) < asked.split().index(subject):
                asked_nouns.reverse()
            for noun in asked_nouns:
                subject = facts[subject, noun]
            assert subject == answer
            hops += len(asked_nouns) == 2
    assert hops > 100


@pytest.mark.parametrize(("task", "window"), [("needles", 512), ("needles", 2048), ("keys", 512)])
def test_long_tasks_are_put_as_ruler_puts_them(encoder, task, window):
    """Every value that an answer names stands in the text above it, behind its key; no answer stands in an earlier one."""
    turn = re.compile(r"provided text\?<a> The special magic \w+ for (.*?) mentioned .*? (?:are|is) (.*?)\.<end>")
    for index in range(60):
        ids, _ = pretrain.example(encoder, 0, index, window, {task: 1.0})
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        said = re.findall(r" for (\S+) is: (\S+)\.", text)
        turns = turn.findall(text)
        assert turns, text
        asked_for = [key for keys, _ in turns for key in re.split(r", and |, ", keys)]
        assert len(set(asked_for)) == len(asked_for)
        for keys, values in turns:
            asked = re.split(r", and |, ", keys)
            assert sorted(re.split(r", and |, ", values)) == sorted(value for key, value in said if key in asked)
