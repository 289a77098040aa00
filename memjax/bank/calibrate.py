"""The gate of a namespace: calibrated on its memories' stored probes, kept as a record, set anew when the bank changes."""

from __future__ import annotations

import dataclasses
from typing import Any

from memjax.bank.gate import (
    DEFAULT_RULE,
    PROBE_RULES,
    Gate,
    Signals,
    check_rule,
    fit_gate,
    probe_buffer,
    probe_prompts,
    tells,
)
from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.errors import ConfigError
from memjax.memory.buffer import Buffer
from memjax.models.base import Base
from memjax.write.distill import Written, general_questions
from memjax.write.prompts import PromptStyle, ask_tokens
from memjax.write.reading import header_tokens, tail_tokens

GATE = "gate"
CALIBRATION_PROMPTS = 16  # general prompts that each memory is probed with
CALIBRATION_MEMORIES = 64  # memories whose probes the namespace's threshold is set by
CHANGED_SHARE = 0.1  # of the memories added or changed since, from which on the gate is set anew


def probe_memory(base: Base, written: Written, style: PromptStyle, marker: int = 1) -> dict[str, Any]:
    """Held-out questions and general prompts, with what a probe of memory and base tells (see `gate.Signals`).

    marker: prompt tokens that are read with an adapter; nothing to a buffer.
    """
    held = [q.text for q in written.held_out]
    asked = [*held, *(q.text for q in general_questions(style, CALIBRATION_PROMPTS, calibration=True))]
    prompts = [ask_tokens(base.tokenizer, style, question) for question in asked]
    if isinstance(written.artefact, Buffer):
        tails = [tail_tokens(base.tokenizer, style, question) for question in asked]
        told = probe_buffer(base, prompts, header_tokens(base.tokenizer, style), written.artefact, tails)
    else:
        told = probe_prompts(base, prompts, written.artefact, marker)
    rows = [{"question": q, **signals} for q, signals in zip(asked, told, strict=True)]
    return {"marker": marker, "held_out": rows[: len(held)], "general": rows[len(held) :]}


def calibrate(
    base: Base, bank: Bank, namespace: str = DEFAULT_NAMESPACE, rule: str | None = None, share: float = 0.0
) -> Gate | None:
    """Set the namespace's gate from its memories' own probes; None (and no gate) where there are none.

    rule: one of `PROBE_RULES`; by default that of the present gate, or `DEFAULT_RULE` where it needs more than the probes
    (an engine: see `serve.learn`). share: leave a gate as it is while fewer memories than this share have
    changed since it was set, so that the cost of adding does not grow with the bank. ConfigError for any other rule.
    """
    if rule is not None and rule not in PROBE_RULES:
        check_rule(rule)
        raise ConfigError(
            f"gate rule {rule!r} needs more than the probes that memories keep; set it with: "
            f"memjax train router BANK --gate {rule}"
        )
    held = bank.record(GATE, namespace)
    if held is not None and not held.stale and rule in (None, held.value.get("rule", "entropy")):
        gate = Gate(**held.value)
        same = gate.base_id == base.id and gate.template_id == base.tokenizer.template_id
        changed = bank.namespace_version(namespace) - gate.bank_version
        if same and changed < share * bank.count(namespace):
            return gate
    return _calibrate(bank, namespace, base.id, base.tokenizer.template_id, rule)


def recalibrate(bank: Bank, namespace: str = DEFAULT_NAMESPACE) -> Gate | None:
    """Set the gate anew after a memory has gone, for the base and template that it was for; None where there was none."""
    record = bank.record(GATE, namespace)
    return None if record is None else _calibrate(bank, namespace, record.value["base_id"], record.value["template_id"])


def _calibrate(bank: Bank, namespace: str, base_id: str, template_id: str, rule: str | None = None) -> Gate | None:
    given = rule
    if rule is None:
        held = bank.record(GATE, namespace)
        rule = held.value.get("rule", "entropy") if held else DEFAULT_RULE
        rule = rule if rule in PROBE_RULES else DEFAULT_RULE
    asked: list[Signals] = []
    general: list[Signals] = []
    for entry in bank.list(namespace, limit=CALIBRATION_MEMORIES):
        probes = bank.questions(entry.name, namespace)
        if probes:
            asked += [stored_signals(row) for row in probes["held_out"]]
            general += [stored_signals(row) for row in probes["general"]]
    if not asked or not general:
        bank.delete_record(GATE, namespace)
        return None
    if given is None and not all(tells(rule, signals) for signals in (*asked, *general)):
        rule = "entropy"  # probes of memories written before the rule was known
    gate = fit_gate(rule, asked, general, base_id, template_id, bank.namespace_version(namespace))
    keep_gate(bank, gate, namespace)
    return gate


def stored_signals(row: dict[str, Any]) -> Signals:
    """The signals of a stored probe."""
    return Signals(**{name: row[name] for name in ("entropy", "base_entropy", "margin", "kl") if name in row})


def keep_gate(bank: Bank, gate: Gate, namespace: str = DEFAULT_NAMESPACE) -> None:
    """Make this the namespace's gate."""
    bank.set_record(GATE, dataclasses.asdict(gate), namespace)


def read_gate(base: Base, bank: Bank, namespace: str = DEFAULT_NAMESPACE) -> Gate | None:
    """The namespace's gate for this base, or None where it has not been calibrated; BaseMismatchError for another's."""
    record = bank.record(GATE, namespace)
    return None if record is None else Gate(**record.value).check(base)
