"""Accuracy against bytes: text, kept caches, compiled buffers and adapters of the same documents on one axis.

What is counted is what a reader must hold of a document besides the base while it answers: keys and values of so many
tokens, with an indexer's keys and a latent memory's state where a policy has them, or an adapter's factors, all at the
bytes a number of the base's cache takes. What every reading prompt holds, its header and question, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from memjax.evaluate.corpora import Item
from memjax.evaluate.ruler_evict import FULL, EvictRuler, answers, places
from memjax.evaluate.ruler_evict import Item as Asked
from memjax.evaluate.subjects import Query
from memjax.models.base import Base
from memjax.models.decoder import site_shapes
from memjax.write.distill import DistillConfig
from memjax.write.prompts import PromptStyle
from memjax.write.reading import split_prompts

KIB = 1024


def shares_at(ratios: Sequence[float]) -> tuple[float, ...]:
    """The shares removed that leave one token of so many, for caches as large as buffers of these ratios."""
    return tuple(round(1 - 1 / ratio, 4) for ratio in ratios)


def ask_evicted(
    base: Base,
    texts: Mapping[str, str],
    items: Sequence[Item],
    evict: EvictRuler,
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[str]]:
    """{`full`, "policy/share": what the base says to each item} behind what the policies keep of its text, without sight of
    the question; see `ruler_evict.answers`."""
    return answers(base, [Asked(Query(i.question, texts[i.name]), (), max_tokens) for i in items], evict, progress)


def held_bytes(
    base: Base,
    style: PromptStyle,
    texts: Mapping[str, str],
    ratios: Sequence[float],
    ranks: Sequence[int] = (),
    distil: DistillConfig = DistillConfig(),
    evict: EvictRuler | None = None,
) -> dict[str, list[float]]:
    """{bytes/COLUMN: of each document} of `full`, `tokens-RATIO` (a buffer, the text's beginning, SnapKV's tokens),
    `adapter-RANK` and "policy/share"."""
    number = base.params["embed"].dtype.itemsize
    shape = base.config
    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * number
    sizes = [len(split_prompts(base.tokenizer, style, text).context) for text in texts.values()]
    made: dict[str, list[float]] = {f"bytes/{FULL}": [float(size * token) for size in sizes]}
    for ratio in ratios:
        made[f"bytes/tokens-{ratio:g}"] = [float(math.ceil(size / ratio) * token) for size in sizes]
    for rank in ranks:
        wide = sum(sum(dims) for site, dims in site_shapes(shape).items() if site in distil.sites)
        made[f"bytes/adapter-{rank}"] = [float(rank * wide * shape.num_layers * number)] * len(sizes)
    for size in sizes if evict else ():
        assert evict is not None
        for key, share in places(evict, size, base).items():
            made.setdefault(f"bytes/{key.removeprefix('places/')}", []).append(share * size * token)
    return made


def curves(
    methods: Mapping[str, Sequence[str]], ratios: Sequence[float], ranks: Sequence[int], evict: EvictRuler | None
) -> dict[str, list[tuple[str, str]]]:
    """{what the picture calls it: [(column of bytes, column of right), ...]}; methods: {way of compiling: its columns}."""
    tokens = [f"tokens-{ratio:g}" for ratio in ratios]
    lines = {name: list(zip(tokens, columns, strict=True)) for name, columns in methods.items()}
    lines["beginning of the text"] = [(at, f"truncated-{ratio:g}") for at, ratio in zip(tokens, ratios, strict=True)]
    if ranks:
        lines["adapter"] = [(f"adapter-{rank}", f"adapter-{rank}") for rank in ranks]
    for column in evict.columns if evict else ():
        lines.setdefault(column.rpartition("/")[0], []).append((column, column))
    return lines


def draw_bytes(path: Path, numbers: Mapping[str, float], lines: Mapping[str, Sequence[tuple[str, str]]]) -> Path:
    """Draws right by bytes (KiB), a line for each kind of memory, between no context and all of the text, into the PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    marks = ("o", "s", "^", "v", "D", "P", "X", "*")
    for number, (label, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: numbers[f"bytes/{point[0]}"])
        x = np.asarray([numbers[f"bytes/{at}"] for at, _ in points]) / KIB
        kept = "/" in points[0][1]  # by a policy
        axes.plot(
            x,
            [numbers[f"right/{column}"] for _, column in points],
            marker=marks[number % len(marks)],
            markersize=4,
            color=f"C{number % 10}",
            linestyle="-" if number < 10 else "--",
            linewidth=1.0 if kept else 2.2,
            label=label,
        )
    for column, line, label in ((FULL, "--", "all of the text"), ("none", ":", "no context")):
        axes.axhline(numbers[f"right/{column}"], linestyle=line, color="gray", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("KiB held of a document")
    axes.set_ylabel("right")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path)
    return path
