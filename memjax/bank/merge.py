"""Several memories for one question: a vote over answers, a mixture of next tokens, or one adapter made of several.

The ladder of composition, from what keeps the memories apart to what does not (measured in arXiv 2603.01097: quality
falls with every memory merged, TIES falls least). The first two are pure functions for whoever decodes; the last makes a
new memory of the bank. What its parts held it keeps after they are deleted; `manage.parts_in` tells which do.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from memjax.bank.manage import MERGED
from memjax.bank.store import DEFAULT_NAMESPACE, Bank, Entry
from memjax.errors import ArtefactError, InputError
from memjax.memory.adapter import Adapter, recompress, ties, weighted_sum
from memjax.memory.files import Memory, Meta, read_artefact, write_artefact
from memjax.models.config import ModelConfig
from memjax.models.decoder import site_shapes
from memjax.models.weights import SITE_MODULES

WAYS = ("ties", "sum")


def vote(answers: Sequence[str], weights: Sequence[float] | None = None) -> tuple[int, float]:
    """(index of the answer to give, its share of the weight): answers that differ in case or punctuation count as one.

    answers, weights: one per memory, decoded over one shared prefix; weights, such as a softmax of router scores, are 1
    by default. Of the winning form the answer with the largest weight is given, of equal ones the first; so it is where
    forms are level. InputError where there are no answers, or the weights do not fit them.
    """
    weights = [1.0] * len(answers) if weights is None else list(weights)
    if not answers or len(weights) != len(answers) or min(weights) < 0 or sum(weights) <= 0:
        raise InputError(f"a vote needs answers and as many weights >= 0, not {len(answers)} and {weights}")
    forms = [" ".join(re.findall(r"\w+", answer.casefold())) for answer in answers]
    totals: dict[str, float] = {}
    for form, weight in zip(forms, weights, strict=True):
        totals[form] = totals.get(form, 0.0) + weight
    # max() takes the first of equal ones, and dicts keep the order of insertion.
    winner = max(totals, key=lambda form: totals[form])
    index = max((i for i, form in enumerate(forms) if form == winner), key=lambda i: weights[i])
    return index, totals[winner] / sum(weights)


@jax.jit
def mix_tokens(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Log-probabilities [V] of the mixture sum_k w_k softmax(logits_k): logits [G, V] of one next token, weights [G].

    The weights are normalised here; a weight of 0 leaves its row out. Float32, through log-sum-exp. Every row is then fed
    the one token that is drawn: G decode steps per token.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    weights = weights.astype(jnp.float32)
    share = jnp.where(weights > 0, jnp.log(weights / weights.sum()), -jnp.inf)
    return jax.nn.logsumexp(logp + share[:, None], axis=0)


def merge_adapters(
    adapters: Sequence[Adapter],
    way: str = "ties",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.2,
) -> tuple[Adapter, float]:
    """(one adapter, relative error of cutting it to `rank`) of several of the same base.

    way: "sum" adds the weighted deltas, exact before the cut; "ties" is TIES-Merging (`memory.adapter.ties`), which alone
    reads `density`. weights: 1 each for "sum" and 1/n each for "ties" by default. rank: that of the largest adapter by
    default, so that the result fits wherever they did. ArtefactError where they cannot be merged.
    """
    if way not in WAYS:
        raise InputError(f"{way!r} is no way to merge; choose one of {', '.join(WAYS)}")
    weights = [1.0 if way == "sum" else 1 / max(len(adapters), 1)] * len(adapters) if weights is None else list(weights)
    rank = rank or max((adapter.rank for adapter in adapters), default=1)
    if way == "ties":
        return ties(adapters, weights, density, rank)
    return recompress(weighted_sum(adapters, weights), rank)


def merge(
    bank: Bank,
    config: ModelConfig,
    names: Sequence[str],
    name: str,
    *,
    way: str = "ties",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.2,
    namespace: str = DEFAULT_NAMESPACE,
    metadata: dict[str, Any] | None = None,
) -> tuple[Entry, float]:
    """(entry of a new memory made of those named, relative error of its rank); the old ones stay as they are.

    config: of the bank's base. The new memory is retrieved by the texts of all its parts. It has no held-out questions, so
    the gate's calibration does not see it. Merging the same memories in the same way twice is one memory. BankError for
    unknown or taken names, ArtefactError for damaged files.
    """
    entries = [bank.get(each, namespace) for each in names]
    if len({entry.id for entry in entries}) < 2:
        raise InputError("a merge needs two different memories or more; name them")
    shapes = site_shapes(config)
    parts = [
        read_artefact(bank.folder(entry.id), shapes, config.num_layers, SITE_MODULES, base_id=bank.base_id)
        for entry in entries
    ]
    adapter, error = merge_adapters([Adapter(*part.artefact) for part in parts], way, weights, rank, density)
    meta = _merged_meta(parts, {"way": way, "weights": weights, "rank": adapter.rank}, error)
    if way == "ties":
        meta = dataclasses.replace(meta, recipe={**meta.recipe, "density": density})
    texts = [bank.text(each, namespace) for each in names]

    def write(folder: Path) -> Memory:
        return write_artefact(folder, adapter, SITE_MODULES, meta)

    text = "\n\n".join(text for text in texts if text) or None
    entry = bank.add(name, meta.key, write, namespace=namespace, text=text, metadata=metadata)
    record = bank.record(MERGED, namespace)
    known = record.value if record else {}
    bank.set_record(MERGED, {**known, entry.id: sorted({part.id for part in parts})}, namespace)
    return entry, error


def _merged_meta(parts: Sequence[Memory], recipe: dict[str, Any], error: float) -> Meta:
    """What a merged memory is identified by: the ids of its parts, in order, and how they were merged."""
    first = parts[0].provenance
    for part in parts[1:]:
        for field in ("tokenizer_id", "template_id"):
            if part.provenance[field] != first[field]:
                raise ArtefactError(
                    f"memories {parts[0].id[:12]} and {part.id[:12]} differ in {field}; they cannot be merged"
                )
    licences = dict.fromkeys(part.provenance["licence"] for part in parts if part.provenance["licence"])
    return Meta(
        base_id=first["base_id"],
        tokenizer_id=first["tokenizer_id"],
        template_id=first["template_id"],
        recipe={"writer": "merge", "parts": [part.id for part in parts], **recipe},
        base_name=first["base_name"],
        metrics={"rank_error": error},
        licence="; ".join(licences),
    )
