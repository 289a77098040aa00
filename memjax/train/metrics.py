"""Where the numbers of a run go: JSON lines always, TensorBoard and wandb on request, a progress bar for people."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from memjax.errors import ConfigError, DataError

WRITERS = ("tensorboard", "wandb")


class Writer(Protocol):
    """What `Recorder` asks of a writer."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Recorder:
    """Writes metrics of one run: `folder/metrics.jsonl` always, other writers as named.

    A line is a flat object with `step` and numbers; a number that is not finite is written as a string ("nan", "inf"),
    which plain JSON can hold. On resume, lines past `step` belong to a future that never happened: they are dropped.
    """

    def __init__(
        self, folder: Path, *, step: int = 0, writers: Sequence[str] = (), run: Mapping[str, Any] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(_plain(line)) + "\n" for line in kept), encoding="utf-8")
        os.replace(fresh, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._writers = [open_writer(name, folder, run or {}) for name in writers]

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line and hands the numbers among `values` to the other writers."""
        self._file.write(json.dumps(_plain({"step": step, **values})) + "\n")
        self._file.flush()
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        for writer in self._writers:
            writer.write(step, numbers)

    def close(self) -> None:
        self._file.close()
        for writer in self._writers:
            writer.close()


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, oldest first; a last line that a killed process left half-written is ignored.

    Raises DataError for any other line that is not a JSON object with `step`.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            value = json.loads(line)
            value["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):  # no newline after it: the write was cut off
                break
            raise DataError(f'{path}, line {number}: not a JSON object with "step"; mend or delete the line') from None
        found.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in value.items()})
    return found


def open_writer(name: str, folder: Path, run: Mapping[str, Any]) -> Writer:
    """The writer called `name`; its library is an extra and imported only here. Raises ConfigError without it."""
    if name not in WRITERS:
        raise ConfigError(f"writers names {name!r}; known: {', '.join(WRITERS)}")
    try:
        return _TensorBoard(folder) if name == "tensorboard" else _Wandb(folder, run)
    except ImportError:
        package = {"tensorboard": "tensorboardX", "wandb": "wandb"}[name]
        raise ConfigError(f"writer {name!r} needs the package {package}: pip install {package}") from None


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter  # writes event files without TensorFlow

        self._writer = SummaryWriter(logdir=str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        import wandb

        # One id per folder, so that a resumed run continues its own curve.
        id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(dir=str(folder), id=id, name=folder.name, project="memjax", config=dict(run), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def count_tokens(batch: Any) -> int:
    """How many tokens a batch holds, without touching the device: non-padding ones where `segments` is a host array.

    A batch without `tokens` counts 0, and no rate is shown for it.
    """
    if not isinstance(batch, Mapping):
        return 0
    segments = batch.get("segments")
    if isinstance(segments, np.ndarray):
        return int(np.count_nonzero(segments))
    return int(np.size(batch["tokens"])) if "tokens" in batch else 0


class Bar:
    """A progress bar with loss, tokens/s and the time left; silent when the output is not a terminal or notebook."""

    def __init__(self, name: str, total: int, *, start: int = 0, show: bool | None = None) -> None:
        console = Console(stderr=True)
        self.shown = (console.is_terminal or console.is_jupyter) if show is None else show
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.shown,
        )
        self._task = self._progress.add_task(name, total=total, completed=start, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        if self.shown:
            self._progress.advance(self._task)

    def note(self, values: Mapping[str, Any]) -> None:
        """Shows loss and tokens/s of the last window."""
        if self.shown:
            parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
            if values.get("tokens_per_second"):
                parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
            self._progress.update(self._task, note="  ".join(parts))
