"""Texts to learn eviction from: documents of the invented world with questions, and any text files with how they go on.

No text of a benchmark is among them: documents are of the world's training split, whose names, values and forms no test
has, without the needles, keys and chains that RULER and needle tests hide; files are what the caller names. A share of
the documents is told among prose that nothing asks for, since most of a long text is never asked for: the caller's files,
or else made-up words or the training split's world.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import numpy as np

from memjax.errors import ConfigError, DataError
from memjax.evaluate.niah import sentences as sentences_of
from memjax.evaluate.pretrain_long import prose, spelled
from memjax.evaluate.world.documents import MAX_TOKENS, random_document
from memjax.evaluate.world.questions import QUESTION_KINDS, Question, ask
from memjax.models.base import Base
from memjax.models.generate import common_prefix
from memjax.train.data import EXAMPLES
from memjax.write.prompts import UNLIKE, PromptStyle, answer_text, prompt_style, read_tokens

SPLIT, VALIDATION = "train", "validation"
_SHORTEST = 40  # tokens of a document
_CODE = "code"
# What has a code without anybody's name: what is asked for must be kept though no name points to it.
_THINGS = (
    *("door code", "serial number", "account number", "room number", "booking reference", "batch label", "case number"),
    *("phone extension", "parcel number", "licence plate", "meter reading", "locker combination", "invoice number"),
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_OVER = 5  # sentences that are repeated, at most
_HIDDEN = 4  # a hidden document takes at most the fourth part of its text


@dataclasses.dataclass(frozen=True)
class LessonConfig:
    """rows: texts in a batch. shortest, longest: their tokens; behind: tokens of what is read behind each. texts: files,
    of which `share` of the rows are taken, else documents of the world with as many questions of `kinds` as fit. whole: the
    questions' tokens ask too, as they read what was kept; else only the token before the answer and the answer's own, as in
    arXiv 2605.25475. vary: forms are changed a little (`world.vary`). hidden: the share of the world's rows whose
    document is short, its sentences scattered among prose that nobody asks about. repeated: the share of these whose prose
    is one or a few sentences over and over. codes: with hidden up to so many things have a code, digits or a string without
    sense, which has to be kept whole.
    """

    rows: int = 8
    shortest: int = 96
    longest: int = 384
    behind: int = 128
    kinds: tuple[str, ...] = ("one_hop", "one_hop", "two_hop", "list", "yes_no")
    texts: tuple[str, ...] = ()
    share: float = 0.5
    whole: bool = True
    vary: bool = True
    hidden: float = 0.0
    repeated: float = 0.0
    codes: int = 0
    seed: int = 1

    def __post_init__(self) -> None:
        if not _SHORTEST <= self.shortest <= self.longest or min(self.rows, self.behind) < 1:
            raise ConfigError(f"data.shortest is at least {_SHORTEST} and at most data.longest; rows and behind at least 1")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"data.share is {self.share}; give the share of rows that come from data.texts, 0 to 1")
        if not 0 <= self.hidden <= 1:
            raise ConfigError(f"data.hidden is {self.hidden}; give the share of documents told among prose, 0 to 1")
        if not 0 <= self.repeated <= 1 or (self.repeated and not self.hidden):
            raise ConfigError(f"data.repeated is {self.repeated}; give a share of those of data.hidden, 0 to 1")
        if not 0 <= self.codes <= len(_THINGS) or (self.codes and not self.hidden):
            raise ConfigError(
                f"data.codes is {self.codes}; give 0 to {len(_THINGS)}, and data.hidden with it: they are told among prose"
            )
        if not self.kinds or set(self.kinds) - set(QUESTION_KINDS):
            raise ConfigError(f"data.kinds are {', '.join(self.kinds) or 'none'}; use {', '.join(QUESTION_KINDS)}")


@dataclasses.dataclass(frozen=True)
class Readings:
    """A text and its readings: token ids, and for each reading (ids, which of them ask)."""

    text: tuple[int, ...]
    behind: tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...]


@dataclasses.dataclass(frozen=True)
class LessonSource:
    """Where lessons come from: a base with its style, and the token ids of each file."""

    base: Base
    config: LessonConfig
    style: PromptStyle
    files: tuple[tuple[int, ...], ...] = ()


def open_lessons(base: Base, config: LessonConfig) -> LessonSource:
    """The source for a base. ConfigError where texts do not fit its window, DataError for a file that is no long text."""
    room = base.config.max_positions
    if config.longest + config.behind > room:
        raise ConfigError(
            f"data.longest and data.behind are {config.longest} and {config.behind} tokens; the base reads {room} at most"
        )
    files = tuple(tuple(_file_tokens(base, Path(path), config.shortest + config.behind)) for path in config.texts)
    return LessonSource(base, config, prompt_style(base.tokenizer.prompt_style), files)


def _file_tokens(base: Base, path: Path, least: int) -> list[int]:
    try:
        tokens = base.tokenizer.encode(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if len(tokens) < least:
        raise DataError(f"{path}: has {len(tokens)} tokens, and lessons need {least}; name a longer text")
    return tokens


def empty_lessons(config: LessonConfig) -> dict[str, np.ndarray]:
    """A batch as `evict.lesson` describes it, all of it padding."""
    batch = {
        name: np.full((config.rows, size), -1 if name in ("at", "places") else 0, np.int32)
        for size, names in ((config.longest, ("ids", "at")), (config.behind, ("behind", "places", "owner")))
        for name in names
    }
    return {**batch, "asks": np.zeros((config.rows, config.behind), bool)}


def lessons_at(source: LessonSource, step: int, split: str = SPLIT) -> dict[str, np.ndarray]:
    """The batch of a step, as `evict.lesson` describes it, with its `examples`: a pure function of seed and step."""
    config = source.config
    indices = range(step * config.rows, (step + 1) * config.rows)
    drawn = [readings(source, index, split) for index in indices]
    batch = empty_lessons(config)
    for row, lesson in enumerate(drawn):
        length, end = len(lesson.text), 0
        batch["ids"][row, -length:], batch["at"][row, -length:] = lesson.text, np.arange(length)
        for number, (tokens, asks) in enumerate(lesson.behind, start=1):
            part = slice(end, end + len(tokens))
            batch["behind"][row, part], batch["asks"][row, part], batch["owner"][row, part] = tokens, asks, number
            batch["places"][row, part] = length + np.arange(len(tokens))
            end += len(tokens)
    return {**batch, EXAMPLES: np.asarray(indices)}


def validation_lessons(source: LessonSource, batches: int) -> list[dict[str, np.ndarray]]:
    """The first batches of the validation world, without a word of the caller's files, for evaluations."""
    plain = dataclasses.replace(source, files=())
    drawn = (lessons_at(plain, step, VALIDATION) for step in range(batches))
    return [{name: array for name, array in batch.items() if name != EXAMPLES} for batch in drawn]


