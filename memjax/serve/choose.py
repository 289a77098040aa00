"""Route and gate over what a probe told: which candidate, and whether to use it at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from memjax.bank.gate import Gate, Signals
from memjax.bank.route import Router, none_features, router_features

ROUTES = ("auto", "retrieval", "entropy", "router")
_HOW = {"retrieval": "best by retrieval", "entropy": "of lowest entropy", "router": "best by the router"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A memory that was probed: its retrieval score, what the first answer token under it tells (see `gate.Signals`), the
    router's score where there is a router, and the gate's value where there is a gate that knows enough to give one.

    mean_entropy, said: of its first few greedy answer tokens, where these were read: they themselves, -1 behind the end.
    abstains: the answer begins as the style's abstention does.
    """

    name: str
    id: str
    score: float
    entropy: float
    margin: float = 0.0
    kl: float = 0.0
    mean_entropy: float | None = None
    said: tuple[int, ...] | None = None
    abstains: bool = False
    route: float | None = None
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Observed:
    """A question's candidates without a choice among them: what routers and gates are made from.

    states float32 [1 + n, D]: hidden states that the first answer token is predicted from, the base's first; none: the
    router's score of no memory, where it knows one.
    """

    candidates: tuple[Candidate, ...]
    base_entropy: float
    states: np.ndarray
    none: float | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was decided before the first token was given out.

    memory: the name read from, None where the base answers alone; reason: why; entropy: of the first token under the best
    candidate; rule, value, threshold: the gate's, None where none is calibrated; it opens where value < threshold.
    """

    memory: str | None
    reason: str
    entropy: float | None
    threshold: float | None
    base_entropy: float
    candidates: tuple[Candidate, ...]
    damaged: tuple[str, ...] = ()
    rule: str | None = None
    value: float | None = None


def router_rows(seen: Observed, none: bool) -> np.ndarray:
    """Features float32 [n, F] of the candidates for a router, and of no memory as one row more where there is `none`."""
    scores = [c.score for c in seen.candidates]
    rows = router_features(scores, [c.entropy for c in seen.candidates], seen.states[1:])
    if not none:
        return rows
    return np.concatenate([rows, none_features(max(scores), seen.base_entropy, seen.states[0])])


def with_router(seen: Observed, router: Router | None) -> Observed:
    """The same with the router's scores."""
    if router is None or not seen.candidates:
        return seen
    found = [float(x) for x in router.scores(router_rows(seen, router.none))]
    candidates = [dataclasses.replace(c, route=s) for c, s in zip(seen.candidates, found, strict=False)]
    return dataclasses.replace(seen, candidates=tuple(candidates), none=found[-1] if router.none else None)


def pick(candidates: Sequence[Candidate], how: str) -> int:
    """The index of the best candidate by `retrieval`, `entropy` or `router`; the first of equals but for what follows.

    If it abstains, the best of those takes its place that do not and that retrieval thinks as much of: near duplicates of
    the text that is asked about. Others, which may merely invent an answer, do not. By retrieval, among several in which it
    found equally much, the lowest entropy decides (arXiv 2605.28889, entropy selection).
    """
    keys = {
        "retrieval": lambda c: c.score,
        "entropy": lambda c: -c.entropy,
        "router": lambda c: c.score if c.route is None else c.route,
    }
    best = max(range(len(candidates)), key=lambda i: keys[how](candidates[i]))
    score = candidates[best].score
    torn = how == "retrieval" and score > 0
    if not torn and not candidates[best].abstains:
        return best
    equal = [i for i, c in enumerate(candidates) if not c.abstains and abs(c.score - score) <= 1e-6 * abs(score)]
    return max(equal, key=lambda i: keys["entropy" if torn else how](candidates[i]), default=best)


def signals_of(seen: Observed, index: int) -> Signals:
    """What is known of a candidate, for a gate."""
    chosen = seen.candidates[index]
    scores = sorted((c.score for c in seen.candidates), reverse=True)
    return Signals(
        chosen.entropy,
        seen.base_entropy,
        chosen.margin,
        chosen.kl,
        scores[0],
        scores[0] - (scores[1] if len(scores) > 1 else 0.0),
        chosen.mean_entropy,
        None if seen.none is None or chosen.route is None else seen.none - chosen.route,
    )


def choose(
    seen: Observed,
    how: str,
    gate: Gate | None,
    *,
    named: bool = False,
    use_gate: bool = True,
    damaged: tuple[str, ...] = (),
    mean_entropy: Callable[[int], float] | None = None,
) -> tuple[Choice, int | None]:
    """(choice, index of the candidate to read from, None for the base alone).

    how: the route; named: the caller named the one candidate, which needs no gate. mean_entropy(index): reads a few tokens
    ahead with a candidate, for the gate's rule that looks at them.
    """
    if not seen.candidates:
        return Choice(None, "the bank has no memory for this", None, None, seen.base_entropy, (), damaged), None
    best = pick(seen.candidates, how)
    if gate is not None and gate.rule == "mean_entropy" and mean_entropy and not named:
        ahead = dataclasses.replace(seen.candidates[best], mean_entropy=mean_entropy(best))
        seen = dataclasses.replace(seen, candidates=(*seen.candidates[:best], ahead, *seen.candidates[best + 1 :]))
    if gate is not None:
        valued = [dataclasses.replace(c, value=gate.value(signals_of(seen, i))) for i, c in enumerate(seen.candidates)]
        seen = dataclasses.replace(seen, candidates=tuple(valued))
    chosen = seen.candidates[best]
    opened = True
    if named:
        reason = "named by the caller"
    elif not use_gate:
        reason = f"{_HOW[how]}; the gate is off"
    elif gate is None:
        reason = f"{_HOW[how]}; no gate has been calibrated"
    elif chosen.value is None:
        opened, reason = False, f"the gate's rule {gate.rule!r} needs a router that the bank does not have"
    elif chosen.value < gate.threshold:
        reason = f"{_HOW[how]}, and sure enough for the gate"
    else:
        opened, reason = False, "no memory is sure enough for the gate"
    told = (
        gate.threshold if gate else None,
        seen.base_entropy,
        seen.candidates,
        damaged,
        gate.rule if gate else None,
        chosen.value,
    )
    return Choice(chosen.name if opened else None, reason, chosen.entropy, *told), best if opened else None
