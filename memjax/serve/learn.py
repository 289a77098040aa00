"""What a bank learns about itself: a router and gates, from held-out synthetic questions as the engine sees them.

Every question goes through retrieval and probe as a user's would. Its memory is known, since it was made from that
memory's text and held out from its training. Nobody's real questions are used (arXiv 2605.28889, routing and gating).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from memjax.bank.calibrate import keep_gate
from memjax.bank.gate import Gate, Signals, check_rule, fit_gate
from memjax.bank.route import (
    ROUTER,
    Example,
    Router,
    RouterConfig,
    keep_router,
    train_router,
)
from memjax.errors import BankError
from memjax.serve.choose import Observed, pick, router_rows, signals_of, with_router
from memjax.serve.engine import Engine
from memjax.write.distill import general_questions
from memjax.write.prompts import abstain_tokens

MEMORIES = 256  # memories whose questions are used, evenly spread over the bank
QUESTIONS = 1024  # of theirs in all: each costs a probe of its candidates
GENERAL = 64  # general prompts, of those set aside for calibration
Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Seen:
    """A question as the engine sees it: `memory` is the id of the one it was made for, None for a general prompt."""

    question: str
    memory: str | None
    observed: Observed


def see_questions(
    engine: Engine,
    *,
    memories: int = MEMORIES,
    questions: int = QUESTIONS,
    general: int = GENERAL,
    progress: Progress = lambda done, total: None,
) -> list[Seen]:
    """Held-out questions of the namespace's memories and general prompts, each probed with its own candidates.

    At most `questions` of at most `memories` memories, evenly spread over both.
    BankError where no memory keeps questions, as imported and merged ones do not.
    """
    entries = _evenly(engine.bank.list(engine.namespace), memories)
    asked: list[tuple[str, str | None]] = []
    for entry in entries:
        held = (engine.bank.questions(entry.name, engine.namespace) or {}).get("held_out", ())
        asked += [(row["question"], entry.id) for row in _evenly(held, max(1, questions // len(entries)))]
    if not asked:
        raise BankError(f"no memory of bank {engine.bank.path} keeps held-out questions; write one with: memjax write FILE")
    asked += [(q.text, None) for q in general_questions(engine.style, general, calibration=True)]
    made = []
    for number, (question, memory) in enumerate(asked, start=1):
        made.append(Seen(question, memory, engine.observe(question, ahead=True)))
        progress(number, len(asked))
    return made


def _evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many of the items, evenly spread over them."""
    return items if len(items) <= most else [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)]


def router_examples(seen: Sequence[Seen], none: bool, abstain: Sequence[int] = ()) -> list[Example]:
    """The router's examples: questions whose memory is among several candidates; general prompts where there is `none`.

    Right is every candidate whose answer begins as the own memory's does. A question that more than half of them answer
    alike is left out: it asks for what the memories share, so it does not tell which to choose. So is one that the own
    memory does not know: its answer begins with the tokens `abstain`.
    """
    groups = {memory: number for number, memory in enumerate(dict.fromkeys(s.memory for s in seen if s.memory))}
    made = []
    for one in seen:
        candidates = one.observed.candidates
        if not candidates:
            continue
        if one.memory is None:
            if none:
                right = np.arange(len(candidates) + 1) == len(candidates)
                made.append(Example(router_rows(one.observed, none), right, -1))
            continue
        own = next((c for c in candidates if c.id == one.memory), None)
        if own is None or len(candidates) + none < 2 or (abstain and (own.said or ())[: len(abstain)] == tuple(abstain)):
            continue
        right = np.asarray([c is own or (c.said is not None and c.said == own.said) for c in candidates] + [False] * none)
        if right.sum() * 2 <= len(right):
            retrieved = pick(candidates, "retrieval")
            made.append(Example(router_rows(one.observed, none), right, groups[one.memory], retrieved))
    return made


def learn_router(
    engine: Engine, config: RouterConfig, seen: Sequence[Seen], *, out: str | None = None, progress: bool | None = None
) -> Router:
    """Train a router on what was seen; the namespace's from then on if it `helps`, else the namespace has none.

    BankError where too little was seen.
    """
    version = engine.bank.namespace_version(engine.namespace)
    examples = router_examples(seen, config.none, abstain_tokens(engine.base.tokenizer, engine.style))
    router = train_router(examples, config, engine.base, version, out=out, progress=progress)
    if router.helps:
        keep_router(engine.bank, router, engine.namespace)
    else:
        engine.bank.delete_record(ROUTER, engine.namespace)
    return router


def gate_signals(seen: Sequence[Seen], router: Router | None, how: str) -> tuple[list[Signals], list[Signals]]:
    """(of held-out questions, of general prompts): the signals of the candidate that the route picks.

    A question counts where the pick is its own memory: a gate is not asked to open for a wrong one.
    """
    asked: list[Signals] = []
    general: list[Signals] = []
    for one in seen:
        observed = with_router(one.observed, router)
        if not observed.candidates:
            continue
        best = pick(observed.candidates, how)
        if one.memory is None:
            general.append(signals_of(observed, best))
        elif observed.candidates[best].id == one.memory:
            asked.append(signals_of(observed, best))
    return asked, general


def learn_gate(engine: Engine, rule: str, seen: Sequence[Seen], router: Router | None = None, *, keep: bool = True) -> Gate:
    """Calibrate a gate of this rule on what was seen, and keep it as the namespace's; any rule, as against `calibrate`.

    router: the one that routes; none routes by retrieval. BankError where the rule needs a router with a "none" class and
    there is none.
    """
    check_rule(rule)
    if rule == "none" and (router is None or not router.none):
        raise BankError("the gate rule 'none' needs a router with that class: memjax train router BANK none=true")
    asked, general = gate_signals(seen, router, "retrieval" if router is None else "router")
    base, version = engine.base, engine.bank.namespace_version(engine.namespace)
    gate = fit_gate(rule, asked, general, base.id, base.tokenizer.template_id, version)
    if keep:
        keep_gate(engine.bank, gate, engine.namespace)
    return gate


def learned(router: Router, gate: Gate | None) -> dict[str, Any]:
    """What was learned, as plain values for a person or `--json`."""
    told: dict[str, Any] = {"router": dict(router.metrics), "none": router.none, "kept": router.helps}
    if gate is not None:
        told["gate"] = {"rule": gate.rule, "threshold": gate.threshold, "balanced_accuracy": gate.balanced_accuracy}
    return told
