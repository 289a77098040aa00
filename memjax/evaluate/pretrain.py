"""Pretraining examples of the tiny base: documents with many questions, and tasks that teach copying.

An example is a pure function of (seed, index, window): token ids and a loss weight per token. Nothing of the validation
or test world occurs in it. Answers weigh most; documents and questions weigh little, being mostly unpredictable names.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random

import numpy as np

from memjax.errors import ConfigError
from memjax.evaluate import pretrain_long
from memjax.evaluate.pretrain_rows import COPY_WEIGHT, Encoder, Row
from memjax.evaluate.world import lines, templates
from memjax.evaluate.world.documents import Document, Fact, random_document
from memjax.evaluate.world.names import ENDS, NAMES, draw_number, draw_words, split_of
from memjax.evaluate.world.prompts import (
    Prompt,
    brief,
    common_prompt,
    passage_prompts,
    word_prompt,
)
from memjax.evaluate.world.questions import Question, ask, closed_question, draw_object, folk_question
from memjax.evaluate.world.relations import KINDS, PLACE, RELATIONS, Relation
from memjax.evaluate.world.tokenizer import SPECIALS
from memjax.evaluate.world.vary import invented

SPLIT = "train"
MIN_WINDOW = 128
LONG_WINDOW = 512

# Task -> share of examples.
MIX = {
    "questions": 0.56,
    "repeat": 0.08,
    "copy": 0.05,
    "passage": 0.05,
    "needle": 0.07,
    "keyed": 0.05,
    "chain": 0.03,
    "common": 0.05,
    "echo": 0.03,
    "closed": 0.01,
    "invent": 0.02,
}
# Copying comes first, since everything else is built on it: random tokens alone, then with more long copies than later.
# Binding, the other thing that everything is built on, is finding what stands by a subject *and* a relation; then twice
# in a row.
MIXES: dict[str, Mapping[str, float]] = {
    "copy": {"copy": 1.0},
    "early": {**MIX, "repeat": 0.15, "copy": 0.10, "needle": 0.05, "keyed": 0.06, "passage": 0.06},
    "full": MIX,
    "bind": {"bind": 1.0},
    "hops": {"bind": 0.4, "hops": 0.6},
    "recite": {"recite": 0.5, "repeat": 0.5},
    "keys": {"keys": 1.0},
    "long": {
        "needles": 0.60,
        "tracks": 0.14,
        "counts": 0.04,
        "codes": 0.03,
        "questions": 0.12,
        "repeat": 0.03,
        "keyed": 0.04,
    },
    "bound": {**MIX, "repeat": 0.12, "recite": 0.05, "invent": 0.03, "bind": 0.12, "hops": 0.15},
}
# Kind of question -> weight among the turns of a document.
TURNS = {"one_hop": 0.35, "two_hop": 0.40, "list": 0.06, "yes_no": 0.07, "not_stated": 0.07, "common": 0.05}
ENDLESS = frozenset(("not_stated", "common"))  # not bounded by what a document says

_ENDS = frozenset(ENDS)


def example(
    encoder: Encoder, seed: int, index: int, window: int = 512, mix: Mapping[str, float] = MIX, vary: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Example `index`: ids int32 [n], loss weights float32 [n], n ≤ window; weight i is that of predicting token i.

    mix: task -> share, such as one of `MIXES`; vary: forms of documents and questions are changed a little.
    Raises ConfigError for a window too small for some task of the mix: below 128, or 512 for those of `pretrain_long`.
    """
    least = LONG_WINDOW if mix.keys() & _LONG.keys() else MIN_WINDOW
    if window < least:
        raise ConfigError(f"window={window}: pretraining examples of this mix need at least {least} tokens")
    rng = Random(f"pretrain/{seed}/{index}")
    task = rng.choices(list(mix), list(mix.values()))[0]
    row = Row(encoder, window, vary)
    _TASKS[task](rng, row)
    return np.array(row.ids, np.int32), np.array(row.weights, np.float32)


