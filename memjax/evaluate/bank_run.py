"""The bank's experiment from its parts: seeds, numbers, the figures it is judged by, and pictures."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memjax.bank.gate import DEFAULT_RULE, entropy
from memjax.config import to_dict
from memjax.errors import DataError
from memjax.evaluate import bank_figures
from memjax.evaluate.bank import (
    RECALL,
    BankConfig,
    Bench,
    kept,
    main_numbers,
    near_numbers,
    run_main,
    run_near,
    run_sizes,
)
from memjax.evaluate.bank_ablate import run_ablations
from memjax.evaluate.bank_merge import run_merge
from memjax.evaluate.bank_scale import run_scale
from memjax.evaluate.bank_share import first_token_ratio, run_share, train_speedup
from memjax.evaluate.corpora import Corpus
from memjax.evaluate.report import RESULT, setting, summarize
from memjax.evaluate.subjects import Query, query_tokens
from memjax.evaluate.writers import check_jobs
from memjax.models.base import Base
from memjax.models.decoder import unembed
from memjax.models.encoder import Encoder
from memjax.models.generate import read_prompts
from memjax.write.distill import DistillConfig
from memjax.write.prompts import PromptStyle

PARTS = ("main", "near", "sizes", "merge", "share", "ablations", "speed", "scale")
SHARED = 8  # documents of the part `share`
ROWS = 16


def run_bank(
    base: Base,
    style: PromptStyle,
    recipe: DistillConfig,
    config: BankConfig,
    out: Path,
    *,
    corpus: Corpus | None = None,
    seeds: Sequence[int] = (0,),
    parts: Sequence[str] = ("main", "near", "sizes"),
    sizes: Sequence[int] = (1, 1_000, 100_000),
    encoder: Encoder | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    jobs: int = 1,
) -> dict[str, Any]:
    """{numbers, headline, entropies, setting} of the parts, over seeds where a part has any; corpus: the invented world;
    jobs: how many processes write memories side by side.

    Numbers of parts that were run into `out` before, and are not run now, are taken over from its result.json if it is of
    the same base and sizes.
    """
    began = time.perf_counter()
    told = setting(base, config=to_dict(config), recipe=dataclasses.asdict(recipe), seeds=list(seeds))
    corpus = corpus or config.world()
    told["corpus"] = corpus.name
    told["encoder"] = None if encoder is None else encoder.id
    numbers = _earlier(out, told)
    headline: list[str] = []
    entropies: dict[str, list[float]] = {}
    check_jobs(jobs)
    given = (base, style, recipe, config, corpus)
    benches = {seed: Bench(*given, out / f"seed-{seed}", encoder, progress, jobs, corpus.drawn(seed)) for seed in seeds}
    if "main" in parts:
        runs, extras = zip(*(run_main(bench, seed) for seed, bench in benches.items()), strict=True)
        numbers |= summarize(runs)
        numbers |= main_numbers(numbers)
        headline += [f"recall/{k}" for k in RECALL]
        headline += [key for key in main_numbers(numbers) if "/" not in key]
        for key in extras[0]["bytes"]:
            numbers[key] = float(np.mean([extra["bytes"][key] for extra in extras]))
        if extras[0]["learned"]["router"]:
            for key in ("accuracy", "accuracy_retrieval"):
                numbers[f"router_validation_{key}"] = float(np.mean([e["learned"]["router"][key] for e in extras]))
        first = next(iter(benches.values()))
        entropies = {**extras[0]["entropies"], **_in_context_entropies(first, seeds[0])}
        told["gate_rule"], told["gates"] = DEFAULT_RULE, extras[0]["learned"]["gates"]
    if "near" in parts:
        if corpus.name != "world":
            raise DataError("near duplicates are drawn from the invented world; leave the part near out")
        numbers |= summarize([run_near(bench, seed) for seed, bench in benches.items()])
        found = near_numbers(numbers)
        numbers |= found
        headline += list(found)
    if "sizes" in parts:
        for bench in benches.values():
            if not (bench.folder / "bank").exists():
                raise DataError(f"{bench.folder} holds no bank yet; run the part main first, or both")
        each = [run_sizes(bench, seed) for seed, bench in benches.items()]
        numbers |= {key: float(np.mean([run[key] for run in each])) for key in each[0]}
    if "merge" in parts:
        numbers |= summarize([run_merge(bench, seed) for seed, bench in benches.items()])
    if "ablations" in parts:
        seed, bench = next(iter(benches.items()))
        scores, seconds = run_ablations(bench, seed)
        numbers |= {**summarize([scores]), **seconds}
    if "share" in parts:
        runs = [_share_run(bench, seed) for seed, bench in benches.items()]
        numbers |= summarize(runs)
        headline += ["share_trained", "share_untrained"]
    if "speed" in parts:
        numbers |= {**first_token_ratio(), **train_speedup()}
        headline += ["ttft_share_ratio", "train_speedup"]
    if "scale" in parts:
        numbers |= run_scale(base, style, out / "scale", sizes, progress)
        told["sizes"] = list(sizes)
        headline.append("ask_growth")
    numbers["seconds"] = time.perf_counter() - began
    return {"numbers": numbers, "headline": headline, "entropies": entropies, "setting": told}


def draw_figures(out: Path, found: Mapping[str, Any]) -> list[Path]:
    """The pictures of what was found, into OUT: entropies.png, sizes.png, bytes.png; those that there are numbers for."""
    numbers, made = found["numbers"], []
    out.mkdir(parents=True, exist_ok=True)
    if found["entropies"]:
        gate = found["setting"].get("gates", {}).get("entropy")
        threshold = gate["threshold"] if gate else None
        made.append(bank_figures.entropy_histograms(out / "entropies.png", found["entropies"], threshold))
    if any(key.startswith("accuracy_at/") for key in numbers):
        made.append(bank_figures.accuracy_by_size(out / "sizes.png", numbers, numbers.get("right/oracle")))
    if "bytes_adapter" in numbers:
        points = {
            "text": (numbers["bytes_text"], numbers["right/in_context"]),
            "plain cache": (numbers["bytes_cache"], numbers["right/in_context"]),
            "adapter": (numbers["bytes_adapter"], numbers["right/oracle"]),
        }
        made.append(bank_figures.accuracy_by_bytes(out / "bytes.png", points))
    return made


def _share_run(bench: Bench, seed: int) -> dict[str, list[float]]:
    texts = dict(list(bench.corpus.texts(seed).items())[:SHARED])
    items = [item for item in bench.corpus.items(seed) if item.name in texts]
    return run_share(bench, texts, items)


def _in_context_entropies(bench: Bench, seed: int) -> dict[str, list[float]]:
    """First-token entropies of the base with a document in the prompt: its own for test questions, any for general ones."""
    texts, items = bench.corpus.texts(seed), bench.corpus.items(seed)
    names = list(texts)
    general = [item.question for item in bench.corpus.general(seed)]
    queries = {
        "in context, in the bank": [Query(item.question, texts[item.name]) for item in items],
        "in context, general": [Query(q, texts[names[n % len(names)]]) for n, q in enumerate(general)],
    }

    def make() -> dict[str, list[float]]:
        base, made = bench.base, {}
        for key, asked in queries.items():
            prompts = [query_tokens(base, bench.style, query) for query in asked]
            prompts = [p for p in prompts if len(p) <= base.config.max_positions]
            found: list[float] = []
            for begin in range(0, len(prompts), ROWS):
                part = prompts[begin : begin + ROWS]
                hidden, _, _ = read_prompts(base.model, base.params, part, 0)
                found += [float(x) for x in np.asarray(entropy(unembed(base.model, base.params, hidden)))[: len(part)]]
                bench.progress(key, len(found), len(prompts))
            made[key] = found
        return made

    return kept(bench, "entropies-in_context", seed, make)


def _earlier(out: Path, told: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an earlier run into the same folder, if it is of the same base, seeds, sizes and recipe."""
    try:
        held = json.loads((out / RESULT).read_text())
        same = all(
            held["setting"].get(k) == json.loads(json.dumps(told[k]))
            for k in ("base_id", "config", "corpus", "recipe", "seeds", "encoder")
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
    return {key: value for key, value in held.items() if key != "setting"} if same else {}
