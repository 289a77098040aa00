"""Checkpoints of a run through Orbax: written in the background, found again when complete, restored onto any mesh.

A checkpoint is a folder `<step>/` with four items: `trained` (the parameters), `optimizer`, `data` (the position in the
data, JSON) and `config` (JSON). Orbax writes into a temporary folder and renames it when all items are complete, so a
process killed while saving leaves nothing under a step's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

from memjax.errors import TrainingError
from memjax.sharding import shardings as table_shardings

ARRAYS = ("trained", "optimizer")
RECORDS = ("data", "config")
ITEMS = ARRAYS + RECORDS
FOLDER = "checkpoints"
# What Orbax raises for files that are damaged, missing or of another structure.
READ_ERRORS = (ValueError, KeyError, TypeError, OSError, AttributeError)


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last`, and the best by `best` (a metric name) where that is set."""

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ) -> None:
        self.folder = epath.Path(folder).resolve()
        self._best, self._best_mode = best, best_mode
        _set_aside_incomplete(self.folder)
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(keep_last)]
        worst = math.inf if best_mode == "min" else -math.inf
        if best is not None:
            keep.append(policies.BestN(get_metric_fn=lambda m: m.get(best, worst), reverse=best_mode == "min", n=1))
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                **{item: ocp.StandardCheckpointHandler() for item in ARRAYS},
                **{item: ocp.JsonCheckpointHandler() for item in RECORDS},
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # Decides nothing beside a preservation policy, but without it Orbax does not write the metrics.
                best_fn=None if best is None else lambda m: m.get(best, worst),
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        step: int,
        *,
        trained: Any,
        optimizer: Any,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing the checkpoint of `step`. Arrays are copied before it returns and may be donated at once."""
        save = ocp.args
        self._manager.save(
            step,
            args=save.Composite(
                trained=save.StandardSave(trained),
                optimizer=save.StandardSave(optimizer),
                data=save.JsonSave(dict(data)),
                config=save.JsonSave(dict(config)),
            ),
            metrics=dict(metrics or {}),
            force=True,
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """(step, value) of the best checkpoint, None when no kept checkpoint was evaluated."""
        if self._best is None:
            return None
        found = [(step, self._manager.metrics(step)) for step in self._manager.all_steps()]
        scored = [(step, metrics[self._best]) for step, metrics in found if metrics and self._best in metrics]
        pick = min if self._best_mode == "min" else max
        return pick(scored, key=lambda pair: pair[1], default=None)

    def restore(self, step: int, *, trained: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
        """(trained, optimizer, data, config) of `step`; arrays land as the given trees say (shape, dtype, sharding).

        Raises TrainingError when the checkpoint does not fit those trees or cannot be read.
        """
        load = ocp.args
        targets = {"trained": trained, "optimizer": optimizer}
        try:
            found = self._manager.restore(
                step,
                args=load.Composite(
                    **{item: load.StandardRestore(abstract(tree)) for item, tree in targets.items()},
                    data=load.JsonRestore(),
                    config=load.JsonRestore(),
                ),
            )
        except READ_ERRORS as error:
            raise _unusable(self.folder / str(step), error) from error
        return found["trained"], found["optimizer"], found["data"], found["config"]

    def preempted(self, step: int) -> bool:
        """Whether the cluster asked all processes to stop after this step (always False with one process)."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self.wait()
        self._manager.close()


def abstract(tree: Any) -> Any:
    """The tree as restore targets: shape, dtype and sharding of every leaf (arrays or ShapeDtypeStructs)."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def is_complete(path: str | Path | epath.Path) -> bool:
    """Whether a step's folder is a finished checkpoint with all of its items."""
    path = epath.Path(path)
    if not path.is_dir() or not ocp.path.step.is_path_finalized(path):
        return False
    markers = dict.fromkeys(ARRAYS, "_METADATA") | dict.fromkeys(RECORDS, "metadata")
    return all((path / item / marker).exists() for item, marker in markers.items())


