"""Whether to use a memory at all: rules over what a probe tells of a candidate (arXiv 2605.28889, self-gating).

The paper's rule is the entropy of the first answer token under the adapter. The others are of our own making, and one of
them, probe, is the default; each is one number per candidate, and the gate opens where it lies below a threshold calibrated
by balanced accuracy:

    entropy        H_adapter, the paper's
    difference     H_adapter - H_base: how much surer the adapter is than the base
    kl             -KL(adapter || base): how far the adapter moves the first token; replay has taught it to leave the base
                   as it is on whatever is not about its text
    probe          minus a weighted sum of these three (`PROBE_FEATURES`), fitted by logistic regression
    mean_entropy   the mean of the first few answer tokens' entropies
    logistic       the same of `FEATURES`, among them what retrieval thinks of the candidate
    none           the router's score of no memory, minus that of the chosen one (see `route`)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import BankError, BaseMismatchError, ConfigError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Adapter, Slots, as_slots
from memjax.memory.buffer import Buffer
from memjax.memory.cache import Cache
from memjax.models.base import Base
from memjax.models.buffers import buffer_prefix, read_buffer
from memjax.models.decoder import Model, Params, empty_cache, forward, unembed
from memjax.models.generate import bucket, prefill, read_prefix, read_prompts
from memjax.sharding import fetch

ROWS = 32  # prompts probed at once while calibrating: one program for the probes of one memory
TOKENS = 4  # first answer tokens that `mean_entropy` looks at
PROBE_RULES = ("entropy", "difference", "kl", "probe")  # what a memory's own stored probes suffice for
RULES = (*PROBE_RULES, "mean_entropy", "logistic", "none")
# Entropy opens for general prompts that the base itself is sure of, KL stays shut where the base's guess is near the
# memory's answer; of what stored probes suffice for, their sum parts 24 countries from school questions best
# (configs/distill.md; the logistic rule is better still, and needs an engine).
DEFAULT_RULE = "probe"
PROBE_FEATURES = ("entropy", "base_entropy", "kl")
FEATURES = ("entropy", "base_entropy", "margin", "score", "gap", "kl")
_WEIGHED = {"probe": PROBE_FEATURES, "logistic": FEATURES}


@dataclasses.dataclass(frozen=True)
class Signals:
    """What a probe tells of the chosen candidate, in nats unless said otherwise.

    entropy, base_entropy: of the first answer token under the adapter and under the base; margin: by how much the log of
    the likeliest token's probability leads; kl: KL(adapter || base) of that token; score, gap: the best retrieval score
    and its lead over the second (in the retriever's own units); mean_entropy: over the first `TOKENS` answer tokens; none:
    the router's score of no memory minus that of the candidate. None: not known here.
    """

    entropy: float
    base_entropy: float
    margin: float | None = None
    kl: float | None = None
    score: float | None = None
    gap: float | None = None
    mean_entropy: float | None = None
    none: float | None = None


@dataclasses.dataclass(frozen=True)
class Gate:
    """A threshold and what it was calibrated on: it means nothing for another base or template.

    balanced_accuracy: mean share of held-out questions below and of general prompts above it; questions, general: counts;
    bank_version: of the namespace, then; weights: of the features, for the rules `probe` and `logistic` only.
    """

    threshold: float
    balanced_accuracy: float
    questions: int
    general: int
    base_id: str
    template_id: str
    bank_version: int
    rule: str = "entropy"
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))  # a list, where it comes from JSON
        check_rule(self.rule)
        if len(self.weights) != len(_WEIGHED.get(self.rule, ())):
            raise BankError(f"the gate's rule {self.rule!r} has {len(self.weights)} weights; calibrate it again")

    def check(self, base: Base) -> Gate:
        """This gate, or BaseMismatchError where it was calibrated for another base or prompt template."""
        if self.base_id != base.id:
            raise BaseMismatchError(
                f"the gate was calibrated for base {self.base_id[:12]}, not {base.id[:12]}; calibrate it again"
            )
        if self.template_id != base.tokenizer.template_id:
            raise BaseMismatchError("the gate was calibrated with another prompt template; calibrate it again")
        return self

    def value(self, signals: Signals) -> float | None:
        """The number that is compared with the threshold; None where the signals do not hold what the rule looks at."""
        return rule_value(self.rule, signals, self.weights)

    def opens(self, signals: Signals) -> bool:
        """Whether the memory is used."""
        value = self.value(signals)
        return value is not None and value < self.threshold


def check_rule(rule: str) -> None:
    """ConfigError, with the rules that there are, for another."""
    if rule not in RULES:
        raise ConfigError(f"gate rule {rule!r} is unknown; use one of {', '.join(RULES)}")


def rule_value(rule: str, signals: Signals, weights: Sequence[float] = ()) -> float | None:
    """What a rule makes of a candidate's signals: the lower, the likelier the memory is fit. None where one is missing."""
    if rule == "difference":
        return signals.entropy - signals.base_entropy
    if rule == "kl":
        return None if signals.kl is None else -signals.kl
    if rule in _WEIGHED:
        features = rule_features(rule, signals)
        return None if features is None else -float(np.dot(features, weights))
    return getattr(signals, rule)


def tells(rule: str, signals: Signals) -> bool:
    """Whether the signals hold what a rule looks at."""
    return rule_value(rule, signals, [0.0] * len(_WEIGHED.get(rule, ()))) is not None


def rule_features(rule: str, signals: Signals) -> np.ndarray | None:
    """float64 [F] of what the rule `probe` or `logistic` weighs, in its order; None where one is not known."""
    found = [getattr(signals, name) for name in _WEIGHED[rule]]
    return None if None in found else np.asarray(found, np.float64)


def fit_gate(
    rule: str, asked: Sequence[Signals], general: Sequence[Signals], base_id: str, template_id: str, bank_version: int
) -> Gate:
    """The gate of a rule that best parts held-out questions from general prompts.

    ConfigError for an unknown rule, BankError where there is nothing of one kind that holds what the rule looks at.
    """
    check_rule(rule)
    weights: tuple[float, ...] = ()
    if rule in _WEIGHED:
        left, right = ([f for s in signals if (f := rule_features(rule, s)) is not None] for signals in (asked, general))
        if not left or not right:
            raise BankError(f"the gate rule {rule!r} needs probed questions and general prompts; write a memory first")
        weights = tuple(float(w) for w in fit_logistic(np.stack(left), np.stack(right)))
    values = [[v for s in signals if (v := rule_value(rule, s, weights)) is not None] for signals in (asked, general)]
    threshold, accuracy = best_threshold(*values)
    counts = (len(values[0]), len(values[1]))
    return Gate(threshold, accuracy, *counts, base_id, template_id, bank_version, rule, weights)


def fit_logistic(asked: np.ndarray, general: np.ndarray, penalty: float = 1e-2, steps: int = 50) -> np.ndarray:
    """Weights float64 [F] of raw features [n, F] by logistic regression, both kinds weighing alike; no bias: the
    threshold takes its place.

    Newton's method on z-scored features with a ridge penalty, so that separable data have finite weights.
    """
    both = np.concatenate([asked, general])
    mean, deviation = both.mean(axis=0), both.std(axis=0)
    deviation = np.where(deviation > 1e-9, deviation, 1.0)
    x = np.concatenate([(both - mean) / deviation, np.ones((len(both), 1))], axis=1)
    y = np.concatenate([np.ones(len(asked)), np.zeros(len(general))])
    share = np.concatenate([np.full(len(asked), 0.5 / len(asked)), np.full(len(general), 0.5 / len(general))])
    ridge = penalty * np.eye(x.shape[1])
    w = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        gradient = x.T @ (share * (p - y)) + ridge @ w
        curvature = (x * (share * p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(curvature, gradient)
        w = w - step
        if np.abs(step).max() < 1e-8:
            break
    return w[:-1] / deviation


def best_threshold(questions: Sequence[float], general: Sequence[float]) -> tuple[float, float]:
    """(threshold, balanced accuracy): the value below which most held-out questions and fewest general prompts lie.

    A dozen questions are too few to believe each: the threshold is best where both kinds are blurred by a logistic kernel
    of Silverman's width (the kernel estimate of Youden's cut-off, Fluss et al. 2005, Biometrical Journal 47). The accuracy
    is that of the values themselves.
    """
    if not len(questions) or not len(general):
        raise BankError("the gate needs held-out questions and general prompts to calibrate on; write a memory first")
    asked, other = np.sort(np.asarray(questions, np.float64)), np.sort(np.asarray(general, np.float64))
    low, high = min(asked[0], other[0]), max(asked[-1], other[-1])
    edges = np.unique(np.concatenate([asked, other, np.linspace(low, high, 512)]))
    cuts = np.concatenate([[low - 0.5], (edges[:-1] + edges[1:]) / 2, [high + 0.5]])
    blurred = _share_below(asked, cuts, high - low) - _share_below(other, cuts, high - low)
    best = np.flatnonzero(np.isclose(blurred, blurred.max(), atol=1e-6))
    threshold = float(cuts[best].mean())  # of equally good ones, far from either kind, the middle
    opened, closed = (asked < threshold).mean(), (other >= threshold).mean()
    return threshold, float((opened + closed) / 2)


def _share_below(values: np.ndarray, cuts: np.ndarray, extent: float) -> np.ndarray:
    """How much of the values, each blurred, lies below each cut [C]; extent: the smallest width is a share of it."""
    middle = np.subtract(*np.percentile(values, (75, 25))) / 1.34
    spread = min(values.std(), middle) or values.std()
    width = max(0.9 * spread * len(values) ** -0.2, 2e-3 * extent, 1e-9)
    return (0.5 + 0.5 * np.tanh((cuts[:, None] - values) * (np.pi / 12**0.5 / width))).mean(axis=1)


# --------------------------------------------------------------------------------------------------- what a probe tells


class Ahead(NamedTuple):
    """Of the first few greedy answer tokens: their mean entropy float32 [B] in nats, and themselves int32 [B, count], -1
    behind the end of an answer."""

    entropy: jax.Array
    tokens: jax.Array


class First(NamedTuple):
    """Of the first answer token's logits, each float32 [...]: entropy, margin and KL to the base's, as in `Signals`; token:
    the likeliest one, int32 [...]."""

    entropy: jax.Array
    margin: jax.Array
    kl: jax.Array
    token: jax.Array


@jax.jit
def entropy(logits: jax.Array) -> jax.Array:
    """Entropy [...] in nats, float32, of softmax(logits [..., V]): logsumexp(z) - sum softmax(z) z."""
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - (jax.nn.softmax(logits, axis=-1) * logits).sum(axis=-1)


@jax.jit
def first_token(logits: jax.Array, base: jax.Array) -> First:
    """What logits [..., V] of the first answer token tell, beside the base's own [..., V] or [V]; float32."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    logq = jax.nn.log_softmax(base.astype(jnp.float32), axis=-1)
    top = jax.lax.top_k(logp, 2)[0]
    kl = (jnp.exp(logp) * (logp - logq)).sum(axis=-1)
    return First(entropy(logits), top[..., 0] - top[..., 1], kl, logits.argmax(axis=-1).astype(jnp.int32))


@partial(jax.jit, static_argnums=0, static_argnames="count")
def read_ahead(
    model: Model,
    params: Params,
    hidden: jax.Array,
    positions: jax.Array,
    cache: Cache,
    stops: jax.Array,
    segments: Sequence[Segment] = (),
    slots: Slots | None = None,
    slot_ids: jax.Array | None = None,
    *,
    count: int = TOKENS,
) -> Ahead:
    """The first `count` greedy answer tokens and their mean entropy, fewer where an answer ends.

    hidden [B, D] of the last prompt token; positions int32 [B] that the first answer token takes; cache: of what was read
    beside the segments, with room for `count` - 1 tokens. It is not donated: whoever decodes afterwards still needs it.
    """

    def step(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], jax.Array]:
        hidden, position, going, total, read, cache = carry
        logits = unembed(model, params, hidden)
        token = logits.argmax(axis=-1).astype(jnp.int32)
        total = total + jnp.where(going, entropy(logits), 0.0)
        read = read + going
        going = going & ~(token[:, None] == stops[None, :]).any(axis=1)
        said = jnp.where(going, token, -1)
        at = jnp.where(going, position, -1)[:, None]
        out = forward(model, params, token[:, None], at, cache, segments=segments, slots=slots, slot_ids=slot_ids)
        return (out.hidden[:, 0], position + 1, going, total, read, out.cache), said

    zeros = jnp.zeros(hidden.shape[0], jnp.float32)
    begin = (hidden, positions, jnp.ones(hidden.shape[0], bool), zeros, zeros, cache)
    (_, _, _, total, read, _), said = jax.lax.scan(step, begin, None, length=count)
    return Ahead(total / read, said.T)


def probe_prompts(base: Base, prompts: Sequence[Sequence[int]], adapter: Adapter, marker: int) -> list[dict[str, float]]:
    """The signals of each prompt that need one adapter and no bank: {entropy, base_entropy, margin, kl}.

    As when answering, all but the last `marker` tokens of a prompt are read by the base.
    """
    model, params = base.model, base.params
    slots = as_slots(adapter)
    off = dataclasses.replace(slots, scale=jnp.zeros_like(slots.scale))  # the base, by the same compiled program
    found = []
    for begin in range(0, len(prompts), ROWS):
        part = prompts[begin : begin + ROWS]
        _, read, lengths = read_prompts(model, params, [p[:-marker] for p in part], 0)
        segment = Segment(read.k, read.v, read.position)
        ids = np.zeros((len(lengths), marker), np.int32)
        ids[: len(part)] = [p[-marker:] for p in part]
        positions = np.where(lengths[:, None] > 0, lengths[:, None] + np.arange(marker), -1).astype(np.int32)
        tail = lambda rows=len(lengths): empty_cache(base.config, rows, bucket(marker), params["embed"])
        plain, _ = prefill(model, params, ids, positions, tail(), (segment,), off)
        hidden, _ = prefill(model, params, ids, positions, tail(), (segment,), slots)
        found.append(_signals(base, hidden, plain))
    return _by_prompt(found, len(prompts))


def probe_buffer(
    base: Base, prompts: Sequence[Sequence[int]], header: Sequence[int], buffer: Buffer, tails: Sequence[Sequence[int]]
) -> list[dict[str, float]]:
    """`probe_prompts` of a buffer: the base reads `tails` behind header and buffer, and `prompts` without either."""
    model, params = base.model, base.params
    prefix = buffer_prefix(read_prefix(model, params, header).segment, *read_buffer(base.config, buffer))
    found = []
    for begin in range(0, len(prompts), ROWS):
        part = slice(begin, begin + ROWS)
        plain = read_prompts(model, params, prompts[part], 0)[0]
        found.append(_signals(base, read_prompts(model, params, tails[part], 0, prefix)[0], plain))
    return _by_prompt(found, len(prompts))


def _signals(base: Base, hidden: jax.Array, plain: jax.Array) -> dict[str, np.ndarray]:
    """What the states [B, D] that the first answer token is predicted from tell, with a memory and without."""
    logits, alone = (unembed(base.model, base.params, x) for x in (hidden, plain))
    told = {**first_token(logits, alone)._asdict(), "base_entropy": entropy(alone)}
    return fetch(told)


def _by_prompt(found: Sequence[Mapping[str, np.ndarray]], count: int) -> list[dict[str, float]]:
    return [{name: float(value[row % ROWS]) for name, value in found[row // ROWS].items()} for row in range(count)]
