"""Training an indexer: a frozen base reads lessons, and all layers learn at once what each attends to (2605.25475)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from memjax.config import to_dict
from memjax.errors import ConfigError
from memjax.evaluate.lessons import LessonConfig, LessonSource, lessons_at, open_lessons, validation_lessons
from memjax.evict.files import INDEXER, save_indexer
from memjax.evict.indexer import IndexerConfig, init_indexer
from memjax.evict.indexer_loss import RECALLS, Target, Teacher, compare, indexer_loss
from memjax.sharding import MeshConfig, build_mesh, fetch
from memjax.train.base import load
from memjax.train.fit import FitConfig, Fitted, fit
from memjax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class IndexerTraining:
    """A training run. base: path or name; target: what is compared; shape: index heads and their size, None for the
    paper's; validation: batches of the validation world that are scored at every evaluation; dtype of the stored values;
    mesh: how the base and the rows of a batch lie on several devices, each of which holds the indexer.

    The schedule is the paper's WSD in shape: a warm-up, a stable half, a decaying half to 7.5e-6 of 1e-3.
    """

    base: str = "tiny"
    data: LessonConfig = dataclasses.field(default_factory=LessonConfig)
    target: Target = dataclasses.field(default_factory=Target)
    shape: IndexerConfig | None = None
    validation: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    fit: FitConfig = dataclasses.field(
        default_factory=lambda: FitConfig(
            steps=4100,
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="wsd", warmup=100, decay=0.49, final=0.0075),
        )
    )
    mesh: MeshConfig | None = None

    def __post_init__(self) -> None:
        if self.validation < 1:
            raise ConfigError(f"validation is {self.validation}; give at least one batch")


def train_indexer(
    config: IndexerTraining, out: str | Path, *, resume: bool = False, progress: bool | None = None
) -> Fitted:
    """Trains an indexer and leaves it in `out`/indexer, beside checkpoints/, metrics.jsonl and loss.png."""
    out = Path(out)
    base = load(config.base, mesh=build_mesh(config.mesh) if config.mesh else None)
    source = open_lessons(base, config.data)
    shape = config.shape or IndexerConfig.of(base.config)
    params = init_indexer(base.config, shape, jax.random.key(config.fit.seed))
    teacher = Teacher(base.params, base.model, config.target)
    fitted = fit(
        jax.tree_util.Partial(indexer_loss, teacher),
        params,
        lambda step: lessons_at(source, step),
        config.fit,
        out=out,
        resume=resume,
        evaluate=checks(source, teacher, config.validation),
        progress=progress,
        name="indexer",
        run={"indexer": to_dict(config)},
    )
    trained = fetch(fitted.params)
    if jax.process_index() == 0:
        save_indexer(out / INDEXER, trained, shape, base, {"config": to_dict(config), "metrics": fitted.told}, config.dtype)
    return fitted


def checks(source: LessonSource, teacher: Teacher, batches: int) -> Callable[[Any], Mapping[str, float]]:
    """A function params -> {kl, recall_10, …} on documents of the validation world, as the policy will judge them: by the
    text's last queries, whatever the indexer is trained with."""
    deployed = dataclasses.replace(teacher, target=dataclasses.replace(teacher.target, judges="window"))
    sets = validation_lessons(source, batches)
    score = jax.jit(compare)

    def scores(params: Any) -> Mapping[str, float]:
        made = [fetch(score(deployed, params, batch)) for batch in sets]
        kl = float(np.mean([kl for kl, _ in made]))
        shares = np.mean([share for _, share in made], axis=(0, 2, 3))
        return {"kl": kl, **{f"recall_{100 * at:g}": float(x) for at, x in zip(RECALLS, shares, strict=True)}}

    return scores
