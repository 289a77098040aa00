"""Instructions, needle lines and variable chains: the answer is what the prompt asks for."""

import re
from random import Random

import pytest

from memjax.evaluate.world import COMMON_FACTS, SPLITS, document_prompts, documents, general_prompts, lines, split_of


@pytest.mark.parametrize("split", SPLITS)
def test_document_prompts_are_answered_by_the_text(split):
    kinds = set()
    for doc in documents(split, 0, 30, 150):
        prompts = document_prompts(doc)
        assert prompts == document_prompts(doc)
        kinds |= {prompt.kind for prompt in prompts}
        for prompt in prompts:
            if prompt.kind == "repeat":
                assert prompt.answer == doc.text
            elif prompt.kind in ("first", "last"):
                assert prompt.answer == doc.sentences[0 if prompt.kind == "first" else -1]
            else:
                cues = [s[: -len(prompt.answer) - 1] for s in doc.sentences if s.endswith(f" {prompt.answer}")]
                cue = next(cue for cue in cues if re.search(rf"[:?] {re.escape(cue)}$", prompt.text))
                assert doc.text.count(cue) == 1
    assert kinds == {"repeat", "first", "last", "continue"}


def test_general_prompts_need_no_document():
    prompts = general_prompts("test", 0, 400)
    assert prompts[7:9] == general_prompts("test", 0, 2, start=7)
    assert len({prompt.text for prompt in prompts}) > 300
    facts = {fact.answer for fact in COMMON_FACTS}
    for prompt in prompts:
        if prompt.kind == "common":
            assert prompt.answer in facts
            continue
        words = prompt.text.split(": ")[1].split(" ")
        expected = {"echo": words, "first_word": words[:1], "last_word": words[-1:]}[prompt.kind]
        assert prompt.answer == " ".join(expected)
        assert all(split_of(word) == "test" for word in words)
    assert {prompt.kind for prompt in prompts} == {"common", "echo", "first_word", "last_word"}


def test_keyed_needles_stand_in_the_text_once():
    for i in range(20):
        text, numbers = lines.keyed_needles("test", Random(i), [lines.GRASS] * 5, 3)
        assert len(numbers) == 3
        assert len(text.split("\n")) == 8
        for word, number in numbers.items():
            assert text.count(f"One of the special magic numbers for {word} is: {number}.") == 1
            assert split_of(word) == split_of(number) == "test"


def test_variable_chains_are_in_order():
    for i in range(20):
        text, chains = lines.variable_chains("train", Random(i), [lines.GRASS] * 4, 2, 3)
        steps = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
        value = {}
        for name, source in steps:  # a line may only use what an earlier line has set
            value[name] = value.get(source, source)
        for number, variables in chains.items():
            assert [name for name, v in value.items() if v == number] == variables
            assert len(variables) == 4
            assert {split_of(name) for name in variables} == {"train"}