def readings(source: LessonSource, index: int, split: str = SPLIT) -> Readings:
    """Lesson number `index`."""
    rng = Random(f"eviction/{split}/{source.config.seed}/{index}")
    if source.files and rng.random() < source.config.share:
        return _of_file(source, rng)
    return _of_world(source, rng, split)


def _of_file(source: LessonSource, rng: Random) -> Readings:
    """A stretch of a file, and how it goes on: all of that asks."""
    config, start = source.config, source.base.tokenizer.prefix_ids
    tokens = rng.choice(source.files)
    longest = min(config.longest - len(start), len(tokens) - config.behind)
    length = rng.randint(min(config.shortest, longest), longest)
    begin = rng.randint(0, len(tokens) - length - config.behind)
    behind = tokens[begin + length : begin + length + config.behind]
    return Readings((*start, *tokens[begin : begin + length]), ((behind, (True,) * len(behind)),))


def _of_world(source: LessonSource, rng: Random, split: str) -> Readings:
    """A document, in the base's own prompt, and as many questions with their answers as fit."""
    base, config = source.base, source.config
    tokenizer, style = base.tokenizer, source.style
    wanted = rng.randint(config.shortest, config.longest)
    hidden = config.hidden > 0 and rng.random() < config.hidden
    size = rng.randint(_SHORTEST, max(_SHORTEST, wanted // _HIDDEN)) if hidden else min(wanted, MAX_TOKENS)
    # The world counts tokens of the tiny base; for another tokenizer sentences are left out until the prompt fits.
    document = random_document(rng, split, size, config.vary and split == SPLIT)
    codes = _codes(rng, rng.randint(0, config.codes)) if hidden and config.codes else []
    stated = [*document.sentences]
    for thing, code in codes:
        stated.insert(rng.randint(0, len(stated)), f"The {thing} is {code}.")
    sentences = _among_prose(source, rng, stated, wanted) if hidden else stated
    text = " ".join(sentences)

    def prompt(question: str) -> list[int]:
        return read_tokens(tokenizer, style, text, question)

    whole = prompt(UNLIKE[0])
    seam = common_prefix([whole, prompt(UNLIKE[1])])
    told = len(sentences)
    while seam > config.longest and len(sentences) > 1:
        sentences = sentences[: max(1, len(sentences) * config.longest // (seam + 1))]
        text = " ".join(sentences)
        whole = prompt(UNLIKE[0])
        seam = common_prefix([whole, prompt(UNLIKE[1])])
    if seam > config.longest:
        raise ConfigError(f"data.longest is {config.longest}, too short for the base's prompt around a document")
    streams = {kind: ask(document, rng, kind) for kind in config.kinds}
    streams[_CODE] = (Question(_CODE, f"What is the {thing}?", code, _CODE) for thing, code in codes)
    kinds, behind, room = [*config.kinds, *[_CODE] * len(codes)], [], config.behind
    while kinds:
        kind = rng.choice(kinds)
        question = next(streams[kind], None)
        if question is None:
            kinds = [other for other in kinds if other != kind]
            continue
        tokens = prompt(question.text)
        # A question that melts into the text, or is about a sentence that was left out, is no reading of this one.
        if tokens[:seam] != whole[:seam] or (len(sentences) < told and question.answer not in text):
            continue
        answer = tokenizer.encode(answer_text(tokenizer, style, question.answer))
        rest = (*tokens[seam:], *answer)
        if len(rest) > room:
            break
        asks = [config.whole] * (len(rest) - len(answer) - 1) + [True] * (len(answer) + 1)
        behind.append((rest, tuple(asks)))
        room -= len(rest)
    return Readings(tuple(whole[:seam]), tuple(behind))


def _codes(rng: Random, count: int) -> list[tuple[str, str]]:
    """So many things with their codes: of somebody, or of nobody."""
    things = rng.sample(_THINGS, count)
    return [(thing if rng.random() < 0.5 else f"code of {spelled(rng)}", _code(rng)) for thing in things]


def _code(rng: Random) -> str:
    """Three to nine digits, or one to five groups of two to nine letters and digits, or words without sense."""
    kind = rng.random()
    if kind < 0.4:
        return str(rng.randrange(100, 10 ** rng.randint(3, 9)))
    if kind < 0.6:
        return "-".join(spelled(rng) for _ in range(rng.randint(1, 3)))
    groups = ("".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 9))) for _ in range(rng.randint(1, 5)))
    return rng.choice("-._").join(groups)


def _among_prose(source: LessonSource, rng: Random, told: Sequence[str], tokens: int) -> list[str]:
    """The sentences in their order among sentences that nobody asks about, about `tokens` tokens in all."""
    tokenizer = source.base.tokenizer
    size = lambda text: len(tokenizer.encode(" " + text))
    room = tokens - sum(map(size, told))
    strange: list[str] = []
    unasked: Iterable[str] = sentences_of(_prose(source, rng, max(1, room)))
    if source.config.repeated and rng.random() < source.config.repeated:
        unasked = itertools.cycle([*unasked][: rng.randint(1, _OVER)])
    for sentence in unasked:
        room -= size(sentence)
        if room < 0:
            break
        strange.append(sentence)
    places = sorted(rng.randint(0, len(strange)) for _ in told)
    for place, sentence in reversed(list(zip(places, told, strict=True))):
        strange.insert(place, sentence)
    return strange


def _prose(source: LessonSource, rng: Random, tokens: int) -> str:
    """At least about `tokens` tokens of a file, or of `pretrain_long.prose` where there is none."""
    if not source.files:
        return " ".join(prose(rng, tokens))
    held = rng.choice(source.files)
    begin = rng.randint(0, max(0, len(held) - tokens))
    return source.base.tokenizer.decode(list(held[begin : begin + tokens]))