def _document(rng: Random, row: Row, reserve: int) -> Document:
    """A document that leaves `reserve` tokens of the row; mostly short enough for many questions."""
    longest = row.limit - reserve
    middle = max(41, longest * 11 // 20)
    tokens = rng.randint(40, middle) if rng.random() < 0.7 else rng.randint(middle, max(middle, longest))
    return random_document(rng, SPLIT, tokens, row.vary)


def _questions(rng: Random, row: Row) -> None:
    if rng.random() < 0.05:
        row.system(rng.choice(templates.BRIEF.train))
    doc = _document(rng, row, 50)
    row.document(doc.text)
    kinds = list(TURNS)
    streams = {kind: ask(doc, rng, kind) for kind in kinds if kind != "common"}
    weights = dict(TURNS)
    # A document about which everything has been asked makes way for the next: else a short one would teach mostly to
    # say "not stated".
    while row.room() > 8 and weights.keys() - ENDLESS:
        kind = rng.choices(list(weights), list(weights.values()))[0]
        if kind == "common":
            question: Question | Prompt = common_prompt(rng)
        else:
            found = next(streams[kind], None)
            if found is None:
                del weights[kind]
                continue
            question = found
        if not row.turn(_briefed(rng, question), question.answer) and row.room() < 24:
            break
        if rng.random() < 0.06:
            _ask_folk(rng, row, doc)


def _ask_folk(rng: Random, row: Row, doc: Document) -> None:
    """A question about a place through its people: as often one that the document does not name, which is "not stated"."""
    places = [fact for fact in doc.facts if doc.kinds.get(fact.subject) == PLACE]
    if not places:
        return
    fact = rng.choice(places)
    stranger = draw_words(rng, NAMES[SPLIT], 1)[0]
    if rng.random() < 0.5 and stranger not in doc.kinds:
        fact = Fact(fact.relation, stranger, templates.NOT_STATED)
    asked = folk_question(rng, SPLIT, fact)
    row.turn(asked.text, asked.answer)


def _briefed(rng: Random, question: Question | Prompt) -> str:
    """The question, now and then with a request for brevity."""
    if question.kind in ("list", "not_stated") or rng.random() > 0.12:
        return question.text
    return brief(rng, SPLIT, question.text, question.answer)


def _repeat(rng: Random, row: Row) -> None:
    strange = rng.random() < 0.5
    longest = (row.limit - 40) // (3 if strange else 2)
    doc = random_document(rng, SPLIT, rng.randint(40, max(41, longest)), row.vary)
    text = _estranged(rng, doc) if strange else doc.text
    row.document(text)
    row.turn(rng.choice(templates.REPEAT.train), text, COPY_WEIGHT)


def _estranged(rng: Random, doc: Document) -> str:
    """The document told so that neither what usually follows nor the few words before tell how it goes on: some of it in
    forms made up on the spot, the same words around many of its sentences, any mark between them."""
    frame, share = invented(rng, ("{c}",), 6), rng.random()
    told = []
    for sentence, fact in zip(doc.sentences, doc.facts, strict=False):
        clause = sentence[:-1]
        if rng.random() < 0.5:
            clause = invented(rng, ("{s}", "{n}", "{o}")).format(s=fact.subject, n=fact.relation.noun, o=fact.object)
        told.append((frame.format(c=clause) if rng.random() < share else clause) + rng.choice((".", ".", ";", ", and")))
    return " ".join(told)


def _copy(rng: Random, row: Row) -> None:
    """Random tokens, then the same again: nothing to know, all to copy."""
    _copied(rng, row, range(len(SPECIALS) + 256, len(row.encoder.pieces)))


def _recite(rng: Random, row: Row) -> None:
    """As `_copy` with few different tokens: the one before no longer tells where one is, only a long stretch does."""
    every = range(len(SPECIALS) + 256, len(row.encoder.pieces))
    _copied(rng, row, rng.sample(every, round(2 ** rng.uniform(2, 6))))


def _copied(rng: Random, row: Row, alphabet: Sequence[int]) -> None:
    count = rng.randint(8, (row.limit - 30) // 2)
    pieces = row.encoder.pieces
    ids: list[int] = []
    while len(ids) < count:
        new = rng.choice(alphabet)
        # Two syllables that happen to spell a name of the validation or test world are drawn again.
        if not ids or pieces[new] not in _ENDS or split_of(pieces[ids[-1]] + pieces[new]) == SPLIT:
            ids.append(new)
    row.document_ids(ids, 0.0)
    row.turn(rng.choice(templates.REPEAT.train), ids, COPY_WEIGHT)


def _passage(rng: Random, row: Row) -> None:
    """Continue from a cue; first and last sentence."""
    doc = _document(rng, row, 80)
    row.document(doc.text)
    for prompt in passage_prompts(doc, rng):
        row.turn(prompt.text, prompt.answer)


def _haystack(rng: Random, row: Row, tokens: int) -> list[str]:
    """Lines of filler of about `tokens` tokens: the grass filler (whole or by sentence) or sentences of a document."""
    kind = rng.random()
    if kind < 0.6:
        return [lines.GRASS] * max(1, tokens // 25)
    if kind < 0.75:
        filler = lines.GRASS.replace(". ", ".\n").split("\n")
        return [rng.choice(filler) for _ in range(max(2, tokens // 6))]
    return list(random_document(rng, SPLIT, max(40, tokens * 9 // 10), row.vary).sentences)


def _bind(rng: Random, row: Row) -> None:
    """Facts in forms made up on the spot: only subject and relation, both, tell where an answer stands."""
    # Half of the documents are few facts in one plain form: what is learnt on those first, the others are learnt by.
    plain = rng.random() < 0.5
    subjects = draw_words(rng, NAMES[SPLIT], rng.randint(2, 4 if plain else 10))
    relations = rng.sample(RELATIONS, rng.randint(1, 3 if plain else 6))
    # An object is never a subject as well: without an order to go by, nobody could tell which is which.
    facts = _made_up(rng, row, subjects, relations, ordered=False, plain=plain)
    # Each once: the answer to a question that was asked before could be copied from there.
    for fact in rng.sample(facts, len(facts)):
        asked = invented(rng, ("{s}", "{n}"), 0 if plain else 2).format(s=fact.subject, n=fact.relation.noun) + "?"
        if not row.turn(asked, fact.object):
            return


def _hops(rng: Random, row: Row) -> None:
    """As `_bind`, with objects that are subjects too; asks for the relation of a relation of a subject."""
    subjects = draw_words(rng, NAMES[SPLIT], rng.randint(2, 8))
    relations = rng.sample(RELATIONS, rng.randint(2, 6))
    facts = _made_up(rng, row, subjects, relations, ordered=True, plain=rng.random() < 0.5)
    chains = [(a, b) for a in facts for b in facts if a.object == b.subject and b.object != a.subject]
    single, double = iter(rng.sample(facts, len(facts))), iter(rng.sample(chains, len(chains)))
    for _ in facts:
        chain = next(double, None) if rng.random() < 0.7 else None
        fact = chain[1] if chain else next(single)
        # The nearer a noun stands to the subject, the earlier its relation is followed.
        slots = ("{s}", "{n}", "{m}") if chain else ("{s}", "{m}")
        slots = slots if rng.random() < 0.5 else slots[::-1]
        form = invented(rng, slots, 2, ordered=slots)
        subject, noun = (chain[0].subject, chain[0].relation.noun) if chain else (fact.subject, "")
        if not row.turn(form.format(s=subject, n=noun, m=fact.relation.noun) + "?", fact.object):
            return


def _made_up(
    rng: Random, row: Row, subjects: list[str], relations: list[Relation], ordered: bool, plain: bool
) -> list[Fact]:
    """Puts a document of facts in invented forms into the row, and returns them.

    ordered: the subject stands before the object, which mostly is another of the subjects where it is a name; plain: all
    in one form, without words that mean nothing.
    """
    slots, order = ("{s}", "{n}", "{o}"), ("{s}", "{o}") if ordered else ()
    shared = invented(rng, slots, 0, order) if plain else None
    pairs = [(subject, relation) for subject in subjects for relation in relations]
    names = iter(draw_words(rng, NAMES[SPLIT], len(pairs) + len(subjects)))
    facts: list[Fact] = []
    told, count = [], 0
    for subject, relation in rng.sample(pairs, len(pairs)):
        if relation.object not in KINDS:
            obj = draw_object(rng, SPLIT, relation)
        elif ordered and rng.random() < 0.8:
            obj = rng.choice([name for name in subjects if name != subject])
        else:
            obj = next(name for name in names if name not in subjects)
        form = shared or invented(rng, slots, ordered=order)
        text = form.format(s=subject, n=relation.noun, o=obj) + "."
        count += len(row.encoder.encode(" " + text))
        if count > row.limit * 0.45:
            break
        facts.append(Fact(relation, subject, obj))
        told.append(text)
    row.document_ids(row.encoder.encode(" " + " ".join(told)), 0.0)
    return facts


def _needle(rng: Random, row: Row) -> None:
    haystack = _haystack(rng, row, rng.randint(20, row.limit - 60))
    value = draw_number(rng, SPLIT, 4, zeros=True)
    haystack.insert(rng.randint(0, len(haystack)), lines.NEEDLE.format(v=value))
    row.document("\n".join(haystack))
    row.turn(lines.NEEDLE_QUESTION, value)


def _keyed(rng: Random, row: Row) -> None:
    keys = rng.randint(1, min(4, row.limit // 64))
    haystack = _haystack(rng, row, rng.randint(8, max(8, row.limit - 72 - 20 * keys)))
    text, numbers = lines.keyed_needles(SPLIT, rng, haystack, keys)
    row.document(f"{lines.KEYED_OPENING}\n{text}" if rng.random() < 0.3 else text)
    for word in rng.sample(list(numbers), keys):
        row.turn(rng.choice(lines.KEYED_QUESTIONS).format(k=word), numbers[word])


def _chain(rng: Random, row: Row) -> None:
    # A line takes 14 tokens at most, a variable of the answer 6, the question 24.
    costs = {(c, h): c * (h + 1) * 14 + (h + 1) * 6 + 32 for c, h in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4))}
    chains, hops = rng.choice([shape for shape, cost in costs.items() if cost + 8 <= row.limit])
    room = row.limit - costs[chains, hops]
    haystack = [lines.GRASS.split(". ")[0] + "."]
    if room > 60:
        haystack = _haystack(rng, row, rng.randint(6, room - 10))
    text, variables = lines.variable_chains(SPLIT, rng, haystack, chains, hops)
    row.document(text)
    value = rng.choice(list(variables))
    row.turn(rng.choice(lines.CHAIN_QUESTIONS).format(v=value), ", ".join(variables[value]))


def _common_task(rng: Random, row: Row) -> None:
    """A run of common knowledge, with or without a document that has nothing to do with it."""
    if rng.random() < 0.4:
        row.document(_document(rng, row, 60).text)
    for _ in range(rng.randint(1, 12)):
        question = common_prompt(rng)
        row.turn(_briefed(rng, question), question.answer)


def _echo(rng: Random, row: Row) -> None:
    """Instructions about words that they bring along."""
    for _ in range(rng.randint(1, 6)):
        prompt = word_prompt(rng, SPLIT)
        row.turn(prompt.text, prompt.answer)


def _closed(rng: Random, row: Row) -> None:
    """Questions without a document. The answers are random: the base learns to be unsure, not to refuse."""
    for _ in range(rng.randint(1, 8)):
        question = closed_question(rng, SPLIT)
        row.turn(question.text, question.answer)


def _invent(rng: Random, row: Row) -> None:
    """Asks for questions about the document, which the writers of memories use."""
    doc = _document(rng, row, 60)
    row.document(doc.text)
    streams = [ask(doc, rng, kind) for kind in ("one_hop", "one_hop", "two_hop", "list", "yes_no")]
    while streams:
        stream = rng.choice(streams)
        question = next(stream, None)
        if question is None:
            streams.remove(stream)
        elif not row.turn(rng.choice(templates.INVENT.train), question.text):
            break


_LONG: dict[str, Callable[[Random, Row], None]] = {
    "needles": pretrain_long.needles,
    "keys": pretrain_long.keys,
    "tracks": pretrain_long.tracks,
    "counts": pretrain_long.counts,
    "codes": pretrain_long.codes,
}
_TASKS: dict[str, Callable[[Random, Row], None]] = {
    "questions": _questions,
    "repeat": _repeat,
    "copy": _copy,
    "passage": _passage,
    "recite": _recite,
    "bind": _bind,
    "hops": _hops,
    "needle": _needle,
    "keyed": _keyed,
    "chain": _chain,
    "common": _common_task,
    "echo": _echo,
    "closed": _closed,
    "invent": _invent,
    **_LONG,
}
