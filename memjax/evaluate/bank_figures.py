"""The pictures of the bank's experiment: entropies that the gate sees, and accuracy against size of bank and of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def entropy_histograms(path: Path, entropies: Mapping[str, Sequence[float]], threshold: float | None = None) -> Path:
    """Draws a panel per reader ("adapter", "base", "in context") of first-token entropies in nats, in the bank against
    general, into the PNG at `path` (arXiv 2605.28889, Figure 4). Keys of `entropies`: "READER, KIND"; threshold: of the
    gate's rule `entropy`.
    """
    from matplotlib.figure import Figure  # the object interface: no global figure, no display

    readers = list(dict.fromkeys(key.split(", ")[0] for key in entropies))
    top = max((max(values, default=0.0) for values in entropies.values()), default=1.0)
    edges = np.linspace(0, max(top, 0.1), 31)
    figure = Figure(figsize=(3.6 * len(readers), 3), dpi=120, layout="constrained")
    for axes, reader in zip(figure.subplots(1, len(readers), squeeze=False, sharey=True)[0], readers, strict=True):
        for key, values in entropies.items():
            if key.split(", ")[0] == reader:
                share = np.full(len(values), 1 / max(len(values), 1))
                axes.hist(values, edges, weights=share, alpha=0.6, label=key.split(", ")[1])
        if threshold is not None and reader == "adapter":
            axes.axvline(threshold, color="black", linewidth=1, linestyle="--", label="the entropy rule")
        axes.set_title(reader, fontsize=10)
        axes.set_xlabel("entropy of the first token, nats")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("share of questions")
    figure.savefig(path)
    return path


def accuracy_by_size(path: Path, numbers: Mapping[str, float], ceiling: float | None = None) -> Path:
    """Draws the share of right answers over the size of the bank, from the keys "accuracy_at/N", into the PNG at `path`."""
    from matplotlib.figure import Figure

    points = sorted((int(key.split("/")[1]), value) for key, value in numbers.items() if _is_size(key))
    figure = Figure(figsize=(4.2, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([n for n, _ in points], [value for _, value in points], marker="o", label="retrieval@3")
    if ceiling is not None:
        axes.axhline(ceiling, color="grey", linewidth=1, linestyle="--", label="right memory, all questions")
    axes.set_xscale("log", base=2)
    axes.set_xticks([n for n, _ in points], [str(n) for n, _ in points])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("memories in the bank")
    axes.set_ylabel("share of right answers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    return path


def accuracy_by_bytes(path: Path, points: Mapping[str, tuple[float, float]]) -> Path:
    """Draws {way of keeping a document: (bytes, share of right answers)} into the PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, (size, accuracy) in points.items():
        axes.scatter([size], [accuracy], s=30)
        axes.annotate(name, (size, accuracy), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1)
    axes.margins(x=0.2)
    axes.set_xlabel("bytes per document")
    axes.set_ylabel("share of right answers")
    axes.grid(alpha=0.3)
    figure.savefig(path)
    return path


def _is_size(key: str) -> bool:
    return key.startswith("accuracy_at/") and key.split("/")[1].isdigit()
