"""Training a latent memory: what a policy evicts from lessons is to be given back (arXiv 2605.25475, stage two)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config import to_dict
from memjax.errors import ConfigError
from memjax.evaluate.lessons import LessonConfig, LessonSource, lessons_at, open_lessons, validation_lessons
from memjax.evict.files import LATENT, indexer_hash, load_indexer, save_memory
from memjax.evict.latent import init_memory
from memjax.evict.latent_loss import Evicting, explained, latent_loss
from memjax.evict.learned import Learned
from memjax.evict.policies import policy_named
from memjax.memory.latent import Rule
from memjax.models.base import Base
from memjax.sharding import MeshConfig, build_mesh, fetch
from memjax.train.base import load
from memjax.train.fit import FitConfig, Fitted, fit
from memjax.train.optimizer import OptimizerConfig

REMOVED = (0.5, 0.75, 0.9)  # shares at which the explained part is told


@dataclasses.dataclass(frozen=True)
class LatentTraining:
    """A training run. base: path or name; policy: whose evicted tokens it learns to hold, with the folder of its indexer;
    rule: how it is written and read; least, most: of each text a share between these is removed, in `events` parts;
    validation: batches of the validation world that are scored at every evaluation; dtype of the stored values; mesh: how
    the base and the rows of a batch lie on several devices, each of which holds the memory's parameters.
    """

    base: str = "tiny"
    policy: Literal["indexer", "snapkv"] = "indexer"
    indexer: str | None = None
    rule: Rule = dataclasses.field(default_factory=Rule)
    data: LessonConfig = dataclasses.field(default_factory=LessonConfig)
    least: float = 0.5
    most: float = 0.95
    events: int = 4
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
        if not 0 < self.least <= self.most < 1 or min(self.events, self.validation) < 1:
            raise ConfigError("least and most are shares between 0 and 1, in this order; events and validation at least 1")
        if (self.policy == "indexer") != bool(self.indexer):
            raise ConfigError("policy indexer, and no other, needs a trained indexer: give the folder with indexer=DIR")


def train_latent(config: LatentTraining, out: str | Path, *, resume: bool = False, progress: bool | None = None) -> Fitted:
    """Trains a latent memory and leaves it in `out`/latent, beside checkpoints/, metrics.jsonl and loss.png.

    Centroids have no parameters: nothing is trained then, and what they explain is measured.
    """
    out = Path(out)
    base = load(config.base, mesh=build_mesh(config.mesh) if config.mesh else None)
    source = open_lessons(base, config.data)
    evicting = evicting_of(base, config)
    params = init_memory(base.config, config.rule, jax.random.key(config.fit.seed))
    check = checks(source, evicting, config.validation)
    if not params:
        scores = {f"eval/{name}": value for name, value in check(params).items()}
        fitted = Fitted(params, 0, ({"step": 0, **scores},))
    else:
        fitted = fit(
            jax.tree_util.Partial(latent_loss, evicting),
            params,
            lambda step: lessons_at(source, step),
            config.fit,
            out=out,
            resume=resume,
            evaluate=check,
            progress=progress,
            name="latent memory",
            run={"latent": to_dict(config)},
        )
    trained = fetch(fitted.params)
    if jax.process_index() == 0:
        judged = indexer_hash(config.indexer, base) if config.indexer else None
        told = {"config": {**to_dict(config), "indexer": judged}, "metrics": fitted.told}
        save_memory(out / LATENT, trained, config.rule, base, told, config.dtype)
    return fitted


def evicting_of(base: Base, config: LatentTraining) -> Evicting:
    """What the loss of a run reads and does not train."""
    learned = Learned(load_indexer(config.indexer, base)) if config.indexer else Learned()
    removed = jnp.asarray([config.least, config.most], jnp.float32)
    policy = policy_named(config.policy)
    return Evicting(base.params, learned, removed, base.model, policy, config.rule, config.events)


def checks(source: LessonSource, evicting: Evicting, batches: int) -> Callable[[Any], Mapping[str, float]]:
    """A function params -> {explained_50, …, explained_75/0, …}: the explained part at REMOVED, mean over layers, and layer
    by layer at .75, and strength_75, see `latent_loss`, on documents of the validation world."""
    sets = validation_lessons(source, batches)
    score = jax.jit(explained)

    def scores(params: Any) -> Mapping[str, float]:
        made: dict[str, float] = {}
        for share in REMOVED:
            removed = jnp.full((source.config.rows,), share, jnp.float32)
            each = [fetch(score(evicting, params, batch, removed)) for batch in sets]
            layers, strength = np.mean(each, axis=0)
            made[f"explained_{100 * share:g}"] = float(layers.mean())
            if share == REMOVED[1]:
                made |= {f"explained_75/{place}": float(x) for place, x in enumerate(layers)}
                made["strength_75"] = float(strength.mean())
        return made

    return scores
