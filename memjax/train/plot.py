"""The picture of a run: loss against step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def loss_curve(lines: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> Path:
    """Draws training loss, evaluated losses and the learning rate of metrics `lines` into the PNG at `path`."""
    from matplotlib.figure import Figure  # the object interface: no global figure, no display

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key in sorted({key for line in lines for key in line if key == "loss" or key.endswith("/loss")}, reverse=True):
        points = [(line["step"], line[key]) for line in lines if key in line]
        marker = None if key == "loss" and len(points) > 1 else "o"
        axes.plot(*zip(*points, strict=True), label=key, marker=marker, linewidth=1.2, markersize=4)
    values = [line["loss"] for line in lines if "loss" in line]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if values:
        axes.legend(loc="upper right")
    rates = [(line["step"], line["learning_rate"]) for line in lines if "learning_rate" in line]
    if rates:
        right = axes.twinx()
        right.plot(*zip(*rates, strict=True), color="0.7", linewidth=0.8, linestyle="--")
        right.set_ylabel("learning rate (dashed)", color="0.5")
    figure.savefig(path)
    return path