def latest_complete(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's folder (or in its `checkpoints/`), as a path; None without one."""
    root = Path(folder)
    if (root / FOLDER).is_dir():
        root = root / FOLDER
    if not root.is_dir():
        return None
    steps = sorted((int(path.name) for path in root.iterdir() if path.name.isdigit()), reverse=True)
    return next((root / str(step) for step in steps if is_complete(root / str(step))), None)


def start_of(start: str | None, out: str | Path, resume: bool) -> str | None:
    """What a run begins from: `start`, or None where it goes on from a checkpoint in `out`, which holds its parameters."""
    return None if resume and latest_complete(out) is not None else start


def _set_aside_incomplete(folder: epath.Path) -> None:
    """Renames step folders that lack an item (an interrupted copy, say): Orbax would take them for checkpoints."""
    if not folder.exists() or jax.process_index() != 0:
        return
    for path in folder.iterdir():
        if path.name.isdigit() and not is_complete(path):
            aside = path.parent / f"{path.name}.incomplete"
            if aside.exists():
                aside.rmtree()
            path.rename(aside)


def find_step(path: str | Path) -> epath.Path:
    """The checkpoint that `path` means: itself if it is one, else the newest complete one of the run in that folder.

    Raises TrainingError when there is none.
    """
    path = Path(path).resolve()
    if is_complete(path):
        return epath.Path(path)
    found = latest_complete(path)
    if found is None:
        what = "no such folder" if not path.is_dir() else "holds no complete checkpoint"
        raise TrainingError(f"{path}: {what}; give the folder of a run, or one of its checkpoints/<step> folders")
    return epath.Path(found)


def restore(
    path: str | Path,
    *,
    item: Literal["trained", "optimizer", "data", "config"] = "trained",
    mesh: jax.sharding.Mesh | None = None,
    shardings: Any | None = None,
    target: Any | None = None,
) -> Any:
    """One item of a checkpoint, on any mesh, however it was sharded when saved.

    path: a run's folder (its newest complete checkpoint is taken) or one checkpoint.
    target: a tree of arrays or ShapeDtypeStructs; the result has its structure, dtypes and shardings. Without it the
        saved structure is read: dicts (of a dataclass, its fields) and lists.
    mesh, shardings: without a target, where the leaves go: a tree of shardings; or on the mesh, where `memjax.sharding`
        says for a base's parameters and what is named like them (an optimizer's moments), and on all of its devices for
        the rest. Neither puts everything on the first device.
    Raises TrainingError when there is no complete checkpoint or it does not fit the target.
    """
    if item not in ITEMS:
        raise TrainingError(f"item={item!r} is not in a checkpoint; there are {', '.join(ITEMS)}")
    folder = find_step(path) / item
    if item in RECORDS:
        return _read(folder, lambda: ocp.JsonCheckpointHandler().restore(folder))
    reader = ocp.StandardCheckpointHandler()
    try:
        if target is None:
            target = _placed(_read(folder, lambda: reader.metadata(folder).tree), mesh, shardings)
        return _read(folder, lambda: reader.restore(folder, args=ocp.args.StandardRestore(abstract(target))))
    finally:
        reader.close()


def _read(folder: epath.Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except READ_ERRORS as error:
        raise _unusable(folder, error) from error


def _placed(saved: Any, mesh: jax.sharding.Mesh | None, places: Any | None) -> Any:
    """The saved structure as restore targets (see `restore`)."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
    if places is None and mesh is not None:
        places = table_shardings(shapes, "params", mesh, strict=False)
    elif places is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: first, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def _unusable(path: epath.Path, error: Exception) -> TrainingError:
    reason = " ".join(str(error).split())
    return TrainingError(
        f"{path}: cannot be restored ({reason[:300] or type(error).__name__}); "
        "use the configuration it was trained with, or delete this checkpoint to fall back to the one before"
    )
