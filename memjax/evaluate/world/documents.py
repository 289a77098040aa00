"""Documents of the invented world: people, places and things with attributes and relations, told in many paraphrases.

A document is a pure function of (split, seed, index, tokens). Objects are drawn independently of subjects and each
document has its own names, so nothing about it can be known without reading it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from memjax.errors import ConfigError
from memjax.evaluate.world import templates
from memjax.evaluate.world.names import NAMES, SPLITS, VALUES, deal_words, draw_number, draw_words
from memjax.evaluate.world.relations import KINDS, NUMBER, PERSON, PLACE, RELATIONS, THING, VALUE, Relation
from memjax.evaluate.world.vary import Habits, pick

MIN_TOKENS = 40
MAX_TOKENS = 4096
HABITUAL = 0.5  # of varied documents: told in few forms
_OF_KIND = {kind: tuple(r for r in RELATIONS if r.subject == kind) for kind in KINDS}
# The pieces that the tiny tokenizer never splits further except names and values, which are two syllables.
_PIECES = re.compile(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s")


class Fact(NamedTuple):
    """ "The `relation` of `subject` is `object`.\""""

    relation: Relation
    subject: str
    object: str


@dataclass(frozen=True)
class Document:
    """A text with what it says. `facts` are in the order of the text; `kinds` says what each named entity is; `varied`:
    some of its forms, and of those of its questions, are changed a little (`vary`)."""

    split: str
    text: str
    facts: tuple[Fact, ...]
    sentences: tuple[str, ...]
    kinds: dict[str, str]
    tokens: int
    varied: bool = False


def documents(split: str, seed: int, n: int, tokens: int, start: int = 0) -> list[Document]:
    """Documents `start` … `start + n - 1` of a split and seed, each of at most (and nearly) `tokens` tokens.

    Documents of one (split, seed, tokens) share no entity with each other until the names of the split run out, which
    takes some 3,000 names, e.g. 300 documents of 200 tokens.
    """
    return [document(split, seed, index, tokens) for index in range(start, start + n)]


def document(split: str, seed: int, index: int, tokens: int) -> Document:
    """The document number `index` of `documents(split, seed, …)`.

    Raises ConfigError if the split is unknown or `tokens` is outside 40 … 4096.
    """
    check_split(split)
    if not MIN_TOKENS <= tokens <= MAX_TOKENS:
        raise ConfigError(f"tokens={tokens}: a world document has {MIN_TOKENS} to {MAX_TOKENS} tokens")
    names_needed, values_needed = cast_size(tokens)
    key = f"{split}/{seed}/{tokens}"
    return compose(
        Random(f"document/{key}/{index}"),
        split,
        deal_words(f"names/{key}", NAMES[split], names_needed, index),
        deal_words(f"values/{key}", VALUES[split], values_needed, index),
        tokens,
    )


def check_split(split: str) -> None:
    """Raises ConfigError unless `split` is one of the three."""
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")


def cast_size(tokens: int) -> tuple[int, int]:
    """How many names and how many values a document of `tokens` tokens may use."""
    return 4 + tokens // 30, 4 + tokens // 24


def random_document(rng: Random, split: str, tokens: int, vary: bool = False) -> Document:
    """A document with names drawn afresh from `rng` (for training, where documents need not be disjoint).

    vary: forms are changed a little, and half of the documents are told by someone of few forms (`vary.Habits`).
    """
    names_needed, values_needed = cast_size(tokens)
    names, values = draw_words(rng, NAMES[split], names_needed), draw_words(rng, VALUES[split], values_needed)
    habits = Habits(rng.getrandbits(32), rng.randint(1, 4)) if vary and rng.random() < HABITUAL else None
    return compose(rng, split, names, values, tokens, vary, habits)


