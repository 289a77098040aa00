"""Questions about a document of the world, with short answers that need nothing but the document."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from memjax.errors import ConfigError
from memjax.evaluate.world import templates
from memjax.evaluate.world.documents import Document, Fact, capital, check_split, document
from memjax.evaluate.world.names import FOLK, NAMES, VALUES, deal_words, draw_number, draw_words
from memjax.evaluate.world.relations import KINDS, NUMBER, PLACE, RELATIONS, VALUE, Relation
from memjax.evaluate.world.templates import NO, NOT_STATED, YES
from memjax.evaluate.world.vary import pick

QUESTION_KINDS = ("one_hop", "two_hop", "list", "yes_no", "not_stated")


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the relation that the answer belongs to (for chance levels)."""

    kind: str
    text: str
    answer: str
    relation: str


def questions(
    doc: Document, kinds: Sequence[str] = QUESTION_KINDS, seed: int = 0, limit: int | None = None
) -> list[Question]:
    """Questions of the given kinds about a document, at most `limit` per kind, in an order drawn from the seed.

    Raises ConfigError for an unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in QUESTION_KINDS]
    if unknown:
        raise ConfigError(f"question kind {unknown[0]!r} is unknown; use {', '.join(QUESTION_KINDS)}")
    asked = []
    for kind in kinds:
        rng = Random(f"questions/{seed}/{kind}/{doc.text}")
        stream = ask(doc, rng, kind)
        for question, _ in zip(stream, range(limit) if limit is not None else _forever(), strict=False):
            asked.append(question)
    return asked


def _forever() -> Iterator[int]:
    n = 0
    while True:
        yield n
        n += 1


def ask(doc: Document, rng: Random, kind: str) -> Iterator[Question]:
    """All questions of one kind, one per fact (or pair, group, claim, gap), in random order and random forms."""
    return _MAKERS[kind](doc, rng)


def _one_hop(doc: Document, rng: Random) -> Iterator[Question]:
    for fact in rng.sample(doc.facts, len(doc.facts)):
        text = _phrase(rng, doc.split, fact.relation, fact.subject, doc.varied)
        yield Question("one_hop", text, fact.object, fact.relation.noun)


def _two_hop(doc: Document, rng: Random) -> Iterator[Question]:
    by_subject: dict[str, list[Fact]] = {}
    for fact in doc.facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    chains = [(a, b) for a in doc.facts for b in by_subject.get(a.object, ()) if b.object != a.subject]
    for first, second in rng.sample(chains, len(chains)):
        path = pick(rng, templates.PATHS, doc.split, doc.varied).format(n=first.relation.noun, s=first.subject)
        text = _phrase(rng, doc.split, second.relation, path, doc.varied)
        yield Question("two_hop", text, second.object, second.relation.noun)


def _list(doc: Document, rng: Random) -> Iterator[Question]:
    groups: dict[tuple[str, str], list[str]] = {}
    for fact in doc.facts:
        if fact.relation.object in KINDS:
            groups.setdefault((fact.relation.noun, fact.object), []).append(fact.subject)
    # Answers of several names first; those of one name are asked too, but mostly stand behind.
    order = rng.sample(sorted(groups), len(groups))
    order.sort(key=lambda key: len(groups[key]) == 1)
    for noun, obj in order:
        if len(groups[noun, obj]) <= 4:
            text = pick(rng, templates.LISTS, doc.split, doc.varied).format(o=obj, n=noun)
            yield Question("list", text, ", ".join(groups[noun, obj]), noun)


def _yes_no(doc: Document, rng: Random) -> Iterator[Question]:
    for fact in rng.sample(doc.facts, len(doc.facts)):
        claim, answer = fact.object, YES
        if rng.random() < 0.5:
            others = sorted(
                {f.object for f in doc.facts if f.relation.object == fact.relation.object} - {claim, fact.subject}
            )
            if not others:
                continue
            claim, answer = rng.choice(others), NO
        form = pick(rng, templates.CHECKS, doc.split, doc.varied)
        yield Question("yes_no", form.format(o=claim, n=fact.relation.noun, s=fact.subject), answer, fact.relation.noun)


def _not_stated(doc: Document, rng: Random) -> Iterator[Question]:
    stated = {(fact.subject, fact.relation.noun) for fact in doc.facts}
    gaps = [
        (name, r)
        for name, kind in doc.kinds.items()
        for r in RELATIONS
        if r.subject == kind and (name, r.noun) not in stated
    ]
    stranger = draw_words(rng, NAMES[doc.split], 1)[0]
    if stranger not in doc.kinds:
        gaps += [(stranger, r) for r in rng.sample(RELATIONS, min(len(RELATIONS), 1 + len(gaps) // 4))]
    for name, relation in rng.sample(gaps, len(gaps)):
        yield Question("not_stated", _phrase(rng, doc.split, relation, name, doc.varied), NOT_STATED, relation.noun)


_MAKERS = {"one_hop": _one_hop, "two_hop": _two_hop, "list": _list, "yes_no": _yes_no, "not_stated": _not_stated}


def _phrase(rng: Random, split: str, relation: Relation, subject: str, vary: bool = False) -> str:
    """Asks for the object of a relation; `subject` may be a name or a path to one."""
    forms = relation.asks if rng.random() < 0.4 else templates.ASKS
    return capital(pick(rng, forms, split, vary).format(n=relation.noun, s=subject))


def folk_question(rng: Random, split: str, fact: Fact) -> Question:
    """A one-hop question about a place that names it only through its people ("the Tavinfolk")."""
    subject = (
        rng.choice(templates.FOLKS.of(split)).format(s=fact.subject).replace(f"{fact.subject}folk", fact.subject + FOLK)
    )
    return Question("one_hop", _phrase(rng, split, fact.relation, subject), fact.object, fact.relation.noun)


def closed_question(rng: Random, split: str) -> Question:
    """A question about a name out of the blue, with an answer drawn at random: nothing in the world can tell it."""
    relation = rng.choice(RELATIONS)
    fact = Fact(relation, draw_words(rng, NAMES[split], 1)[0], draw_object(rng, split, relation))
    return Question("closed", _phrase(rng, split, relation, fact.subject), fact.object, relation.noun)


def draw_object(rng: Random, split: str, relation: Relation) -> str:
    """Any word that could be the object of a relation."""
    if relation.object == NUMBER:
        return draw_number(rng, split, 3)
    return draw_words(rng, VALUES[split] if relation.object == VALUE else NAMES[split], 1)[0]


def near_duplicates(
    split: str, seed: int, n: int, tokens: int, vary_answer: bool = False
) -> list[tuple[Document, Question]]:
    """`n` documents equal up to one value, the name of a place, each with a question that names the place indirectly.

    The place is mentioned once, in a fact of its own; the question says "the Tavinfolk" for Tavin, so a text search
    finds no word that tells the documents apart, while a reader does. Its answer is the same in all documents ("not
    stated" for a reader of the wrong one) unless `vary_answer`, which gives each document its own answer as well and
    thereby changes a second value.
    """
    check_split(split)
    attempt = 0
    while True:
        base = document(split, seed, attempt, tokens)
        mentions = [fact for fact in base.facts if fact.subject in base.kinds and base.kinds[fact.subject] == PLACE]
        mentions = [fact for fact in mentions if base.text.count(fact.subject) == 1]
        if vary_answer:
            mentions = [fact for fact in mentions if fact.relation.object == VALUE]
        if mentions:
            break
        attempt += 1
    fact = mentions[0]
    rng = Random(f"near/{split}/{seed}/{tokens}")
    taken = {name[:2] for name in base.kinds}
    deck = deal_words(f"near/{split}/{seed}/{tokens}", NAMES[split], 160, 0)
    places = [name for name in deck if name[:2] not in taken][:n]
    values = deal_words(f"near/{split}/{seed}/{tokens}", VALUES[split], 80, 0)
    if len(places) < n or (vary_answer and n > len(values)):
        raise ConfigError(
            f"n={n}: at most {min(len(places), len(values))} near duplicates of one document can be told apart"
        )
    pairs = []
    for place, value in zip(places, values if vary_answer else [fact.object] * n, strict=False):
        new = Fact(fact.relation, place, value)
        swap = {fact.subject: place, fact.object: value} if vary_answer else {fact.subject: place}
        doc = _renamed(base, fact, new, swap)
        pairs.append((doc, folk_question(Random(rng.random()), split, new)))
    return pairs


def _renamed(base: Document, old: Fact, new: Fact, swap: dict[str, str]) -> Document:
    def swapped(text: str) -> str:
        for before, after in swap.items():
            text = text.replace(before, after)
        return text

    return replace(
        base,
        text=swapped(base.text),
        sentences=tuple(swapped(sentence) for sentence in base.sentences),
        facts=tuple(new if fact == old else fact for fact in base.facts),
        kinds={swap.get(name, name): kind for name, kind in base.kinds.items()},
    )
