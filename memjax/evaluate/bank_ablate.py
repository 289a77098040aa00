"""What the recipe's parts are worth: the same documents written in other ways, one thing changed at a time.

As arXiv 2605.28889 does for rank, questions, sites and the keep-term; each way is judged by its answers about the documents
and by what it does to general questions when nothing gates it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memjax.bank.store import open_bank
from memjax.errors import DataError
from memjax.evaluate.bank import Bench, Scores, kept, write_bank
from memjax.evaluate.corpora import Item
from memjax.memory.files import read_manifest
from memjax.models.generate import Sampling
from memjax.write.distill import DistillConfig

DOCUMENTS = 8
GENERAL = 40
RANKS = (4, 8, 16, 32, 64)
QUESTIONS = (25, 100, 400)
MARKERS = (1, 2, 4)
KINDS = ("asked", "turned", "cloze", "continued")


def variants(recipe: DistillConfig) -> dict[str, DistillConfig]:
    """{what is different: recipe}, the recipe itself first, as "default"."""
    change = functools.partial(dataclasses.replace, recipe)
    made = {"default": recipe}
    made |= {f"rank {rank}": change(rank=rank, alpha=recipe.alpha / recipe.rank * rank) for rank in RANKS}
    total = sum(getattr(recipe, kind) for kind in KINDS)
    made |= {
        f"questions {count}": change(
            **{kind: round(getattr(recipe, kind) * count / total) for kind in (*KINDS, "reworded")}
        )
        for count in QUESTIONS
    }
    made |= {"mlp only": change(sites=("gate", "up", "down")), "attention only": change(sites=("q", "k", "v", "o"))}
    answers = max(recipe.row_tokens // recipe.keep_tokens, 1)  # rows grow, so that a step holds as many answers
    made |= {
        f"marker {marker}": change(marker=marker, row_tokens=recipe.row_tokens + (marker - recipe.marker) * answers)
        for marker in MARKERS
    }
    made |= {"answers alike": change(alike=0), "asked once": change(reworded=0), "no keep-term": change(keep=0.0)}
    return {name: way for name, way in made.items() if name == "default" or way != recipe}


def run_ablations(bench: Bench, seed: int) -> tuple[Scores, dict[str, float]]:
    """({ablation/WAY: of each test question whether its own memory answers it, ablation_general/WAY: of each general
    question whether the best memory does, ungated}, {ablation_seconds/WAY: to write a document}) of the first documents."""
    texts = dict(list(bench.corpus.texts(seed).items())[:DOCUMENTS])
    items = [item for item in bench.corpus.items(seed) if item.name in texts]
    general = bench.corpus.general(seed)[:GENERAL]
    if not items or not general:
        raise DataError("ablations need test questions and general questions; ask for some of both")
    scores: Scores = {}
    seconds: dict[str, float] = {}
    for name, way in variants(bench.recipe).items():
        folder = bench.folder / "ablations" / re.sub(r"\W+", "-", name)
        own = dataclasses.replace(bench, recipe=way, folder=folder)
        folder.mkdir(parents=True, exist_ok=True)
        found = kept(own, "answers", seed, functools.partial(_ask, own, texts, items, general, name))
        scores[f"ablation/{name}"] = bench.corpus.right(found["said"], items)
        scores[f"ablation_general/{name}"] = bench.corpus.right(found["general"], general)
        seconds[f"ablation_seconds/{name}"] = float(found["seconds"])
    return scores, seconds


def _ask(
    bench: Bench, texts: Mapping[str, str], items: Sequence[Item], general: Sequence[Item], name: str
) -> dict[str, Any]:
    sampling = Sampling(max_tokens=bench.config.answer_tokens)
    with open_bank(bench.folder / "bank", create=True, base_id=bench.base.id, base_name=bench.base.name) as bank:
        write_bank(bench, bank, texts, f"writing, {name}")
        engine = bench.engine(bank, 1, "retrieval")
        said = [engine.ask(item.question, memory=item.name, sampling=sampling).text for item in items]
        loose = [engine.ask(item.question, gate=False, sampling=sampling).text for item in general]
        # Of the memories themselves, for an earlier run may have written them.
        told = [read_manifest(bank.folder(bank.get(document).id))["provenance"]["metrics"] for document in texts]
    took = [sum(metrics[f"seconds_{part}"] for part in ("questions", "teacher", "train")) for metrics in told]
    return {"said": said, "general": loose, "seconds": float(np.median(took))}
