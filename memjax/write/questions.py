"""Questions from a text, without ever seeing a user's question: asked by the base, cloze, and continuation windows."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from memjax.models.base import Base
from memjax.models.generate import Sampling, generate_all
from memjax.write.prompts import PromptStyle, question_messages, read_tokens

T = TypeVar("T")
INVITED = 32  # questions sampled at once
VIEW = 3  # sentences of the larger parts of a text that questions are asked of
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
_WORD = re.compile(r"[^\W_]+(?:[’'.,:-][^\W_]+)*%?", re.UNICODE)
_LEADS = frozenset(
    (
        "in at by from of on to is are was were called named with for after before near under over until every "
        "about has have had costs takes lasts holds weighs measures between than as"
    ).split()
)
_AUXILIARIES = frozenset(("is are was were can could will would must may might should has had have").split())
_PLACES = frozenset(("in at on to from beside inside behind near under").split())
_STOP = _LEADS | frozenset(
    (
        "the a an and or but that this these those it its his her their our your my he she they we you i not no be "
        "been being do does did will would can could may might must shall should there here then when where which "
        "who what how also only just so if while because into onto out up down off all any each both few more most "
        "other some such"
    ).split()
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A training question. `answer` is None where the teacher is to answer it; `span` is what the answer should hold.

    kind: `asked` (written by the base), `reworded` (the same in other words), `stranger` (asked too, but it names what
    the text does not), `turned` (a sentence turned around), `cloze`, `continue`, or `general` (replay: the base
    answers, without the text).
    """

    text: str
    kind: str
    answer: str | None = None
    span: str | None = None


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order; a line end closes one too."""
    return [part.strip() for part in _SENTENCE.split(text) if _WORD.search(part)]


def answer_spans(sentence: str) -> list[str]:
    """Spans of a sentence that a short question could ask for: numbers, names, and what follows a linking word."""
    words = list(_WORD.finditer(sentence))
    found: list[tuple[int, int]] = []
    for index, word in enumerate(words):
        text = word.group()
        if any(c.isdigit() for c in text):
            end = index
            if end + 1 < len(words) and _adjacent(sentence, words, end) and words[end + 1].group().lower() not in _STOP:
                end += 1
            found.append((index, end))
        elif text[0].isupper() and (index > 0 or (len(words) > 1 and words[1].group()[0].isupper())):
            start = index
            if start and words[start - 1].group()[0].isupper() and _adjacent(sentence, words, start - 1):
                continue  # inside a name that began earlier
            end = index
            while end + 1 < len(words) and words[end + 1].group()[0].isupper() and _adjacent(sentence, words, end):
                end += 1
            if text.lower() not in _STOP:
                found.append((start, end))
        if text.lower() in _LEADS and index + 1 < len(words):
            start = index + 1
            if text.lower() == "to" and words[start].group()[0].islower() and words[start].group().lower() not in _STOP:
                continue  # an infinitive
            while start < len(words) and words[start].group().lower() in (
                "the",
                "a",
                "an",
                "its",
                "their",
                "his",
                "her",
            ):
                start += 1
            end = start
            while (
                end + 1 < len(words)
                and end - start < 2
                and _adjacent(sentence, words, end)
                and words[end + 1].group().lower() not in _STOP
                and not (words[end].group()[0].isupper() and words[end + 1].group()[0].islower())
            ):
                end += 1
            participle = text.lower() in _AUXILIARIES and end + 1 < len(words) and words[end + 1].group().lower() in _LEADS
            if start < len(words) and words[start].group().lower() not in _STOP and not participle:
                found.append((start, end))
    spans = [sentence[words[a].start() : words[b].end()] for a, b in dict.fromkeys(found)]
    return list(dict.fromkeys(spans))


def _adjacent(sentence: str, words: Sequence[re.Match[str]], index: int) -> bool:
    return sentence[words[index].end() : words[index + 1].start()] == " "


def invited_questions(
    base: Base, text: str, style: PromptStyle, limit: int, strangers: int = 0, seed: int = 0
) -> list[Question]:
    """Up to `limit` different questions that the base asks when it reads the text and is invited to (`style.invite`).

    All are asked of single sentences and of few that share a name (`views`), each as often as any other: of the whole
    text a base asks for what it likes to ask for, and what no question asked for a memory does not learn. What names
    somebody or a number that the text does not (see `grounded`) is dropped, but for up to `strangers` more questions,
    which are kept to say of them that the text does not tell (`style.abstain`).
    """
    asks = [read_tokens(base.tokenizer, style, view, style.invite) for view in views(text, seed)]
    upcoming = itertools.cycle(asks)
    questions: dict[str, Question] = {}
    others: dict[str, Question] = {}
    for turn in range(-(-limit // INVITED) * 4):
        prompts = [next(upcoming) for _ in range(INVITED)]
        sampling = Sampling(temperature=0.8, max_tokens=24, seed=seed + turn)
        drafts = generate_all(base.model, base.params, prompts, base.tokenizer.eos_ids, sampling, rows=INVITED)
        for tokens in drafts:
            question = base.tokenizer.decode(tokens).strip().split("\n")[0].strip()
            if question[-1:] not in ("?", "."):
                continue
            if grounded(question, text):
                questions.setdefault(question.lower(), Question(question, "asked"))
            else:
                others.setdefault(question.lower(), Question(question, "stranger", span=style.abstain))
        if len(questions) >= limit:
            break
    return [*questions.values()][:limit] + ([*others.values()][:strangers] if style.abstain else [])


def views(text: str, seed: int = 0) -> list[str]:
    """The parts of a text that questions are asked of: for every sentence it alone, and it before `VIEW` - 1 others.

    The others are drawn by `seed` from those that name what it names, so that some questions need both, or, where these
    are too few, follow it.
    """
    rng = random.Random(seed)
    sentences = split_sentences(text) or [text]
    named = [{word for word in _WORD.findall(sentence) if _names(word)} for sentence in sentences]
    made = []
    for i, sentence in enumerate(sentences):
        others = [*range(i + 1, len(sentences)), *range(i)]
        related = [j for j in others if named[i] & named[j]]
        rng.shuffle(related)
        beside = list(dict.fromkeys([*related, *others]))[: VIEW - 1]
        made += [sentence, " ".join([sentence, *(sentences[j] for j in beside)])]
    return list(dict.fromkeys(made))


def reword(question: str, words: Sequence[str], rng: random.Random) -> str:
    """The question with one to three words left out, put in from `words`, swapped or replaced; names and numbers stay.

    What it then says is often clumsy and may be wrong: the teacher decides whether it still asks for the same.
    """
    body = question.rstrip("?.")
    said, mark = body.split(" "), question[len(body) :]
    for _ in range(rng.randint(1, 3)):
        free = [i for i, word in enumerate(said) if i and not _names(word)]
        kind = rng.random()
        if kind < 0.3 and free and len(said) > 3:
            del said[rng.choice(free)]
        elif kind < 0.5 and len(said) > 1:
            at = rng.randrange(len(said) - 1)
            said[at : at + 2] = said[at + 1], said[at]
        elif kind < 0.8:
            said.insert(rng.randint(0, len(said)), rng.choice(words))
        elif free:
            said[rng.choice(free)] = rng.choice(words)
    return " ".join(said) + mark


def plain_words(questions: Sequence[str]) -> list[str]:
    """The words of questions that are no names or numbers, as often as they are used: what `reword` draws from."""
    return [word for text in questions for word in text.rstrip("?.").split(" ") if word and not _names(word)]


def _names(word: str) -> bool:
    return word != word.lower() or any(c.isdigit() for c in word)


def grounded(question: str, text: str) -> bool:
    """Whether a question names something of the text, and no other name or number (its first word may have a capital)."""
    known, words = set(_WORD.findall(text)), _WORD.findall(question)
    named = [i for i, word in enumerate(words) if _names(word)]
    return any(words[i] in known for i in named) and all(words[i] in known for i in named if i)


def asked_questions(base: Base, text: str, limit: int, seed: int = 0) -> list[Question]:
    """Up to `limit` questions that the base writes when shown a sentence and a span of it as the answer.

    They vary the wording where `turned_questions` repeat the text's. Spans are taken in turn from all sentences, a span
    that has been asked for often last. Dropped: what is no question, holds its answer, shares no content word with its
    sentence, or repeats another.
    """
    rng = random.Random(seed)
    pairs = [(sentence, span) for sentence in split_sentences(text) for span in answer_spans(sentence)]
    rng.shuffle(pairs)
    pairs = _spread(pairs, lambda pair: pair[0])
    pairs = _spread(pairs, lambda pair: pair[1])[:limit]
    if not pairs:
        return []
    lead = base.tokenizer.encode("Question:")
    prompts = [[*base.tokenizer.encode_chat(question_messages(sentence, span)), *lead] for sentence, span in pairs]
    drafts = generate_all(base.model, base.params, prompts, base.tokenizer.eos_ids, Sampling(max_tokens=18))
    questions: dict[str, Question] = {}
    for (sentence, span), tokens in zip(pairs, drafts, strict=True):
        question = base.tokenizer.decode(tokens).strip().split("\n")[0].strip()
        question = question[: question.find("?") + 1]
        if _sound(question, sentence, span):
            questions.setdefault(question.lower(), Question(question, "asked", answer=span, span=span))
    return list(questions.values())


def _spread(items: Sequence[T], group: Callable[[T], str]) -> list[T]:
    """The items reordered so that the first of every group come before the second of any."""
    seen: dict[str, int] = {}
    turns = []
    for item in items:
        turns.append(seen.get(group(item), 0))
        seen[group(item)] = turns[-1] + 1
    return [items[i] for i in sorted(range(len(items)), key=lambda i: turns[i])]


def at_most(items: Sequence[T], times: int, answer: Callable[[T], Hashable]) -> list[T]:
    """The items, but for those with an answer that `times` of them before had already.

    A text's subject is a span of every sentence; a student that is asked for it at every turn answers it to everything.
    """
    seen: dict[Hashable, int] = {}
    kept = []
    for item in items:
        seen[answer(item)] = seen.get(answer(item), 0) + 1
        if seen[answer(item)] <= times:
            kept.append(item)
    return kept


def _sound(question: str, sentence: str, span: str) -> bool:
    if not question.endswith("?") or span.lower() in question.lower():
        return False
    content = {w.lower() for w in _WORD.findall(question)} - _STOP
    return bool(content & {w.lower() for w in _WORD.findall(sentence)}) and len(question) > 12


def turned_questions(text: str) -> list[Question]:
    """Each sentence turned into questions for each of its spans, by rules for English.

    "The harp is tuned with a spoon." asks "What is the harp tuned with?" where there is an auxiliary verb, and
    "The ticket costs how many crowns?" where there is none. Names are asked for by "what" and by "who", what follows a
    preposition of place or time by "where" or "when" too: a reader will use any of them.
    """
    made: dict[str, Question] = {}
    for sentence in split_sentences(text):
        for span in answer_spans(sentence):
            for question in _turned(sentence.rstrip(".!?;: "), span):
                made.setdefault(question.lower(), Question(question, "turned", answer=span, span=span))
    return list(made.values())


def _turned(sentence: str, span: str) -> list[str]:
    begin = _place(sentence, span)
    person = len(span.split()) > 1 and all(w[0].isupper() and w.isalpha() for w in span.split())
    if begin <= 0:
        # What opens the sentence is its subject: the question word takes its place.
        rest = sentence[len(span) :].strip()
        return [] if begin < 0 or len(rest.split()) < 3 else [f"What {rest}?"]
    before, after = sentence[:begin].rstrip(), sentence[begin + len(span) :].strip()
    if after.startswith((",", ";", "(")):
        after = ""
    before = re.sub(r"\b(?:the|a|an)$", "", before).rstrip()
    questions = [_ask(before, after, _asking_for(span))]
    if person:
        questions.append(_ask(before, after, "who"))
    head, _, preposition = before.rpartition(" ")
    if preposition in _PLACES and head:
        timed = re.search(r"\d:\d|day\b|days\b|morning|evening|night", span)
        questions.append(_ask(head, after, "when" if timed else "where"))
    return questions


def _place(sentence: str, span: str) -> int:
    """Where a span of whole words first begins in a sentence, -1 where it does not: "now" is not a part of "known"."""
    words = list(_WORD.finditer(sentence))
    ends = {word.end() for word in words}
    begins = (word.start() for word in words if sentence.startswith(span, word.start()))
    return next((begin for begin in begins if begin + len(span) in ends), -1)


def _ask(before: str, after: str, asking: str) -> str:
    words = before.split()
    verb = next((i for i, w in enumerate(words) if i > 0 and w.lower() in _AUXILIARIES), None)
    if verb is None:
        return " ".join(f"{before} {asking} {after}".split()) + "?"
    subject = " ".join(words[:verb])
    if words[0].lower() in _STOP:
        subject = subject[0].lower() + subject[1:]
    asking = asking[0].upper() + asking[1:]
    return " ".join(f"{asking} {words[verb]} {subject} {' '.join(words[verb + 1 :])} {after}".split()) + "?"


def _asking_for(span: str) -> str:
    if re.search(r"\d:\d", span):
        return "what time"
    number = re.match(r"^[\d.,]+\s*(\D.*)?$", span)
    return f"how many {number.group(1) or ''}".strip() if number else "what"


def cloze_questions(text: str) -> list[Question]:
    """Each sentence with one span left out, to be filled in."""
    made = []
    for sentence in split_sentences(text):
        for span in answer_spans(sentence):
            at = _place(sentence, span)
            blanked = f"{sentence[:at]}____{sentence[at + len(span) :]}"
            if len(_WORD.findall(blanked)) > 3:
                made.append(Question(f"Fill in the blank: {blanked}", "cloze", answer=span, span=span))
    return made


def continuations(text: str, cue: int = 8, length: int = 6, stride: int = 5) -> list[Question]:
    """Windows over the text: a cue of `cue` words, and the `length` words that follow it as the answer."""
    words = [(m.start(), m.end()) for m in re.finditer(r"\S+", text)]
    made = []
    for begin in range(0, max(len(words) - cue, 1), stride):
        middle, end = min(begin + cue, len(words)), min(begin + cue + length, len(words))
        if end > middle:
            cue_text = " ".join(text[words[begin][0] : words[middle - 1][1]].split())
            answer = " ".join(text[words[middle][0] : words[end - 1][1]].split())
            made.append(Question(f"Continue: {cue_text}", "continue", answer=answer))
    return made