def compose(
    rng: Random,
    split: str,
    names: Sequence[str],
    values: Sequence[str],
    tokens: int,
    vary: bool = False,
    habits: Habits | None = None,
) -> Document:
    """Invents facts about the first names (the others are only ever objects) and tells them, up to `tokens` tokens."""
    lead = names[: 3 + tokens // 45]
    spare = list(names[len(lead) :])
    unused_values = list(values)
    kinds = _cast(rng, lead)
    by_kind = {kind: [name for name in lead if kinds[name] == kind] for kind in KINDS}
    pairs = [(name, relation) for name in lead for relation in _OF_KIND[kinds[name]]]
    rng.shuffle(pairs)
    pairs.sort(key=_first_of_each(pairs))

    told: list[tuple[str, list[Fact]]] = []
    total = 0
    pending: list[Fact] = []
    join = rng.random() < 0.2
    for name, relation in pairs:
        obj = _object(rng, split, relation, name, by_kind, spare, kinds, unused_values)
        if obj is None:
            continue
        pending.append(Fact(relation, name, obj))
        if join and len(pending) == 1:
            continue
        sentence = tell(rng, split, pending, vary, habits)
        cost = (
            count_tokens(sentence, pending) + 1
        )  # its full stop is in the sentence; 1 is slack that keeps texts within the limit
        if total + cost > tokens:
            break
        total += cost - 1
        told.append((sentence, pending))
        pending, join = [], rng.random() < 0.2
    if rng.random() < 0.5:
        order = {name: i for i, name in enumerate(rng.sample(lead, len(lead)))}
        told.sort(key=lambda unit: order[unit[1][0].subject])
    else:
        rng.shuffle(told)
    facts = tuple(fact for _, unit in told for fact in unit)
    sentences = tuple(sentence for sentence, _ in told)
    mentioned = {fact.subject for fact in facts} | {fact.object for fact in facts}
    kinds = {name: kind for name, kind in kinds.items() if name in mentioned}
    return Document(split, " ".join(sentences), facts, sentences, kinds, total, vary)


def _cast(rng: Random, lead: Sequence[str]) -> dict[str, str]:
    """A kind for each name; at least one of each kind."""
    roles = [*KINDS, *rng.choices((PERSON, PLACE, THING), (45, 30, 25), k=len(lead) - 3)]
    rng.shuffle(roles)
    return dict(zip(lead, roles, strict=True))


def _first_of_each(pairs: list[tuple[str, Relation]]):
    """A sort key that brings one fact of every subject to the front, so that nobody stays unmentioned."""
    first: dict[str, str] = {}
    for name, relation in pairs:
        first.setdefault(name, relation.noun)
    return lambda pair: first[pair[0]] != pair[1].noun


def _object(
    rng: Random,
    split: str,
    relation: Relation,
    subject: str,
    by_kind: dict[str, list[str]],
    spare: list[str],
    kinds: dict[str, str],
    unused_values: list[str],
) -> str | None:
    """Draws the object of a fact; None if no word is left for it."""
    if relation.object == NUMBER:
        return draw_number(rng, split, 3)
    if relation.object == VALUE:
        return unused_values.pop() if unused_values else None
    known = [name for name in by_kind[relation.object] if name != subject]
    if spare and (not known or rng.random() < 0.25):
        name = spare.pop()
        kinds[name] = relation.object
        return name
    return rng.choice(known) if known else None


def tell(rng: Random, split: str, facts: Sequence[Fact], vary: bool = False, habits: Habits | None = None) -> str:
    """One sentence that says one or two facts."""
    clauses = []
    for fact in facts:
        forms = fact.relation.says if rng.random() < 0.5 else templates.SAYS
        form = pick(rng, forms, split, vary, habits)
        clauses.append(form.format(s=fact.subject, o=fact.object, n=fact.relation.noun))
    text = clauses[0]
    if len(clauses) == 2:
        text = pick(rng, templates.JOINS, split, habits=habits).format(c=clauses[0], d=clauses[1])
    # A value keeps its small first letter, so a sentence never starts with one.
    if rng.random() < 0.35 or (text.startswith(facts[0].object) and facts[0].relation.object == VALUE):
        text = pick(rng, templates.FRAMES, split, vary, habits).format(c=text)
    return capital(text) + "."


def capital(text: str) -> str:
    """The text with its first letter a capital."""
    return text[0].upper() + text[1:]


def count_tokens(text: str, facts: Sequence[Fact]) -> int:
    """Tokens of a told sentence under the tiny tokenizer: one per word, mark and digit, two per name or value."""
    doubles = sum(1 + (fact.relation.object != NUMBER) for fact in facts)
    return len(_PIECES.findall(text)) + doubles
