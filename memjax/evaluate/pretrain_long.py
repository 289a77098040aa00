"""Pretraining tasks of long texts: RULER's kinds and wording, with keys, words and haystacks that are made up.

A small base knows nothing of RULER's prompts, and its tokenizer has to spell most of their words; both are learnt here.
Keys and words are letters in pronounceable order instead of RULER's own. One text is asked about several times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from memjax.evaluate import ruler
from memjax.evaluate.pretrain_rows import Row
from memjax.evaluate.world.documents import random_document
from memjax.evaluate.world.names import draw_number, split_of
from memjax.evaluate.world.vary import WORDS

SPLIT = "train"
_ASKED = 8  # questions of one text at most
_SMALLEST = ruler.Needles("noise")
# Telling several keys apart is learnt slowly, finding the only one at once.
_WEIGHTS = {"niah_multikey_1": 3, "niah_multiquery": 3, "niah_multikey_2": 2, "niah_multivalue": 2}
_FEWEST = 4  # words of prose where hardly any is wanted
_LISTED = 2048  # tokens that two lists of spelled words may take
_ONSETS = ("", *"b c d f g h l m n p r s t w st tr br cl gr pl sh".split())
_VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "ea", "ou", "y")
_CODAS = ("", "", "n", "r", "l", "t", "s", "d", "m", "ng", "st", "ck", "nd")


def spelled(rng: Random) -> str:
    """A word that means nothing, one to three syllables of letters; none of the validation or test world."""
    while True:
        count = rng.choices((1, 2, 3), (3, 5, 1))[0]
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))
        if len(word) > 1 and split_of(word) == split_of(word.capitalize()) == SPLIT:
            return word


def prose(rng: Random, words: int) -> list[str]:
    """About `words` words: sentences of the invented world, or of made-up and known words."""
    if rng.random() < 0.3:
        return random_document(rng, SPLIT, min(4096, max(40, words * 4 // 3)), True).text.split(" ")
    strange = [spelled(rng) for _ in range(rng.randint(20, 400))]
    share = rng.uniform(0.3, 0.9)
    text: list[str] = []
    while len(text) < words:
        drawn = [rng.choice(strange if rng.random() < share else WORDS) for _ in range(rng.randint(4, 24))]
        drawn[0] = drawn[0].capitalize()
        for place in range(1, len(drawn) - 1):
            if rng.random() < 0.06:
                drawn[place] += rng.choice((",", ";", ","))
        text += [*drawn[:-1], drawn[-1] + rng.choice("....?!")]
    return text


def needles(rng: Random, row: Row) -> None:
    """The eight needle tasks: one text, asked for the values of one key, or of several."""
    weights = [_WEIGHTS.get(task, 1) for task in ruler.NIAH_TASKS]
    spec = rng.choices(list(ruler.NIAH_TASKS.values()), weights)[0]
    spec = replace(spec, keys=max(spec.keys, rng.randint(1, 4)), values=spec.values if rng.random() < 0.8 else 2)
    if not _hidden(rng, row, spec):
        _hidden(rng, row, replace(_SMALLEST, value_kind=spec.value_kind))


def keys(rng: Random, row: Row) -> None:
    """Needles and next to nothing around them: only its key tells which value is asked for. Half of the keys are short."""
    spec = ruler.Needles(rng.choice(("noise", "essay")), keys=rng.randint(2, 8))
    while not _hidden(rng, row, spec, bare=True):
        spec = replace(spec, keys=spec.keys // 2)


def _hidden(rng: Random, row: Row, spec: ruler.Needles, bare: bool = False) -> bool:
    """Puts a text with such needles and questions about it into the row; False, and nothing done, if it does not fit.

    bare: with the smallest haystack, and in half of the texts keys of one word instead of two.
    """
    few = 16 + row.limit // 32  # so many squared are keys enough for a text that is made of nothing but needles
    firsts, seconds = ([spelled(rng) for _ in range(few)] for _ in range(2))

    def word(kind: str) -> str:
        if kind == "numbers":
            return draw_number(rng, SPLIT, 7)
        if kind != "words":
            return ruler.random_word(rng, kind)
        return rng.choice(firsts) if short else f"{rng.choice(firsts)}-{rng.choice(seconds)}"

    short = bare and rng.random() < 0.5
    tokens = 0 if bare else max(40, _room(rng, row, 60 * spec.keys * spec.values))
    names = ruler.distinct(word, spec.key_kind, spec.keys, ())
    drawn = {key: [word(spec.value_kind) for _ in range(spec.values)] for key in names}
    essay = prose(rng, max(_FEWEST, tokens)) if spec.haystack == "essay" else []
    body = _fitting(row, tokens, lambda size: ruler.hidden_needles(rng, spec, drawn, size, essay, word))
    values = {key: sorted(group, key=body.index) for key, group in drawn.items()}
    told: set[str] = set()
    for _ in range(_ASKED):
        several = spec.asked > 1 or rng.random() < 0.2
        asked = tuple(rng.sample(names, rng.randint(1, min(4, len(names))) if several else 1))
        if told.intersection(asked):  # the answer stands above
            continue
        answers = [value for key in asked for value in values[key]]
        opening, question, prefix = ruler.needle_prompt(spec.value_kind, asked, len(answers) == 1)
        context = "" if told else f"{opening}{body}\n"
        if not row.turn(question, ruler.series(answers) + ".", context=context, lead=prefix):
            break
        told.update(asked)
    return bool(told)


def tracks(rng: Random, row: Row) -> None:
    """A chain of variables among lines of filler, with a solved one before it or without."""
    letters, hops = rng.choice((3, 5, 5)), rng.choice((1, 2, 4, 4, 4))
    shot = ""
    if row.limit >= 700 and rng.random() < 0.5:
        small = _chain(rng, rng.randint(4, 12), "", rng.choice((2, 4)), 3)
        shot = small.prompt + " ".join(small.answers) + "\n\n"
    used = len(row.encoder.encode(shot)) + 90 + 22 * hops
    sample = _sample(row, _room(rng, row, used), lambda size: _chain(rng, size, shot, hops, letters))
    # As the chat template splits a prompt at its last blank line.
    document, _, question = sample.context.rpartition("\n\n")
    row.document_ids(row.encoder.encode(" " + document), 0.0)
    row.turn(sample.question, " ".join(sample.answers), context=f"{question}\n", lead=sample.prefix)


def _chain(rng: Random, size: int, shot: str, hops: int, letters: int) -> ruler.Sample:
    """Variable tracking whose number no other split of the world has."""
    while True:
        sample = ruler.variables(rng, size, shot, hops, letters)
        if split_of("".join(filter(str.isdigit, sample.question))) == SPLIT:
            return sample


def counts(rng: Random, row: Row) -> None:
    """The commonest words of a numbered list, a solved list before it; `codes` where there is no room for that."""
    if row.limit < _LISTED:
        return codes(rng, row)
    words = list(dict.fromkeys(spelled(rng) for _ in range(row.limit // 3 + 80)))
    sample = _sample(row, _room(rng, row, 0), lambda size: ruler.common_words(rng, size, 1024, words))
    listed = " ".join(ruler.numbered(sample.answers))
    if not row.turn(sample.question, listed, context=f"{sample.context}\n", lead=sample.prefix):
        codes(rng, row)


def codes(rng: Random, row: Row) -> None:
    """The three most frequent words of a coded text."""
    sample = _sample(row, _room(rng, row, 120), lambda size: ruler.frequent_words(rng, size * 10, row.limit))
    row.turn(sample.question, ruler.series(sample.answers) + ".", context=f"{sample.context}\n", lead=sample.prefix)


def _room(rng: Random, row: Row, reserve: int) -> int:
    """How many tokens a text may take: some share of what the row has left, mostly most of it."""
    room = row.room() - reserve - 60
    return int(room * (rng.uniform(0.7, 1.0) if rng.random() < 0.6 else rng.uniform(0.1, 0.7)))


def _fitting(row: Row, tokens: int, make: Callable[[int], str]) -> str:
    """`make(size)` of the first size tried that takes at most `tokens` tokens, coming down to it; else of the smallest."""
    size = max(1, tokens // 3)
    while size > 1:
        text = make(size)
        took = len(row.encoder.encode(text))
        if took <= tokens:
            return text
        size = min(size - 1, max(1, int(size * tokens / took * 0.97)))
    return make(1)


def _sample(row: Row, tokens: int, make: Callable[[int], ruler.Sample]) -> ruler.Sample:
    """The sample of a size whose prompt takes about `tokens` tokens, or the smallest."""
    made: list[ruler.Sample] = []

    def text(size: int) -> str:
        made.append(make(size))
        return made[-1].context

    _fitting(row, tokens, text)
    return made[-1]
