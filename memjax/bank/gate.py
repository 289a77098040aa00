"""Whether to use a memory at all: the entropy of the first answer token under it (arXiv 2605.28889, self-gating)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import BankError, BaseMismatchError
from memjax.memory.adapter import Adapter, as_slots
from memjax.models.base import Base
from memjax.models.decoder import unembed
from memjax.models.generate import prefill, read_prompts

ROWS = 16  # prompts probed at once while calibrating


@dataclasses.dataclass(frozen=True)
class Gate:
    """A threshold in nats and what it was calibrated on: it means nothing for another base or template.

    balanced_accuracy: mean share of held-out questions below and of general prompts above it; questions, general: counts.
    """

    threshold: float
    balanced_accuracy: float
    questions: int
    general: int
    base_id: str
    template_id: str
    bank_version: int

    def check(self, base: Base) -> Gate:
        """This gate, or BaseMismatchError where it was calibrated for another base or prompt template."""
        if self.base_id != base.id:
            raise BaseMismatchError(
                f"the gate was calibrated for base {self.base_id[:12]}, not {base.id[:12]}; calibrate it again"
            )
        if self.template_id != base.tokenizer.template_id:
            raise BaseMismatchError("the gate was calibrated with another prompt template; calibrate it again")
        return self


@jax.jit
def entropy(logits: jax.Array) -> jax.Array:
    """Entropy [...] in nats, float32, of softmax(logits [..., V]): logsumexp(z) - sum softmax(z) z."""
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - (jax.nn.softmax(logits, axis=-1) * logits).sum(axis=-1)


def first_entropies(base: Base, prompts: Sequence[Sequence[int]], adapter: Adapter | None, marker: int) -> np.ndarray:
    """Entropy [n] of the first answer token of each prompt: all but its last `marker` tokens are read by the base."""
    found = []
    slots = None if adapter is None else as_slots(adapter)
    for begin in range(0, len(prompts), ROWS):
        part = prompts[begin : begin + ROWS]
        _, cache, lengths = read_prompts(base.model, base.params, [p[:-marker] for p in part], marker)
        ids = np.zeros((len(lengths), marker), np.int32)
        ids[: len(part)] = [p[-marker:] for p in part]
        positions = np.where(lengths[:, None] > 0, lengths[:, None] + np.arange(marker), -1).astype(np.int32)
        hidden, _ = prefill(base.model, base.params, ids, positions, cache, (), slots)
        found.append(np.asarray(entropy(unembed(base.model, base.params, hidden)))[: len(part)])
    return np.concatenate(found)


def best_threshold(questions: Sequence[float], general: Sequence[float]) -> tuple[float, float]:
    """(threshold, balanced accuracy): the value below which most held-out questions and fewest general prompts lie.

    Between equally good values the middle of the widest run of them is taken, so that neither side sits on the edge.
    """
    if not len(questions) or not len(general):
        raise BankError("the gate needs held-out questions and general prompts to calibrate on; write a memory first")
    asked, other = np.sort(np.asarray(questions, np.float64)), np.sort(np.asarray(general, np.float64))
    edges = np.unique(np.concatenate([asked, other]))
    cuts = np.concatenate([[edges[0] - 0.5], (edges[:-1] + edges[1:]) / 2, [edges[-1] + 0.5]])
    opened = np.searchsorted(asked, cuts) / len(asked)
    closed = 1 - np.searchsorted(other, cuts) / len(other)
    accuracy = (opened + closed) / 2
    best = np.flatnonzero(np.isclose(accuracy, accuracy.max()))
    runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    bounds = np.concatenate([[cuts[0]], edges, [cuts[-1]]])
    widest = max(runs, key=lambda run: bounds[run[-1] + 1] - bounds[run[0]])
    return float((bounds[widest[0]] + bounds[widest[-1] + 1]) / 2), float(accuracy.max())
