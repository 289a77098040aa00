"""Questions with short answers: the invented world's test split, and SQuAD files, asked of any subjects.

The world's keys without a subject's name are the marks of a base: `one_hop`, `two_hop`, `list`, `yes_no`, `not_stated`
(exact match with the document in the prompt), `one_hop_f1`, `repeat`, `common_with_document` and `needle_450` are those of
the subject `in_context`; `closed_book_over_chance` and `common` those of `no_context`. Other subjects get `key/subject`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from memjax.errors import DataError
from memjax.evaluate import niah
from memjax.evaluate.metrics import chance, exact_match, f1
from memjax.evaluate.squad import Paragraph, squad_scores
from memjax.evaluate.subjects import Query, Subject
from memjax.evaluate.world import COMMON_FACTS, QUESTION_KINDS, Document, documents, questions
from memjax.evaluate.world import common as knowledge
from memjax.evaluate.world.prompts import repeat_prompt

SPLIT = "test"
DOCUMENT_TOKENS = 200
PER_DOCUMENT = {"one_hop": 6, "two_hop": 6, "list": 3, "yes_no": 3, "not_stated": 3}
ANSWER_TOKENS = 24  # room for a list of four names
REPEATED = 48  # documents that are repeated in full
CHANCE_DOCUMENTS = 250  # whose facts say how often the commonest answer of a relation is right
FACTS_PER_DOCUMENT = 6  # of common knowledge, asked beside one unrelated document
NEEDLE_TOKENS = (430, 471)  # of the bare haystack: about 450
NEEDLES = 400
ALL = 1500  # one-hop questions of a test world: as many documents as share no name
MARKS = (
    "one_hop",
    "two_hop",
    "repeat",
    "closed_book_over_chance",
    "common",
    "common_with_document",
    "needle_450",
    "one_hop_f1",
    "list",
    "yes_no",
    "not_stated",
)
IN_CONTEXT, NO_CONTEXT = "in_context", "no_context"
Scores = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class WorldItem:
    """A query with its answer; `kind` is the key that it counts for."""

    kind: str
    query: Query
    answer: str


def world_items(seed: int, limit: int) -> list[WorldItem]:
    """`limit` one-hop questions of the test split, and at most as many of the other kinds about the same documents."""
    items: list[WorldItem] = []
    asked = dict.fromkeys(PER_DOCUMENT, 0)
    for doc in _documents(seed, -(-limit // PER_DOCUMENT["one_hop"])):
        for kind in QUESTION_KINDS:
            for question in questions(doc, [kind], seed, min(PER_DOCUMENT[kind], limit - asked[kind])):
                items.append(WorldItem(kind, Query(question.text, doc.text), question.answer))
                asked[kind] += 1
    return items


def _documents(seed: int, count: int, tokens: int = DOCUMENT_TOKENS, start: int = 0) -> list[Document]:
    return documents(SPLIT, seed, count, tokens, start)


def repeat_items(seed: int, count: int) -> list[WorldItem]:
    """Asks for whole documents back."""
    rng = Random(f"qa/repeat/{seed}")
    prompts = [(doc, repeat_prompt(rng, doc)) for doc in _documents(seed, count)]
    return [WorldItem("repeat", Query(prompt.text, doc.text), prompt.answer) for doc, prompt in prompts]


def common_items(seed: int, limit: int, *, document: bool) -> list[WorldItem]:
    """Common knowledge, each fact once and in one of its forms, by itself or beside a document that does not help."""
    rng = Random(f"qa/common/{seed}")
    facts = rng.sample(COMMON_FACTS, min(limit, len(COMMON_FACTS)))
    docs = _documents(seed, -(-len(facts) // FACTS_PER_DOCUMENT)) if document else []
    made = []
    for index, fact in enumerate(facts):
        text = knowledge.ask(fact, rng.randrange(knowledge.forms(fact)))
        context = docs[index // FACTS_PER_DOCUMENT].text if document else None
        made.append(WorldItem("common_with_document" if document else "common", Query(text, context), fact.answer))
    return made


def needle_items(seed: int, count: int, count_tokens: Callable[[str], int]) -> list[tuple[int, WorldItem]]:
    """(depth decile, item) of needles among about 450 tokens of filler, with numbers of the test split."""
    lines = niah.line_counts(count_tokens, *NEEDLE_TOKENS)
    # Seeds of their own: the generator's default seed is that of the needle experiment.
    drawn = [niah.needle(lines, index, seed=niah.SEED + seed, split=SPLIT) for index in range(count)]
    return [(n.decile, WorldItem("needle_450", Query(n.question, n.context), n.answer)) for n in drawn]


def world_item_scores(
    subjects: Sequence[Subject],
    encode: Callable[[str], list[int]],
    seed: int,
    limit: int = 240,
    *,
    repeated: int = REPEATED,
    needles: int = NEEDLES,
) -> tuple[Scores, int]:
    """({key: score of each item} of one seed, contexts cut) of subjects on the invented world's test split.

    encode: the base's tokenizer, for lengths and for the accuracy of repetition. See the head of this file for the keys.
    """
    made: Scores = {}
    truncated = 0
    items = world_items(seed, limit)
    repeats = repeat_items(seed, min(repeated, limit))
    with_document = common_items(seed, limit, document=True)
    alone = common_items(seed, limit, document=False)
    buried = needle_items(seed, max(min(needles, limit * 2), niah.DECILES), lambda text: len(encode(text)))
    longest = max((len(encode(f" {item.answer}")) for item in repeats), default=0)
    for subject in subjects:
        suffix = "" if subject.name in (IN_CONTEXT, NO_CONTEXT) else f"/{subject.name}"
        if subject.name == NO_CONTEXT:
            one_hop = [item for item in items if item.kind == "one_hop"]
            seen: Scores = {}
            truncated += _score(subject, [*one_hop, *alone], ANSWER_TOKENS, seen)
            least = chance(_answers_by_relation(seed))
            made["closed_book_over_chance"] = [right - least for right in seen["one_hop"]]
            made["common"] = seen["common"]
            continue
        seen = {}
        truncated += _score(subject, [*items, *with_document], ANSWER_TOKENS, seen)
        truncated += _score(subject, [item for _, item in buried], ANSWER_TOKENS, seen)
        seen["needle_450"] = _worst(seen["needle_450"], [decile for decile, _ in buried])
        answers = subject.answers([item.query for item in repeats], longest + 1)
        truncated += answers.truncated
        seen["repeat"] = [
            token_accuracy(encode(f" {text}"), encode(f" {item.answer}"))
            for text, item in zip(answers.texts, repeats, strict=True)
        ]
        made |= {f"{key}{suffix}": scores for key, scores in seen.items()}
    return made, truncated


def _score(subject: Subject, items: Sequence[WorldItem], max_tokens: int, into: Scores) -> int:
    """Adds exact matches to `into[kind]` (and F1 of one-hop questions); gives the number of contexts cut."""
    answers = subject.answers([item.query for item in items], max_tokens)
    for text, item in zip(answers.texts, items, strict=True):
        said = first_line(text)
        into.setdefault(item.kind, []).append(exact_match(said, [item.answer]))
        if item.kind == "one_hop":
            into.setdefault("one_hop_f1", []).append(f1(said, [item.answer]))
    return answers.truncated


def first_line(text: str) -> str:
    """What counts as a short answer: a base that goes on in a new line is done with it."""
    return text.strip().split("\n", 1)[0].strip()


def token_accuracy(said: Sequence[int], gold: Sequence[int]) -> float:
    """Share of the gold tokens that stand at their own place in a free-running answer; what is too much or missing counts
    as wrong, so one token left out spoils all that follow it."""
    right = sum(a == b for a, b in zip(said, gold, strict=False))
    return right / max(len(said), len(gold), 1)


def _answers_by_relation(seed: int) -> dict[str, list[str]]:
    """What facts of a whole test world answer: in a few questions the commonest answer would be common by accident."""
    groups: dict[str, list[str]] = {}
    for doc in _documents(seed, CHANCE_DOCUMENTS):
        for fact in doc.facts:
            groups.setdefault(fact.relation.noun, []).append(fact.object)
    return groups


def _worst(scores: Sequence[float], deciles: Sequence[int]) -> list[float]:
    """The scores of the depth decile with the lowest mean."""
    groups = [[s for s, d in zip(scores, deciles, strict=True) if d == decile] for decile in sorted(set(deciles))]
    return min(groups, key=lambda group: float(np.mean(group)))


def squad_item_scores(
    subjects: Sequence[Subject],
    articles: Sequence[Sequence[Paragraph]],
    seed: int = 0,
    limit: int | None = None,
    max_tokens: int = 32,
) -> tuple[Scores, int]:
    """({key/subject: score of each question}, contexts cut) for SQuAD paragraphs; `limit` questions drawn by the seed.

    Keys: `exact_match`, `f1`; for v2 files also `exact_match_answerable` and `exact_match_unanswerable`, as the official
    evaluation has them. DataError where there are no questions.
    """
    asked = [(paragraph, question) for article in articles for paragraph in article for question in paragraph.questions]
    if not asked:
        raise DataError("the SQuAD file holds no question")
    v2 = any(question.impossible for _, question in asked)
    if limit is not None and limit < len(asked):
        # In the file's order, so that questions about one paragraph stay together.
        asked = [asked[i] for i in sorted(Random(f"squad/{seed}").sample(range(len(asked)), limit))]
    queries = [Query(question.text, paragraph.context) for paragraph, question in asked]
    made: Scores = {}
    truncated = 0
    for subject in subjects:
        answers = subject.answers(queries, max_tokens)
        truncated += answers.truncated
        for text, (_, question) in zip(answers.texts, asked, strict=True):
            exact, overlap = squad_scores(first_line(text), question, v2=v2)
            made.setdefault(f"exact_match/{subject.name}", []).append(exact)
            made.setdefault(f"f1/{subject.name}", []).append(overlap)
            if v2:
                kind = "unanswerable" if question.impossible else "answerable"
                made.setdefault(f"exact_match_{kind}/{subject.name}", []).append(exact)
    return made, truncated
