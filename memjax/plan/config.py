"""What a plan's file says: the slice, the base's shape, the mesh, and one step of the library with its sizes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from memjax.config import load_config
from memjax.errors import ConfigError
from memjax.evaluate.hypernet import HypernetConfig
from memjax.evaluate.indexer import IndexerTraining
from memjax.models.config import ModelConfig
from memjax.sharding import MeshConfig
from memjax.train.optimizer import OptimizerConfig
from memjax.write.compile import CompileConfig
from memjax.write.distill import DistillConfig


@dataclasses.dataclass(frozen=True)
class DistillPlan:
    """A step of `write.distill`. header: tokens that all prompts begin with; prompt: cached tokens of each prompt."""

    header: int = 32
    prompt: int = 64
    recipe: DistillConfig = dataclasses.field(default_factory=DistillConfig)


@dataclasses.dataclass(frozen=True)
class CompilePlan:
    """A step of `write.compile`. header, context: tokens of the prompt; tokens: of the longest task."""

    header: int = 32
    context: int = 4096
    tokens: int = 192
    recipe: CompileConfig = dataclasses.field(default_factory=CompileConfig)


@dataclasses.dataclass(frozen=True)
class ServePlan:
    """A decode step of `models.generate` as the engine runs it: `rows` rows, each with an adapter of its own.

    resident: adapters on the device, 0 for the base alone; rank: of their bucket; prefix: tokens of the prompt that all
    rows share, 0 for none; tail: tokens that a row can own.
    """

    rows: int = 256
    resident: int = 4096
    rank: int = 8
    prefix: int = 512
    tail: int = 512


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """A step of training a base on packed rows: `rows` x `window` tokens; the rest is as in `train.fit.FitConfig`."""

    rows: int = 64
    window: int = 512
    accumulate: int = 1
    compute: Literal["float32", "bfloat16"] = "bfloat16"
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """One step to be compiled. topology: see `plan.topology`; base: a Hugging Face config.json, or its folder.

    dtype: of the frozen base's parameters and caches; mesh: devices along each axis, one of them may be 0. Exactly one of
    distill, compile, serve, train, hypernet and indexer is given; hypernet is the configuration of a run of `memjax train
    hypernet`, of which the step reads network, shape, remat and fit; indexer that of `memjax train indexer`, of which it
    reads data (the sizes of its batch), target, shape and fit.
    """

    topology: str
    base: str
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(fsdp=0))
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    distill: DistillPlan | None = None
    compile: CompilePlan | None = None
    serve: ServePlan | None = None
    train: TrainPlan | None = None
    hypernet: HypernetConfig | None = None
    indexer: IndexerTraining | None = None

    def __post_init__(self) -> None:
        given = [name for name in STEPS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"a plan is of one step, and this has {', '.join(given) or 'none'}; give one of {', '.join(STEPS)}"
            )

    @property
    def step(self) -> str:
        """The step that is planned, by its key."""
        return next(name for name in STEPS if getattr(self, name) is not None)


STEPS = ("distill", "compile", "serve", "train", "hypernet", "indexer")


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> PlanConfig:
    """The plan of a YAML file; a relative `base` is looked for beside the file first. ConfigError."""
    config = load_config(PlanConfig, path, overrides)
    beside = Path(path).parent / config.base
    return dataclasses.replace(config, base=str(beside if beside.exists() else Path(config.base)))


def base_shape(config: PlanConfig) -> ModelConfig:
    """The shape of the plan's base; ConfigError where its file is missing or is no config.json."""
    path = Path(config.base)
    path = path / "config.json" if path.is_dir() else path
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"base {path}: cannot be read ({error.strerror}); give a config.json or its folder") from None
    except (ValueError, KeyError) as error:
        raise ConfigError(f"base {path}: is no config.json of a base ({type(error).__name__}: {error})") from None
