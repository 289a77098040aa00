"""The demonstration: documents become memories; base, plain prompt and memories answer the same questions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from memjax.bank.add import add_text
from memjax.bank.store import Bank, open_bank
from memjax.errors import DataError
from memjax.evaluate import world
from memjax.evaluate.metrics import contains
from memjax.evaluate.peak import peak_mib
from memjax.models.base import Base
from memjax.models.generate import Sampling, generate_all
from memjax.serve.engine import Engine, EngineConfig
from memjax.write.distill import DistillConfig, replay_lesson
from memjax.write.prompts import PromptStyle, ask_tokens, read_tokens

ANSWER_TOKENS = 24
_DAYS = frozenset(f"{day}day" for day in ("Mon", "Tues", "Wednes", "Thurs", "Fri", "Satur", "Sun"))
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DemoQuestion:
    """A question about a document (its name), or about none of them; `answers` are the gold answers, the first the best."""

    question: str
    document: str | None = None
    answers: tuple[str, ...] = ()


def shipped(style: PromptStyle) -> tuple[dict[str, str], list[DemoQuestion]]:
    """(texts by name, questions) of the demonstration that ships with the package, in English or, for a base of the plain
    style, from the invented world that such a base was trained on (its test split)."""
    if style.name == "plain":
        return _world_demo()
    folder = resources.files("memjax.evaluate").joinpath("demo_data")
    texts = {f.name[:-4]: f.read_text("utf-8") for f in folder.iterdir() if f.name.endswith(".txt")}
    return dict(sorted(texts.items())), parse_questions(
        folder.joinpath("questions.jsonl").read_text("utf-8"), "questions.jsonl"
    )


def _world_demo(seed: int = 11, tokens: int = 120) -> tuple[dict[str, str], list[DemoQuestion]]:
    texts, asked = {}, []
    for number, doc in enumerate(world.documents("test", seed, 3, tokens), start=1):
        texts[f"world-{number}"] = doc.text
        for question in world.questions(doc, ("one_hop",), seed=seed, limit=3):
            asked.append(DemoQuestion(question.text, f"world-{number}", (question.answer,)))
    return texts, asked + [DemoQuestion(prompt.text) for prompt in world.general_prompts("test", seed, 12)]


def parse_questions(text: str, where: str) -> list[DemoQuestion]:
    """Questions from JSON lines with `question`, `document` (or null) and `answers`; DataError names line and field."""
    made = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}, line {number}: no JSON ({error.msg}); write one JSON object per line") from error
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise DataError(f"{where}, line {number}: field 'question' must be a text")
        answers = row.get("answers", [])
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise DataError(f"{where}, line {number}: field 'answers' must be a list of texts")
        document = row.get("document")
        if document is not None and not answers:
            raise DataError(f"{where}, line {number}: field 'answers' must name what is right about {document!r}")
        made.append(DemoQuestion(row["question"], document, tuple(answers)))
    return made


def run_demo(
    base: Base,
    style: PromptStyle,
    texts: dict[str, str],
    questions: Sequence[DemoQuestion],
    config: DistillConfig,
    *,
    say: Say = lambda line: None,
    bar: Callable[[str], Any] | None = None,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Write all texts into a new bank, ask everything in three ways, and count; see the keys at the end.

    `leaked` counts answers to unrelated questions, with the gate and without it, that hold a gold answer, name or number
    of a document which the base's own answer lacks. `prompt_tokens_saved` leaves the plain prompt's example turns out.
    """
    unknown = sorted({q.document for q in questions if q.document} - set(texts))
    if unknown:
        raise DataError(
            f"questions name documents that are not given: {', '.join(unknown)}; names are file names without .txt"
        )
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_bank(folder or Path(scratch) / "bank", create=True, base_id=base.id, base_name=base.name) as bank,
    ):
        writing = _write_all(base, bank, texts, style, config, say, bar)
        say(f"asking {len(questions)} questions of the base alone, of the base with the text, and of the memories")
        rows = _ask_all(base, bank, style, texts, questions, config, say)
    related = [r for r in rows if r["document"]]
    unrelated = [r for r in rows if not r["document"]]
    mean = lambda key: float(np.mean([r[key] for r in related])) if related else 0.0
    return {
        "questions": len(related),
        "right_base": sum(r["base_right"] for r in related),
        "right_prompt": sum(r["prompt_right"] for r in related),
        "right_memjax": sum(r["memjax_right"] for r in related),
        "loss_base": mean("base_loss"),
        "loss_prompt": mean("prompt_loss"),
        "loss_memjax": mean("memjax_loss"),
        "unrelated": len(unrelated),
        "gated_off": sum(r["memory"] is None for r in unrelated),
        "leaked": sum(r["leaked"] for r in unrelated),
        "prompt_tokens_saved": sum(r["prompt_tokens"] - r["memjax_tokens"] for r in related),
        "seconds": time.perf_counter() - began,
        "peak_mib": peak_mib(),
        "base": base.name,
        "documents": writing,
        "rows": rows,
    }


