"""LongBench (arXiv 2308.14508) from files on disk: its prompts, its limits, and its metrics as the reference has them.

Metrics equal the reference (github.com/THUDM/LongBench, metrics.py and eval.py), oddities included, but for one: code
similarity uses difflib's ratio, which is what fuzzywuzzy falls back on without python-Levenshtein. Scores are in 0 … 1.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from memjax.errors import ConfigError, DataError
from memjax.evaluate.files import field, read_lines, texts
from memjax.evaluate.metrics import normalize
from memjax.evaluate.qa import Scores
from memjax.evaluate.subjects import Query, Subject

# Sets whose examples stand in the context: their prompts stay plain text, as chat templates would break the pattern.
FEW_SHOT = frozenset(("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
# Sets whose answers end with their first line.
ONE_LINE = frozenset(("trec", "triviaqa", "samsum", "lsht"))
_CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》"
    "「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_MARKS = frozenset(string.punctuation + _CHINESE_MARKS)


@dataclasses.dataclass(frozen=True)
class Example:
    """One line of a set: `input` is the question, `classes` the labels of a classification set."""

    input: str
    context: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


def read_set(path: str | Path) -> list[Example]:
    """The examples of one LongBench jsonl. DataError names file, line and field."""
    made = []
    for where, record in read_lines(path):
        asked, context = (field(record, key, "a text", where) for key in ("input", "context"))
        answers = texts(record, "answers", where)
        if not answers:
            raise DataError(f"{where}: the field 'answers' is empty; it must name at least one")
        classes = texts(record, "all_classes", where) if record.get("all_classes") is not None else []
        made.append(Example(asked, context, tuple(answers), tuple(classes)))
    if not made:
        raise DataError(f"{path}: holds no example; write one JSON object per line")
    return made


def find_sets(folder: str | Path) -> dict[str, Path]:
    """{set: file} of the LongBench sets in a folder, by file name; "_e" files are those of LongBench-E.

    DataError where there is none.
    """
    folder = Path(folder)
    names = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    found = {name: path for name, path in names.items() if _set_of(name) in TASKS}
    if not found:
        raise DataError(f"{folder}: holds no file of a LongBench set; name them as {next(iter(TASKS))}.jsonl")
    return found


def _set_of(name: str) -> str:
    return name.removesuffix("_e")


# Metrics: (prediction, answer, classes) -> score.


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of bags of words after SQuAD's normalisation; nothing in common is 0, even if both are empty."""
    return _bag_f1(normalize(prediction).split(), normalize(answer).split())


