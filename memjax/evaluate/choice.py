"""Multiple choice by log-likelihood: the choice to which the base gives the highest probability as its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np

from memjax.errors import DataError
from memjax.evaluate.files import field, read_lines, texts
from memjax.evaluate.subjects import ROWS
from memjax.evaluate.world import COMMON_FACTS, choices
from memjax.evaluate.world import common as knowledge
from memjax.memory.adapter import Slots
from memjax.models.base import Base
from memjax.models.generate import batch_bucket, bucket, common_prefix, read_prefix
from memjax.serve.engine import next_token_losses
from memjax.write.prompts import PromptStyle, answer_text, ask_tokens


@dataclasses.dataclass(frozen=True)
class ChoiceQuestion:
    """A question, what may be answered, and which of it (an index) is right."""

    text: str
    choices: tuple[str, ...]
    right: int


def read_choices(path: str | Path) -> list[ChoiceQuestion]:
    """Questions of a CommonsenseQA JSON-lines file (arXiv 1811.00937), in the authors' shape or the flat one of the hub.

    {"question": {"stem", "choices": [{"label", "text"}]}, "answerKey"} or {"question", "choices": {"label": [], "text":
    []}, "answerKey"}. DataError names file, line and field.
    """
    made = []
    for where, record in read_lines(path):
        if isinstance(record.get("question"), dict):
            asked = record["question"]
            stem = field(asked, "stem", "a text", f"{where}, question")
            entries = field(asked, "choices", "a list", f"{where}, question")
            places = [f"{where}, question.choices[{i}]" for i in range(len(entries))]
            labels = [field(entry, "label", "a text", place) for entry, place in zip(entries, places, strict=True)]
            said = [field(entry, "text", "a text", place) for entry, place in zip(entries, places, strict=True)]
        else:
            stem = field(record, "question", "a text", where)
            flat = field(record, "choices", "an object", where)
            labels, said = (texts(flat, key, f"{where}, choices") for key in ("label", "text"))
        key = field(record, "answerKey", "a text", where)
        if len(said) < 2 or len(labels) != len(said) or key not in labels:
            raise DataError(
                f"{where}: the field 'answerKey' must be one of the labels of at least two choices, but is {key!r} "
                f"of {labels}; files without answers cannot be scored"
            )
        made.append(ChoiceQuestion(stem, tuple(said), labels.index(key)))
    if not made:
        raise DataError(f"{path}: holds no question; write one JSON object per line")
    return made


def common_choices(seed: int, limit: int | None = None) -> list[ChoiceQuestion]:
    """The world's common knowledge as multiple choice, with wrong answers of the same topic; drawn by the seed."""
    rng = Random(f"choice/{seed}")
    facts = rng.sample(COMMON_FACTS, min(limit or len(COMMON_FACTS), len(COMMON_FACTS)))
    made = []
    for fact in facts:
        offered = choices(fact, seed)
        text = knowledge.ask(fact, rng.randrange(knowledge.forms(fact)))
        made.append(ChoiceQuestion(text, tuple(offered), offered.index(fact.answer)))
    return made


def drawn(asked: Sequence[ChoiceQuestion], seed: int, limit: int | None) -> list[ChoiceQuestion]:
    """`limit` of the questions drawn by the seed, in their order; all of them without a limit."""
    if limit is None or limit >= len(asked):
        return list(asked)
    return [asked[i] for i in sorted(Random(f"choice/{seed}").sample(range(len(asked)), limit))]


def log_likelihoods(
    base: Base,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    slots: Slots | None = None,
    slot_id: int = 0,
    rows: int = ROWS,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Summed log-probability (nats) of each continuation after its prompt, under the base or an adapter in a slot.

    What all prompts begin with is read once, by the base alone; lengths are bucketed, so few programs are compiled.
    """
    whole = [[*prompt, *rest] for prompt, rest in zip(prompts, continuations, strict=True)]
    shared = common_prefix(prompts)
    if not shared:
        raise DataError("prompts must begin alike in at least one token; put a template or a bos token before them")
    prefix = read_prefix(base.model, base.params, prompts[0][:shared])
    order = sorted(range(len(whole)), key=lambda i: len(whole[i]))
    sums = [0.0] * len(whole)
    size = min(rows, batch_bucket(len(whole)))
    for begin in range(0, len(order), size):
        part = order[begin : begin + size]
        tails = [whole[i][shared:] for i in part]
        ids = np.zeros((size, bucket(max(len(t) for t in tails))), np.int32)
        positions = np.full(ids.shape, -1, np.int32)
        for row, tail in enumerate(tails):
            ids[row, : len(tail)] = tail
            positions[row, : len(tail)] = shared + np.arange(len(tail))
        slot_ids = None if slots is None else np.full((size,), slot_id, np.int32)
        losses = next_token_losses(base.model, base.params, ids, positions, prefix.segment, slots, slot_ids)
        taken = np.asarray(losses, np.float64)
        for row, i in enumerate(part):
            first = len(prompts[i]) - shared
            sums[i] = -float(taken[row, first - 1 : len(tails[row]) - 1].sum())
        progress(begin + len(part))
    return sums


def choice_item_scores(
    base: Base,
    style: PromptStyle,
    asked: Sequence[ChoiceQuestion],
    *,
    rows: int = ROWS,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """{accuracy, accuracy_per_token, chance: one number per question} of the base on questions without a context.

    accuracy: the highest sum of log-probabilities; accuracy_per_token: the highest sum divided by the choice's tokens.
    """
    prompts, rests = [], []
    for question in asked:
        prompt = ask_tokens(base.tokenizer, style, question.text)
        for choice in question.choices:
            prompts.append(prompt)
            rests.append(base.tokenizer.encode(answer_text(base.tokenizer, style, choice)))
    made: dict[str, list[float]] = {"accuracy": [], "accuracy_per_token": [], "chance": []}
    sums = log_likelihoods(base, prompts, rests, rows=rows, progress=progress)
    place = 0
    for question in asked:
        count = len(question.choices)
        own = np.asarray(sums[place : place + count])
        tokens = np.asarray([max(len(rest), 1) for rest in rests[place : place + count]])
        made["accuracy"].append(float(own.argmax() == question.right))
        made["accuracy_per_token"].append(float((own / tokens).argmax() == question.right))
        made["chance"].append(1 / count)
        place += count
    return made
