"""What an evaluation leaves behind: result.json with its numbers and setting, tables for people, pictures as PNG."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from memjax import __version__
from memjax.errors import DataError
from memjax.evaluate.metrics import over_items, over_seeds
from memjax.models.base import Base

RESULT = "result.json"
WIDE = 4  # columns with intervals that a terminal of 80 characters has room for
Numbers = dict[str, float]


def summarize(runs: Sequence[Mapping[str, Sequence[float]]]) -> Numbers:
    """Flat numbers of one run per seed, each {key: score of each item}.

    `key` is the mean, `key_low` and `key_high` its 95 % interval: over seeds, or over items (bootstrap) where there is one
    seed; `key_items` counts items of all seeds. DataError where the runs differ in their keys or a key has no items.
    """
    numbers: Numbers = {}
    for key in runs[0]:
        scores = [run.get(key, ()) for run in runs]
        if not all(len(s) for s in scores):
            raise DataError(f"{key}: a seed has no items; raise --limit or leave it out")
        mean = over_items(scores[0]) if len(runs) == 1 else over_seeds([float(np.mean(s)) for s in scores])
        numbers |= {key: mean.mean, f"{key}_low": mean.low, f"{key}_high": mean.high}
        numbers[f"{key}_items"] = sum(len(s) for s in scores)
    return numbers


def setting(base: Base | None = None, **sizes: Any) -> dict[str, Any]:
    """Versions, hardware, the base's name and id, and whatever seeds, sizes and options the caller names."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    known = {} if base is None else {"base": base.name, "base_id": base.id, "tokenizer_id": base.tokenizer.id}
    return {
        "versions": {"memjax": __version__, "python": platform.python_version(), **versions},
        "hardware": hardware(),
        **known,
        **sizes,
    }


def hardware() -> str:
    """The devices and the processor, in words."""
    devices = jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{len(devices)} x {jax.default_backend()} ({kinds}); {_processor()}, {cores} cores, {platform.system()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def write_result(out: str | Path, numbers: Mapping[str, float], setting: Mapping[str, Any]) -> Path:
    """Writes OUT/result.json, whole or not at all: numbers and `setting`. DataError for a number that is not finite."""
    wrong = [key for key, value in numbers.items() if not np.isfinite(value)]
    if wrong or "setting" in numbers:
        raise DataError(f"result: {', '.join(wrong) or 'setting'} is no finite number; nothing is written")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {key: value if isinstance(value, int) else float(value) for key, value in numbers.items()}
    text = json.dumps({**flat, "setting": setting}, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{RESULT}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / RESULT)
    except BaseException:
        os.unlink(temporary)
        raise
    return folder / RESULT


def score_table(title: str, numbers: Mapping[str, float], rows: Sequence[str], columns: Sequence[str] = ("",)) -> Table:
    """Means with their intervals: the number of row r and column c has the key "r/c", or r alone in a column called "".

    More columns than a narrow terminal holds, and than there are rows, are printed as rows instead.
    """

    def key(row: str, column: str) -> str:
        return f"{row}/{column}" if column else row

    held = [row for row in rows if any(key(row, column) in numbers for column in columns)]
    items = {row: next(numbers[f"{k}_items"] for column in columns if (k := key(row, column)) in numbers) for row in held}
    if len(columns) > max(WIDE, len(held)):
        table = Table("", *held, title=title)
        for column in columns:
            table.add_row(column, *(_cell(numbers, key(row, column)) for row in held))
        table.add_row("items", *(f"{items[row]:.0f}" for row in held))
        return table
    table = Table("", *(column or "score" for column in columns), "items", title=title)
    for row in held:
        table.add_row(row, *(_cell(numbers, key(row, column)) for column in columns), f"{items[row]:.0f}")
    return table


def _cell(numbers: Mapping[str, float], key: str) -> str:
    if key not in numbers:
        return "-"
    low, high = numbers[f"{key}_low"], numbers[f"{key}_high"]
    return f"{numbers[key]:.3f} [dim]({low:.3f} … {high:.3f})[/dim]" if low < high else f"{numbers[key]:.3f}"


_ACROSS = 3  # panels beside one another


def heat_map(path: Path, panels: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str]) -> Path:
    """Draws one panel per name, of values [len(rows), len(columns)] in 0 … 1, into the PNG at `path`."""
    from matplotlib.figure import Figure  # the object interface: no global figure, no display

    across = min(len(panels), _ACROSS)
    down = -(-len(panels) // across)
    size = (max(2.2 + 0.55 * len(columns), 4) * across, max(1.4 + 0.32 * len(rows), 3) * down)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    places = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, (name, values) in zip(places, panels.items(), strict=False):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for r, c in np.ndindex(values.shape):
            axes.text(c, r, f"{values[r, c]:.2f}", ha="center", va="center", fontsize=6)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth")
        axes.set_title(f"{name}, lowest {np.min(values):.2f}", fontsize=9)
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    figure.savefig(path)
    return path


def bars(path: Path, numbers: Mapping[str, float], rows: Sequence[str], columns: Sequence[str], title: str = "") -> Path:
    """Draws the numbers of "row/column" with their intervals as bars, grouped by row, into the PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5, 0.7 * len(rows) + 2), 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(columns)
    for place, column in enumerate(columns):
        keys = [f"{row}/{column}" for row in rows]
        means = np.asarray([numbers[key] for key in keys])
        below = [numbers[key] - numbers[f"{key}_low"] for key in keys]
        above = [numbers[f"{key}_high"] - numbers[key] for key in keys]
        at = np.arange(len(rows)) - 0.4 + width * (place + 0.5)
        axes.bar(at, means, width, yerr=[below, above], label=column, capsize=2, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(rows)), rows, rotation=45, ha="right", fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.grid(axis="y", alpha=0.3)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path)
    return path