def _bag_f1(said: Sequence[str], gold: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same on Chinese words, marks and spaces left out."""
    bags = [[_without_marks(word) for word in _chinese_words(text)] for text in (prediction, answer)]
    return _bag_f1(*([word for word in bag if word] for bag in bags))


def _without_marks(word: str) -> str:
    return "".join("".join(c for c in word.lower() if c not in _MARKS).split())


def _chinese_words(text: str) -> list[str]:
    try:
        import jieba
    except ImportError:
        raise ConfigError(
            "Chinese sets need word segmentation; run: pip install jieba (or leave them out with --sets)"
        ) from None
    return list(jieba.cut(text, cut_all=False))


def rouge(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L over sentences as the package `rouge` computes it (not `rouge-score`): sentences end at full stops.

    The words of all longest common subsequences between a sentence of one and a sentence of the other are counted once,
    over the numbers of different words. Where the package gives up on a long sentence (Python's recursion limit) and the
    reference says 0, this goes on.
    """
    said, gold = _rouge_sentences(prediction), _rouge_sentences(answer)
    if not said or not gold:
        return 0.0
    shared: set[str] = set()
    for reference in gold:
        for sentence in said:
            shared |= _lcs_words(reference, sentence)
    recall = len(shared) / len({word for sentence in gold for word in sentence})
    precision = len(shared) / len({word for sentence in said for word in sentence})
    return 2.0 * (precision * recall) / (precision + recall + 1e-8)


def _rouge_sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _lcs_words(a: Sequence[str], b: Sequence[str]) -> set[str]:
    """The words of one longest common subsequence; of several, the one that the package's way back finds."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    words = set()
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            words.add(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same on Chinese words."""
    return rouge(" ".join(_chinese_words(prediction)), " ".join(_chinese_words(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """One over the number of classes named in the prediction, if the right one is among them, else 0.

    Classes that are part of the right one's name do not count; as in the reference, the one that follows such a class in
    the list is not looked at.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] in answer and named[place] != answer:
            named.remove(named[place])  # the first of its name, as in the reference
        place += 1
    return 1.0 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the number of the right paragraph."""
    return _share_of_numbers(prediction, _paragraph(r"Paragraph (\d+)", answer))


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same for Chinese answers."""
    return _share_of_numbers(prediction, _paragraph(r"段落(\d+)", answer))


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the right one."""
    return _share_of_numbers(prediction, answer)


def _paragraph(pattern: str, answer: str) -> str:
    found = re.search(pattern, answer)
    if found is None:
        raise DataError(f"the field 'answers' of a retrieval set must name a paragraph, but is {answer!r}")
    return found.group(1)


def _share_of_numbers(prediction: str, right: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return sum(number == right for number in numbers) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Ratio of difflib, in hundredths, between the answer and the first line without a comment or a fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


Metric = Callable[[str, str, Sequence[str]], float]


@dataclasses.dataclass(frozen=True)
class Task:
    """How a set is scored, and how many tokens its answers may have."""

    metric: Metric
    new_tokens: int


TASKS: dict[str, Task] = {
    "narrativeqa": Task(qa_f1, 128),
    "qasper": Task(qa_f1, 128),
    "multifieldqa_en": Task(qa_f1, 64),
    "multifieldqa_zh": Task(qa_f1_zh, 64),
    "hotpotqa": Task(qa_f1, 32),
    "2wikimqa": Task(qa_f1, 32),
    "musique": Task(qa_f1, 32),
    "dureader": Task(rouge_zh, 128),
    "gov_report": Task(rouge, 512),
    "qmsum": Task(rouge, 512),
    "multi_news": Task(rouge, 512),
    "vcsum": Task(rouge_zh, 512),
    "trec": Task(classification, 64),
    "triviaqa": Task(qa_f1, 32),
    "samsum": Task(rouge, 128),
    "lsht": Task(classification, 64),
    "passage_count": Task(count, 32),
    "passage_retrieval_en": Task(retrieval, 32),
    "passage_retrieval_zh": Task(retrieval_zh, 32),
    "lcc": Task(code_similarity, 64),
    "repobench-p": Task(code_similarity, 64),
}


def score(name: str, prediction: str, example: Example) -> float:
    """The best score over the answers of an example of a set."""
    if _set_of(name) in ONE_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = TASKS[_set_of(name)].metric
    return max(metric(prediction, answer, example.classes) for answer in example.answers)


def prompts() -> dict[str, str]:
    """{set: prompt with {context} and {input}} as published with the benchmark."""
    return json.loads(resources.files("memjax.evaluate").joinpath("longbench_prompts.json").read_text("utf-8"))


def as_query(name: str, example: Example, prompt: str) -> Query:
    """An example as a query: what stands before the context belongs to it, what follows is the question."""
    opening, _, rest = prompt.partition("{context}")
    return Query(
        rest.replace("{input}", example.input), opening + example.context, gap="", chat=_set_of(name) not in FEW_SHOT
    )


def longbench_item_scores(
    subjects: Sequence[Subject], sets: dict[str, list[Example]], *, limit: int | None = None
) -> tuple[Scores, int]:
    """({key: score of each example}, contexts cut) over the first `limit` examples of each set; keys `SET/SUBJECT` and
    `mean/SUBJECT` (one number per set)."""
    worded = prompts()
    made: Scores = {}
    truncated = 0
    for name, examples in sets.items():
        used = examples[:limit]
        queries = [as_query(name, example, worded[_set_of(name)]) for example in used]
        for subject in subjects:
            answers = subject.answers(queries, TASKS[_set_of(name)].new_tokens)
            truncated += answers.truncated
            scores = [score(name, text, example) for text, example in zip(answers.texts, used, strict=True)]
            made[f"{name}/{subject.name}"] = scores
            made.setdefault(f"mean/{subject.name}", []).append(sum(scores) / len(scores))
    return made, truncated
