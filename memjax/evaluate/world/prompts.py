"""Instructions with answers: about a document (repeat, continue, first and last sentence) and about nothing at all.

Those about nothing are the world's general prompts: common knowledge and small jobs on words that the prompt brings
along. No memory should change their answers.
"""

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from memjax.evaluate.world import common, templates
from memjax.evaluate.world.documents import Document, check_split
from memjax.evaluate.world.names import NAMES, VALUES, draw_number, draw_words


class Prompt(NamedTuple):
    """A user turn, the answer to it, and its kind."""

    kind: str
    text: str
    answer: str


def general_prompts(split: str, seed: int, n: int, start: int = 0) -> list[Prompt]:
    """General prompts `start` … `start + n - 1`: half common knowledge, half jobs on words; no document needed."""
    check_split(split)
    rngs = [Random(f"general/{split}/{seed}/{index}") for index in range(start, start + n)]
    return [common_prompt(rng) if rng.random() < 0.5 else word_prompt(rng, split) for rng in rngs]


def common_prompt(rng: Random) -> Prompt:
    """A question of common knowledge in one of its forms."""
    fact = rng.choice(common.COMMON_FACTS)
    return Prompt("common", common.ask(fact, rng.randrange(common.forms(fact))), fact.answer)


def word_prompt(rng: Random, split: str) -> Prompt:
    """Repeat the words of the prompt, or say its first or last word."""
    words = draw_words(rng, rng.choice((NAMES, VALUES))[split], rng.randint(2, 8))
    if rng.random() < 0.3:
        words = [draw_number(rng, split, 3) for _ in words]
    kind = rng.choice(("echo", "echo", "first_word", "last_word"))
    forms = {"echo": templates.ECHO, "first_word": templates.PICK_FIRST, "last_word": templates.PICK_LAST}[kind]
    answer = {"echo": " ".join(words), "first_word": words[0], "last_word": words[-1]}[kind]
    return Prompt(kind, rng.choice(forms.of(split)).format(w=" ".join(words)), answer)


def repeat_prompt(rng: Random, doc: Document) -> Prompt:
    """Repeat the whole document."""
    return Prompt("repeat", rng.choice(templates.REPEAT.of(doc.split)), doc.text)


def passage_prompts(doc: Document, rng: Random) -> Iterator[Prompt]:
    """Continue from a cue, once per sentence that allows it, in random order; now and then first or last sentence."""
    for sentence in rng.sample(doc.sentences, len(doc.sentences)):
        words = sentence.split(" ")
        if len(words) < 4:
            continue
        cut = rng.randint(2, len(words) - 1)
        cue = " ".join(words[:cut])
        # A cue that several sentences share has no single continuation.
        if doc.text.count(cue) == 1:
            yield Prompt("continue", rng.choice(templates.CONTINUE.of(doc.split)).format(c=cue), " ".join(words[cut:]))
        if rng.random() < 0.15:
            yield Prompt("first", rng.choice(templates.FIRST.of(doc.split)), doc.sentences[0])
        if rng.random() < 0.15:
            yield Prompt("last", rng.choice(templates.LAST.of(doc.split)), doc.sentences[-1])


def document_prompts(doc: Document, seed: int = 0) -> list[Prompt]:
    """Instructions about a document: repeat it, and passages of it."""
    rng = Random(f"prompts/{seed}/{doc.text}")
    return [repeat_prompt(rng, doc), *passage_prompts(doc, rng)]


def brief(rng: Random, split: str, question: str, answer: str) -> str:
    """The question with a request for one word (or only the number) behind it, sometimes before it."""
    forms = templates.BRIEF_NUMBER if answer.isdigit() else templates.BRIEF
    note = rng.choice(forms.of(split))
    return f"{question} {note}" if rng.random() < 0.7 else f"{note} {question}"
