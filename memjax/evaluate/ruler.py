"""The 13 tasks of RULER (arXiv 2404.06654) at any length: generators and scores, no model.

Wording, haystacks and sizes follow the reference implementation (github.com/NVIDIA/RULER, scripts/data/synthetic),
misspelling included. What differs, and why: sentences are split at end marks instead of by nltk; keys and list words
come from `ruler_words.py` and from the essay instead of the wonderwords package; essays are any prose the caller gives.
So scores compare between models here, but only loosely with published tables.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from uuid import UUID

from memjax.errors import ConfigError, DataError
from memjax.evaluate.files import field, read_json
from memjax.evaluate.metrics import string_match_all, string_match_part
from memjax.evaluate.niah import sentences
from memjax.evaluate.ruler_words import ADJECTIVES, NOUNS
from memjax.evaluate.squad import read_articles
from memjax.evaluate.world.lines import GRASS

SEED = 42
SHORT = 4096  # below this length cwe and its example use fewer repeats, as in the reference

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_NIAH_OPENING = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
_NIAH_QUESTION = "What are all the special magic {kind} for {query} mentioned in the provided text?"
_NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
_VT_OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_VT_QUESTION = "Question: Find all variables that are assigned the value {query} in the text above."
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assgined the value {query}, they are: "
)
_CWE_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_FWE_OPENING = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_QA_RULE = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_QA_OPENING = f"{_QA_RULE}\n\nThe following are given documents.\n\n"
_QA_PREFIX = " Answer:"


@dataclass(frozen=True)
class Sample:
    """One prompt in three parts: `context + gap + question + prefix` is all of it; only the context is compressed.

    `prefix` starts the model's answer (it goes behind the chat template's header). `answers` are the strings looked
    for.
    """

    task: str
    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]
    new_tokens: int
    gap: str = "\n"

    @property
    def prompt(self) -> str:
        """All of it as plain text."""
        return self.context + self.gap + self.question + self.prefix


@dataclass(frozen=True)
class Needles:
    """A needle task: what the haystack is made of; how many keys, values per key and keys asked for; their kinds."""

    haystack: str
    keys: int = 1
    values: int = 1
    asked: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"


NIAH_TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value_kind="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, asked=4),
}
# Task -> tokens to generate.
TASKS = {**dict.fromkeys(NIAH_TASKS, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
_DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@dataclass(frozen=True)
class Sources:
    """What tasks are made from: prose for haystacks (and words for cwe); questions by `read_squad`, `read_hotpot`."""

    essay: str = ""
    squad: QuestionSet | None = None
    hotpot: QuestionSet | None = None


@dataclass(frozen=True)
class QuestionSet:
    """Paragraphs, and questions as (question, answers, gold paragraphs, other paragraphs of the same article)."""

    paragraphs: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...]], ...]


def score(task: str, prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers found in the prediction; for the qa tasks 1 if any is found."""
    return (string_match_part if task.startswith("qa") else string_match_all)(prediction, answers)


def samples(
    task: str, length: int, n: int, count_tokens: Callable[[str], int], sources: Sources, *, seed: int = SEED
) -> list[Sample]:
    """`n` samples whose prompt, answers and tokens to generate together take at most `length` tokens.

    The size of the haystack is searched once, then lowered for a sample that comes out too long.
    Raises ConfigError for an unknown task or a length too small for it, DataError if a source is missing.
    """
    if task not in TASKS:
        raise ConfigError(f"RULER task {task!r} is unknown; use {', '.join(TASKS)}")
    make, step = _maker(task, length, count_tokens, sources)

    def fits(size: int, index: int) -> Sample | None:
        """The sample of that size if it fits; generators say IndexError where a source is exhausted."""
        sample = make(Random(f"ruler/{task}/{seed}/{index}"), size, index)
        spent = count_tokens(sample.prompt + " " + " ".join(sample.answers)) + sample.new_tokens
        return sample if spent <= length else None

    size = _largest(lambda size: fits(size, 0) is not None, step)
    out = []
    for index in range(n):
        used = size
        while (sample := fits(used, index) if used > 0 else None) is None:
            used -= step
            if used <= 0:
                raise ConfigError(f"{task} does not fit into {length} tokens; raise the length")
        out.append(sample)
    return out


