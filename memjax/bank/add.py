"""From a text to a committed memory: check, write, calibrate, add; and the gate's threshold over the whole bank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memjax import ids
from memjax.bank.gate import Gate, best_threshold, first_entropies
from memjax.bank.store import DEFAULT_NAMESPACE, Bank, Entry
from memjax.errors import BankError, InputError
from memjax.memory.files import Meta, write_artefact
from memjax.models.base import Base
from memjax.models.weights import SITE_MODULES
from memjax.write.distill import DistillConfig, Written, distill, general_questions
from memjax.write.prompts import PromptStyle, ask_tokens, read_tokens
from memjax.write.teacher import Lesson

GATE = "gate"
CALIBRATION_PROMPTS = 16  # general prompts that each memory is probed with
CALIBRATION_MEMORIES = 64  # memories whose probes the bank's threshold is set by
_QUESTION_ROOM = 96  # tokens of the window kept for a question and its answer

Progress = Callable[[str, float, dict[str, float]], None]


def text_meta(base: Base, text: str, style: PromptStyle, config: DistillConfig) -> Meta:
    """What the memory of this text is identified by: known before anything is written."""
    recipe = {"writer": "distill", "prompt": style.name, **dataclasses.asdict(config)}
    return Meta(
        base_id=base.id,
        tokenizer_id=base.tokenizer.id,
        template_id=base.tokenizer.template_id,
        recipe=recipe,
        source_hash=ids.text_hash(text),
        base_name=base.name,
    )


def check_text(base: Base, text: str, style: PromptStyle) -> int:
    """The text's tokens; InputError where it is empty or longer than the base can read at once."""
    if not text.strip():
        raise InputError("the text is empty; give it something to remember")
    tokens = len(base.tokenizer.encode(text))
    prompt = len(read_tokens(base.tokenizer, style, text, ""))
    if prompt + _QUESTION_ROOM > base.config.max_positions:
        room = base.config.max_positions - _QUESTION_ROOM - (prompt - tokens)
        raise InputError(
            f"the text has {tokens:,} tokens and {base.name} reads at most {room:,} of a text at once; split it into "
            f"{math.ceil(tokens / room)} files (writing longer texts chunk by chunk will come with context compilation)"
        )
    return tokens


def add_text(
    base: Base,
    bank: Bank,
    text: str,
    name: str,
    style: PromptStyle,
    config: DistillConfig = DistillConfig(),
    *,
    namespace: str = DEFAULT_NAMESPACE,
    metadata: dict[str, Any] | None = None,
    expires_at: float | None = None,
    replace: bool = False,
    replay: Lesson | None = None,
    progress: Progress = lambda stage, share, metrics: None,
) -> tuple[Entry, Written | None]:
    """(the entry of the text's memory, what was written, None where the bank held it already).

    Nothing is in the bank before all of it is: the adapter, the text, the held-out questions with their entropies. Then
    the gate is set anew. `replay` as in `distill`. replace: the name must exist, and this becomes its next version; the
    one before is kept for `rollback`. InputError for a text that cannot be written, BankError where the name is another
    memory's, or is unknown and to be replaced.
    """
    meta = text_meta(base, text, style, config)
    check_text(base, text, style)
    put = bank.update if replace else bank.add
    options: dict[str, Any] = {"namespace": namespace, "text": text, "metadata": metadata, "expires_at": expires_at}
    taken = bank.get(name, namespace) if replace else bank.find(name, namespace)
    known = bank.find_key(meta.key, namespace)
    if known is not None:
        entry = put(name, meta.key, _never, **options)
        if replace:
            calibrate(base, bank, namespace)
        return entry, None
    if taken is not None and not replace:
        raise BankError(f"the name {name!r} already stands for another memory; choose another name or delete it first")
    written = distill(base, text, style, config, replay=replay, progress=progress)
    progress("calibrate", 0.0, {})
    probes = probe_memory(base, written, style, config)
    meta = dataclasses.replace(meta, metrics=written.metrics)

    def write(folder: Path) -> Any:
        return write_artefact(folder, written.adapter, SITE_MODULES, meta)

    entry = put(name, meta.key, write, questions=probes, **options)
    calibrate(base, bank, namespace)
    progress("calibrate", 1.0, {})
    return entry, written


def _never(folder: Path) -> Any:
    raise AssertionError("a memory that the bank holds already is not written again")


def probe_memory(base: Base, written: Written, style: PromptStyle, config: DistillConfig) -> dict[str, Any]:
    """Held-out questions and general prompts, with the entropy of the first answer token under adapter and base."""
    probes: dict[str, Any] = {"marker": config.marker}
    held = [q.text for q in written.held_out]
    general = [q.text for q in general_questions(style, CALIBRATION_PROMPTS, calibration=True)]
    prompts = [ask_tokens(base.tokenizer, style, q) for q in [*held, *general]]
    under = first_entropies(base, prompts, written.adapter, config.marker)
    plain = first_entropies(base, prompts, None, config.marker)
    rows = [
        {"question": q, "entropy": float(h), "base_entropy": float(h0)}
        for q, h, h0 in zip([*held, *general], under, plain, strict=True)
    ]
    return {**probes, "held_out": rows[: len(held)], "general": rows[len(held) :]}


def calibrate(base: Base, bank: Bank, namespace: str = DEFAULT_NAMESPACE) -> Gate | None:
    """Set the namespace's gate from its memories' own probes; None (and no gate) where there are none."""
    return _calibrate(bank, namespace, base.id, base.tokenizer.template_id)


def recalibrate(bank: Bank, namespace: str = DEFAULT_NAMESPACE) -> Gate | None:
    """Set the gate anew after a memory has gone, for the base and template that it was for; None where there was none."""
    record = bank.record(GATE, namespace)
    return None if record is None else _calibrate(bank, namespace, record.value["base_id"], record.value["template_id"])


def _calibrate(bank: Bank, namespace: str, base_id: str, template_id: str) -> Gate | None:
    asked: list[float] = []
    general: list[float] = []
    for entry in bank.list(namespace, limit=CALIBRATION_MEMORIES):
        probes = bank.questions(entry.name, namespace)
        if probes:
            asked += [row["entropy"] for row in probes["held_out"]]
            general += [row["entropy"] for row in probes["general"]]
    if not asked or not general:
        bank.delete_record(GATE, namespace)
        return None
    threshold, accuracy = best_threshold(asked, general)
    version = bank.namespace_version(namespace)
    gate = Gate(threshold, accuracy, len(asked), len(general), base_id, template_id, version)
    bank.set_record(GATE, dataclasses.asdict(gate), namespace)
    return gate


def read_gate(base: Base, bank: Bank, namespace: str = DEFAULT_NAMESPACE) -> Gate | None:
    """The namespace's gate for this base, or None where it has not been calibrated; BaseMismatchError for another's."""
    record = bank.record(GATE, namespace)
    return None if record is None else Gate(**record.value).check(base)