def _write_all(
    base: Base, bank: Bank, texts: dict[str, str], style: PromptStyle, config: DistillConfig, say: Say, bar: Any
) -> list[dict[str, Any]]:
    written = []
    replay = replay_lesson(base, style, config)
    for name, text in texts.items():
        began = time.perf_counter()
        with bar(name) if bar else contextlib.nullcontext(lambda stage, share, metrics: None) as progress:
            _, result = add_text(base, bank, text, name, style, config, replay=replay, progress=progress)
        row = {"name": name, "tokens": len(base.tokenizer.encode(text)), "seconds": time.perf_counter() - began}
        row = {**(result.metrics if result else {}), **row}
        written.append(row)
        loss = row.get("kl_read", float("nan"))
        say(f"wrote {name}: {row['tokens']} tokens in {row['seconds']:.0f} s, loss {loss:.3f} nats")
    return written


def _ask_all(
    base: Base,
    bank: Bank,
    style: PromptStyle,
    texts: dict[str, str],
    questions: Sequence[DemoQuestion],
    config: DistillConfig,
    say: Say,
) -> list[dict[str, Any]]:
    engine = Engine(base, bank, style, EngineConfig(rank=config.rank, marker=config.marker, candidates=min(4, len(texts))))
    sampling = Sampling(max_tokens=ANSWER_TOKENS)
    plain = _answers(base, [ask_tokens(base.tokenizer, style, q.question) for q in questions])
    names = _names(texts)
    rows = []
    by_memory = [engine.ask(q.question, sampling=sampling) for q in questions]
    # Beside an unrelated question stands the text that retrieval would have put into the prompt.
    shown = [q.document or a.choice.candidates[0].name for q, a in zip(questions, by_memory, strict=True)]
    prompted = _prompted(base, style, texts, questions, shown)
    bare = dataclasses.replace(style, examples=())
    for index, (question, answer) in enumerate(zip(questions, by_memory, strict=True)):
        row: dict[str, Any] = {
            "document": question.document,
            "question": question.question,
            "gold": list(question.answers),
            "base": plain[index],
            "prompt": prompted[index],
            "memjax": answer.text,
            "memory": answer.choice.memory,
            "gate": answer.choice.value,
            "threshold": answer.choice.threshold,
            "prompt_tokens": len(read_tokens(base.tokenizer, bare, texts[shown[index]], question.question)),
            "memjax_tokens": answer.prompt_tokens,
            "seconds": answer.seconds["total"],
        }
        if question.document:
            right = lambda text, gold=question.answers: contains(text, gold)
            row |= {f"{who}_right": bool(right(row[who])) for who in ("base", "prompt", "memjax")}
            gold = question.answers[0]
            asked = ask_tokens(base.tokenizer, style, question.question)
            row["base_loss"], row["memjax_loss"] = engine.answer_losses(asked, gold, [None, answer.choice.memory])
            read = read_tokens(base.tokenizer, style, texts[question.document], question.question)
            (row["prompt_loss"],) = engine.answer_losses(read, gold, [None])
        else:
            ungated = engine.ask(question.question, gate=False, sampling=sampling).text
            row["memjax_no_gate"] = ungated
            row["leaked"] = bool(_leaks(answer.text, plain[index], names) or _leaks(ungated, plain[index], names))
        rows.append(row)
    return rows


def _answers(base: Base, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Greedy answers of prompts that share their beginning."""
    sampling = Sampling(max_tokens=ANSWER_TOKENS)
    answers = generate_all(base.model, base.params, prompts, base.tokenizer.eos_ids, sampling, rows=4)
    return [base.tokenizer.decode(tokens).strip() for tokens in answers]


def _prompted(
    base: Base, style: PromptStyle, texts: dict[str, str], questions: Sequence[DemoQuestion], shown: Sequence[str]
) -> list[str]:
    made = [""] * len(questions)
    for name in dict.fromkeys(shown):
        places = [i for i, other in enumerate(shown) if other == name]
        prompts = [read_tokens(base.tokenizer, style, texts[name], questions[i].question) for i in places]
        for place, answer in zip(places, _answers(base, prompts), strict=True):
            made[place] = answer
    return made


def _names(texts: dict[str, str]) -> set[str]:
    """Names and numbers of the documents: runs of capitalised words, capitalised words within a sentence, numbers."""
    found: set[str] = set()
    for text in texts.values():
        found |= set(re.findall(r"\d+(?::\d+)*", text))
        for run in re.finditer(r"[A-Z][a-z]+(?: [A-Z][a-z]+)*", text):
            words = run.group().split()
            opens = run.start() == 0 or text[: run.start()].rstrip()[-1:] in ".!?"
            words = words[1:] if opens and words[0] in ("The", "A", "Every", "Last", "Tickets", "Passengers") else words
            if words and not (opens and len(words) == 1) and words[0].removesuffix("s") not in _DAYS:
                found.add(" ".join(words))
    return found


def _leaks(answer: str, own: str, names: set[str]) -> list[str]:
    """Which names or numbers of the documents stand in the answer, as whole words, and not in the base's own."""
    stands = lambda name, text: re.search(rf"(?<![\w:]){re.escape(name)}(?![\w:])", text, re.IGNORECASE) is not None
    return sorted(name for name in names if stands(name, answer) and not stands(name, own))
