"""Scores of answers: SQuAD exact match and F1, ROUGE-L, RULER string match, `contains`; intervals over seeds or items.

All work on plain strings and return floats in 0 … 1. Reference implementations are matched exactly, oddities included.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from memjax.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (SQuAD evaluate-v1.1.py and -v2.0.py).

    In that order: "a.n" becomes "an" and is dropped as an article; unicode punctuation such as “ ” – is kept.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals any answer after `normalize` (SQuAD). No answers: see `_references`."""
    return max(float(normalize(prediction) == normalize(answer)) for answer in _references(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 over answers between bags of words after `normalize` (SQuAD v2: if one side is empty, 1 if both are)."""
    return max(_f1(prediction, answer) for answer in _references(answers))


def _references(answers: Sequence[str]) -> Sequence[str]:
    """SQuAD v2: answers that normalise to nothing are dropped; if none is left, the empty string is the answer."""
    if isinstance(answers, str):
        raise DataError("answers is one string; pass a list of the acceptable answers")
    return [answer for answer in answers if normalize(answer)] or [""]


def _f1(prediction: str, answer: str) -> float:
    said, gold = normalize(prediction).split(), normalize(answer).split()
    if not said or not gold:
        return float(said == gold)
    common = sum((Counter(said) & Counter(gold)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 if an answer stands, as whole words, in the first line of the prediction; case and punctuation do not count.

    For models that answer in sentences. Articles are kept, since they are words of the answer.
    """
    line = prediction.strip().split("\n", 1)[0]
    said = f" {_words(line)} "
    wanted = [_words(answer) for answer in answers]
    return float(any(words and f" {words} " in said for words in wanted))


def _words(text: str) -> str:
    """Lower case, every mark a space (so that "Tavin's" holds the word "tavin"), single spaces."""
    return " ".join(re.sub(r"[^\w\s]|_", " ", text.lower()).split())


class Rouge(NamedTuple):
    """Precision, recall and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def rouge_l(prediction: str, answers: Sequence[str], stem: Callable[[str], str] | None = None) -> Rouge:
    """ROUGE-L of the answer that gives the best F1, equal to `rouge_score.RougeScorer(["rougeL"]).score_multi`.

    Words are maximal runs of a-z and 0-9 after lower-casing. `stem` is applied to words of more than three letters, as
    with `use_stemmer=True` (pass nltk's PorterStemmer().stem; it changes no number and no name of the world).
    """
    said = _rouge_words(prediction, stem)
    return max((_rouge_l(said, _rouge_words(answer, stem)) for answer in answers), key=lambda score: score.f1)


def _rouge_words(text: str, stem: Callable[[str], str] | None) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [stem(word) if len(word) > 3 else word for word in words] if stem else words


def _rouge_l(said: list[str], gold: list[str]) -> Rouge:
    if not said or not gold:
        return Rouge(0.0, 0.0, 0.0)
    common = _longest_common_subsequence(said, gold)
    if common == 0:
        return Rouge(0.0, 0.0, 0.0)
    precision, recall = common / len(said), common / len(gold)
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall))


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the prediction, case aside (RULER, all tasks but qa)."""
    said = _ruler_text(prediction)
    return sum(reference.lower() in said for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any of the references occurs in the prediction, case aside (RULER, qa tasks)."""
    said = _ruler_text(prediction)
    return float(any(reference.lower() in said for reference in references))


def _ruler_text(prediction: str) -> str:
    """Control characters become line breaks, ends are stripped (RULER, postprocess_pred)."""
    return _CONTROL.sub("\n", prediction.strip()).strip().lower()


class Mean(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


# Two-sided 97.5 % points of Student's t for 1 … 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def over_seeds(values: Sequence[float]) -> Mean:
    """Mean over seeds with Student's t interval; a single seed has no width to speak of, so its interval is itself."""
    numbers = _numbers(values)
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Mean(mean, mean, mean)
    t = _T[len(numbers) - 2] if len(numbers) - 2 < len(_T) else 1.96
    half = t * float(numbers.std(ddof=1)) / len(numbers) ** 0.5
    return Mean(mean, mean - half, mean + half)


def over_items(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> Mean:
    """Mean over items with the percentile bootstrap interval; deterministic for a seed."""
    numbers = _numbers(values)
    rng = np.random.default_rng(seed)
    means = [float(numbers[rng.integers(0, len(numbers), len(numbers))].mean()) for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Mean(float(numbers.mean()), float(low), float(high))


def _numbers(values: Sequence[float]) -> np.ndarray:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise DataError(f"a mean needs a list of at least one finite number, got {list(values)[:8]}")
    return numbers


def chance(answers: Mapping[str, Sequence[str]]) -> float:
    """Accuracy of always giving the most frequent answer of each group ({relation: answers}), over all questions."""
    counts = [Counter(normalize(answer) for answer in group) for group in answers.values()]
    total = sum(sum(count.values()) for count in counts)
    if not total:
        raise DataError("chance needs at least one question")
    return sum(max(count.values(), default=0) for count in counts) / total
