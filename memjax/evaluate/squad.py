"""SQuAD files, v1.1 and v2 (arXiv 1606.05250, 1806.03822): articles of paragraphs, each with its questions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from memjax.evaluate.files import field, read_json
from memjax.evaluate.metrics import exact_match, f1, normalize

# Ways in which a base says that a text does not answer, after `normalize`. SQuAD v2 expects the empty string for it.
NO_ANSWER = frozenset(
    ("", "no answer", "not stated", "not mentioned", "not specified", "unanswerable", "unknown", "none", "na")
)


@dataclasses.dataclass(frozen=True)
class SquadQuestion:
    """A question with its acceptable answers; none where it is `impossible` (v2)."""

    id: str
    text: str
    answers: tuple[str, ...]
    impossible: bool


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A context and the questions about it."""

    context: str
    questions: tuple[SquadQuestion, ...]


def read_articles(path: str | Path) -> list[tuple[Paragraph, ...]]:
    """The paragraphs of each article of a SQuAD json. DataError names the file, the record and the field."""
    articles = []
    for a, article in enumerate(field(read_json(path), "data", "a list", str(path))):
        where = f"{path}, data[{a}]"
        paragraphs = []
        for p, paragraph in enumerate(field(article, "paragraphs", "a list", where)):
            place = f"{where}.paragraphs[{p}]"
            context = field(paragraph, "context", "a text", place)
            asked = [
                _question(record, f"{place}.qas[{q}]") for q, record in enumerate(field(paragraph, "qas", "a list", place))
            ]
            paragraphs.append(Paragraph(context, tuple(asked)))
        articles.append(tuple(paragraphs))
    return articles


def _question(record: object, where: str) -> SquadQuestion:
    text = field(record, "question", "a text", where)
    assert isinstance(record, dict)  # `field` has seen to it
    impossible = field(record, "is_impossible", "true or false", where) if "is_impossible" in record else False
    answers: list[str] = []
    if not impossible:
        for index, answer in enumerate(field(record, "answers", "a list", where)):
            answers.append(field(answer, "text", "a text", f"{where}.answers[{index}]"))
    return SquadQuestion(str(record.get("id", where)), text, tuple(answers), impossible)


def squad_scores(prediction: str, question: SquadQuestion, *, v2: bool) -> tuple[float, float]:
    """(exact match, F1) of an answer. In v2 a base's way of saying that there is no answer counts as the empty string."""
    if v2 and normalize(prediction) in NO_ANSWER:
        prediction = ""
    return exact_match(prediction, question.answers), f1(prediction, question.answers)