def _largest(fits: Callable[[int], bool], step: int) -> int:
    """The largest multiple of `step` that fits (or `step`), by doubling and bisection."""
    low, high = 1, 2
    while fits(high * step) and high < 1 << 20:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


_Maker = Callable[[Random, int, int], Sample]


def _maker(task: str, length: int, count_tokens: Callable[[str], int], sources: Sources) -> tuple[_Maker, int]:
    """(function of (rng, size, index), step of the size) for a task."""
    if task in NIAH_TASKS:
        spec = NIAH_TASKS[task]
        words = _essay_words(sources) if spec.haystack == "essay" else []
        step = 1 if spec.haystack != "essay" else max(1, min(500, length // 16))
        return (lambda rng, size, index: _niah(rng, task, spec, size, words)), step
    if task == "vt":
        shot = _variable_shot(count_tokens) if length >= 1024 else ""
        return (lambda rng, size, index: variables(rng, size, shot)), 1
    if task == "cwe":
        vocabulary = _list_words(sources)
        return (lambda rng, size, index: common_words(rng, size, length, vocabulary)), 1
    if task == "fwe":
        return (lambda rng, size, index: frequent_words(rng, size, length)), 10
    questions = sources.squad if task == "qa_1" else sources.hotpot
    if questions is None:
        name = "SQuAD" if task == "qa_1" else "HotpotQA"
        raise DataError(f"{task} needs {name} questions; give the path of its json")
    return (lambda rng, size, index: _documents_question(rng, task, size, index, questions)), 1


def _essay_words(sources: Sources) -> list[str]:
    words = sources.essay.split()
    if not words:
        raise DataError("this RULER task hides needles in an essay; give the path of a text file of prose")
    return words


# Needles


def _niah(rng: Random, task: str, spec: Needles, size: int, words: list[str]) -> Sample:
    word = partial(random_word, rng)
    keys = distinct(word, spec.key_kind, spec.keys, ())
    values = [[word(spec.value_kind) for _ in range(spec.values)] for _ in keys]
    body = hidden_needles(rng, spec, dict(zip(keys, values, strict=True)), size, words, word)
    asked = rng.sample(range(spec.keys), spec.asked)
    answers = tuple(value for i in asked for value in values[i])
    opening, question, prefix = needle_prompt(spec.value_kind, [keys[i] for i in asked], len(answers) == 1)
    return Sample(task, opening + body, question, prefix, answers, TASKS[task])


def hidden_needles(
    rng: Random,
    spec: Needles,
    values: Mapping[str, Sequence[str]],
    size: int,
    essay: list[str],
    word: Callable[[str], str],
) -> str:
    """A haystack of `size` words of the essay, or of lines, with one needle for each value of each key at random places.

    word: draws keys and values of a kind, for lines that are needles themselves.
    """
    kind = spec.value_kind
    needles = [_NEEDLE.format(kind=kind, key=key, value=value) for key, group in values.items() for value in group]
    rng.shuffle(needles)
    if spec.haystack == "essay":
        # A text shorter than asked for is read again from its start.
        text = sentences(" ".join((essay * (size // len(essay) + 1))[:size]))
        places = sorted(len(text) * depth // 100 for depth in rng.sample(_DEPTHS, len(needles)))
        for offset, (place, line) in enumerate(zip(places, needles, strict=True)):
            text.insert(place + offset, line)
        return " ".join(text)
    if spec.haystack == "noise":
        text = [GRASS] * size
    else:
        text = [
            _NEEDLE.format(kind=kind, key=key, value=word(kind))
            for key in distinct(word, spec.key_kind, size, list(values))
        ]
    places = sorted((rng.randrange(size + 1) for _ in needles), reverse=True)
    for place, line in zip(places, needles, strict=True):
        text.insert(place, line)
    return "\n".join(text)


def needle_prompt(kind: str, keys: Sequence[str], single: bool) -> tuple[str, str, str]:
    """(opening, question, answer prefix) of asking for the values of some keys; `single`: there is one value in all."""
    opening, question, prefix = _NIAH_OPENING, _NIAH_QUESTION, _NIAH_PREFIX
    if single:
        # The reference's own rewriting into the singular.
        kind = kind[:-1]
        opening = opening.replace("Some", "A").replace("are", "is")
        question = question.replace("are all", "is")
        prefix = prefix.replace("are", "is")
    query = series(keys)
    return opening.format(kind=kind), question.format(kind=kind, query=query), prefix.format(kind=kind, query=query)


def random_word(rng: Random, kind: str) -> str:
    """A random key or value: a 7-digit number, an adjective-noun word or a UUID."""
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuids":
        return str(UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def distinct(word: Callable[[str], str], kind: str, count: int, taken: Sequence[str]) -> list[str]:
    """`count` different words of a kind, none of them taken: a key that occurs twice would have two values."""
    drawn = dict.fromkeys(taken)
    while len(drawn) < count + len(taken):
        drawn[word(kind)] = None
    return list(drawn)[len(taken) :]


def series(words: Sequence[str]) -> str:
    """The words as a list in a sentence: "a, b, and c"."""
    return ", ".join(words[:-1]) + ", and " + words[-1] if len(words) > 1 else words[0]


# Variable tracking


def variables(rng: Random, size: int, shot: str, hops: int = 4, letters: int = 5) -> Sample:
    """Variable tracking over `size` lines of filler; shot: a solved example to stand before it."""
    body, value, named = _chain_text(rng, size, hops, letters)
    return Sample(
        "vt",
        shot + _VT_OPENING + body,
        _VT_QUESTION.format(query=value),
        _VT_PREFIX.format(count=hops + 1, query=value),
        tuple(named),
        TASKS["vt"],
    )


def _chain_text(rng: Random, size: int, hops: int, letters: int) -> tuple[str, str, list[str]]:
    """`size` lines of filler with a chain of assignments in order at random places; (text, value, variables)."""
    variables: list[str] = []
    while len(variables) <= hops:
        name = "".join(rng.choice(string.ascii_uppercase) for _ in range(letters))
        if name not in variables:
            variables.append(name)
    value = str(rng.randrange(10_000, 99_999))
    steps = [f"VAR {variables[0]} = {value}"]
    steps += [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
    if size > len(steps):
        text = [GRASS + "\n"] * size
    else:
        # Too few lines for one place each: the reference cuts them at every full stop.
        text = [part + "." if part.strip() else part for part in ((GRASS + "\n") * size).split(".")]
    places = sorted(rng.sample(range(len(text)), len(steps)))
    for offset, (place, step) in enumerate(zip(places, steps, strict=True)):
        text.insert(place + offset, step)
    return " ".join(text).replace(". \n", ".\n"), value, variables


def _variable_shot(count_tokens: Callable[[str], int]) -> str:
    """The worked example in front of every vt prompt: three-letter variables, at most 500 tokens."""

    def shot(size: int) -> str:
        sample = variables(Random(f"ruler/vt/shot/{SEED}"), size, "", letters=3)
        return sample.prompt + " ".join(sample.answers) + "\n\n"

    return shot(_largest(lambda size: count_tokens(shot(size)) + TASKS["vt"] <= 500, 5))


# Word counting


def _list_words(sources: Sources) -> list[str]:
    """Words for numbered lists: the built-in ones and those of the essay."""
    found = set(re.findall(r"\b[a-z]{3,12}\b", sources.essay))
    return sorted(found | set(NOUNS) | set(ADJECTIVES))


def common_words(rng: Random, size: int, length: int, vocabulary: list[str]) -> Sample:
    """A list with 10 words that appear more often than the other `size`; a solved small list stands before it."""
    short = length < SHORT
    count, often, seldom = (20, 3, 1) if short else (40, 10, 3)
    drawn = rng.sample(vocabulary, min(len(vocabulary), count + size + 10))
    shot, shot_answers = _word_list(rng, drawn[:count], often, seldom)
    often, seldom = (6, 1) if short else (30, 3)
    body, answers = _word_list(rng, drawn[count:], often, seldom)
    solved = f"{_CWE_OPENING}{shot}\n{_CWE_QUESTION}{_CWE_PREFIX} {' '.join(numbered(shot_answers))}\n"
    return Sample("cwe", f"{solved}{_CWE_OPENING}{body}", _CWE_QUESTION, _CWE_PREFIX, tuple(answers), TASKS["cwe"])


def _word_list(rng: Random, words: list[str], often: int, seldom: int) -> tuple[str, list[str]]:
    common, others = words[:10], words[10:]
    items = common * often + others * seldom
    rng.shuffle(items)
    return " ".join(numbered(items)), common


def numbered(words: Sequence[str]) -> list[str]:
    """The words with their numbers from 1 on."""
    return [f"{i}. {word}" for i, word in enumerate(words, 1)]


def frequent_words(rng: Random, size: int, length: int, alpha: float = 2.0) -> Sample:
    """Coded words with Zipf frequencies; the most frequent is the noise "...", ranks 2 to 4 are asked for."""
    vocabulary = ["..."]
    while len(vocabulary) < max(length // 50, 8):
        word = "".join(rng.choice(string.ascii_lowercase) for _ in range(6))
        if word not in vocabulary:
            vocabulary.append(word)
    zeta = sum(k**-alpha for k in range(1, 100_000)) + 1e-5  # the rest of the series, for alpha = 2
    items = [word for k, word in enumerate(vocabulary, 1) for _ in range(int(size * k**-alpha / zeta))]
    rng.shuffle(items)
    answers = tuple(vocabulary[1:4])
    return Sample("fwe", _FWE_OPENING + " ".join(items), _FWE_QUESTION, _FWE_PREFIX, answers, TASKS["fwe"])


# Questions over documents


def _documents_question(rng: Random, task: str, size: int, index: int, source: QuestionSet) -> Sample:
    """`size` paragraphs in random order: the gold ones, others of their article, then any."""
    question, answers, gold, related = source.questions[index % len(source.questions)]
    size = min(max(size, len(gold)), len(source.paragraphs))
    chosen = list(gold)
    if size - len(gold) <= len(related):
        chosen += rng.sample(related, size - len(gold))
    else:
        known = {*gold, *related}
        rest = [i for i in range(len(source.paragraphs)) if i not in known]
        chosen += [*related, *rng.sample(rest, size - len(gold) - len(related))]
    rng.shuffle(chosen)
    body = "\n\n".join(f"Document {i}:\n{source.paragraphs[p]}" for i, p in enumerate(chosen, 1))
    return Sample(
        task, _QA_OPENING + body, f"{_QA_RULE}\n\nQuestion: {question}", _QA_PREFIX, answers, TASKS[task], gap="\n\n"
    )


def read_squad(path: str | Path) -> QuestionSet:
    """Answerable questions of a SQuAD v1.1 or v2 json. Raises DataError naming file and field if the shape is wrong."""
    index: dict[str, int] = {}
    questions = []
    for article in read_articles(path):
        here = [index.setdefault(paragraph.context, len(index)) for paragraph in article]
        for place, paragraph in zip(here, article, strict=True):
            related = tuple(dict.fromkeys(i for i in here if i != place))
            for asked in paragraph.questions:
                if not asked.impossible:
                    questions.append((asked.text, asked.answers, (place,), related))
    return QuestionSet(tuple(index), tuple(questions))


def read_hotpot(path: str | Path) -> QuestionSet:
    """Questions of a HotpotQA json; all paragraphs of a question are gold, as in the reference. Raises DataError."""
    data = read_json(path)
    if not isinstance(data, list):
        raise DataError(f"{path}: not a HotpotQA file; it must be a list of questions")
    index: dict[str, int] = {}
    questions = []
    for number, asked in enumerate(data):
        where = f"{path}, record {number}"
        texts = []
        for part, entry in enumerate(field(asked, "context", "a list", where)):
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)):
                raise DataError(f"{where}: the field 'context'[{part}] must be a title and a list of sentences")
            texts.append(f"{entry[0]}\n{''.join(map(str, entry[1]))}")
        gold = tuple(dict.fromkeys(index.setdefault(text, len(index)) for text in texts))
        question, answer = (field(asked, key, "a text", where) for key in ("question", "answer"))
        questions.append((question, (answer,), gold, ()))
    return QuestionSet(tuple(index), tuple(questions))
