"""The optimizer every trained thing shares: AdamW, its schedules, clipping, and which leaves are exempt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
import optax.contrib

from memjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with a schedule; hashable, so that it can be a static argument of the step.

    "adamw" is Loshchilov and Hutter (2019). "muon" (Jordan 2024; arXiv 2502.16982) orthogonalises the momentum of every
    stacked matrix [L, I, F], scaled to the update size of Adam (section 2.2), and leaves the other leaves to AdamW
    (with Nesterov's momentum): one learning rate serves both. Small bases learn to copy several times sooner with it
    (configs/tiny_base.md). `matrices` are pieces of the paths of further leaves that it takes over their last two axes,
    as a matrix of its own [I, F] or a deeper stack [L, M, I, F].

    `warmup` counts optimizer steps. `decay` is the share of all steps that the last phase of "wsd" takes (warm-up,
    stable, decay; MiniCPM, section 4). `final` is the learning rate of the last step as a share of `learning_rate`.
    `no_decay` and `freeze` are pieces of parameter paths: `no_decay` leaves are exempt from weight decay, as every leaf
    of one dimension or none is (stacked norms and biases have two dimensions, hence the names); `freeze` leaves never
    change.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup: int = 0
    decay: float = 0.2
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    no_decay: tuple[str, ...] = ("norm", "bias", "scale")
    freeze: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "final", "decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; give a number from 0 to 1")
        for name in ("learning_rate", "warmup", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; give a number of at least 0")
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"optimizer.clip is {self.clip}; give a positive norm, or null for no clipping")


def path_of(path: tuple[Any, ...]) -> str:
    """The readable name of a leaf: `layers/attn_norm` for `tree["layers"]["attn_norm"]`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decayed(params: Any, config: OptimizerConfig) -> Any:
    """A tree of bools like `params`: which leaves weight decay acts on (see `OptimizerConfig.no_decay`)."""
    # Only the last part of a path is matched: "norm" must exempt "layers/attn_norm", not everything under
    # "normalizer/".
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim > 1 and not any(piece in path_of(path[-1:]) for piece in config.no_decay), params
    )


def trainable(params: Any, config: OptimizerConfig) -> Any:
    """A tree of bools like `params`: False where the path contains a piece named in `config.freeze`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(piece in path_of(path) for piece in config.freeze), params
    )


def schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The learning rate as a function of the step (0-based), for a run of `steps` steps.

    Warm-up rises linearly and reaches the full rate at its last step; the first step already moves (rate / warmup).
    Raises ConfigError when warm-up and decay do not fit into `steps`.
    """
    peak, rest = config.learning_rate, steps - config.warmup
    if rest < 1 and config.warmup:
        raise ConfigError(f"optimizer.warmup is {config.warmup} of {steps} steps; leave at least one step after it")
    rest = max(rest, 1)
    last = max(rest - 1, 1)  # the final rate is reached at the last step, not one after it
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, last, alpha=config.final)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * config.final, last)
    elif config.schedule == "wsd":
        decay = min(max(round(steps * config.decay), 1), rest)
        down = optax.linear_schedule(peak, peak * config.final, decay)
        # join_schedules restarts the count at the boundary; the decay's first step must already be below the peak.
        main = optax.join_schedules([optax.constant_schedule(peak), lambda n: down(n + 1)], [rest - decay])
    else:
        main = optax.constant_schedule(peak)
    if not config.warmup:
        return main
    rise = optax.linear_schedule(peak / config.warmup, peak, max(config.warmup - 1, 1))
    return optax.join_schedules([rise, main], [config.warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Muon with `schedule`; frozen leaves count in neither norm nor update."""
    parts = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    mask = lambda tree: decayed(tree, config)
    if config.kind == "muon":
        parts.append(
            optax.contrib.muon(
                schedule(config, steps),
                eps=config.eps,
                weight_decay=config.weight_decay,
                weight_decay_mask=mask,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                adam_weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=lambda tree: _matrices(tree, config),
                consistent_rms=0.2,
            )
        )
    else:
        parts.append(
            optax.adamw(
                schedule(config, steps),
                b1=config.beta1,
                b2=config.beta2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                mask=mask,
            )
        )
    if config.freeze:
        still = optax.masked(optax.set_to_zero(), lambda tree: jax.tree.map(lambda t: not t, trainable(tree, config)))
        parts = [still, *parts, still]  # before: no gradient in the norm; after: no decay either
    return optax.chain(*parts)


def _matrices(params: Any, config: OptimizerConfig) -> Any:
    """Which axes of each leaf Muon takes for a matrix: the last two of a stack [L, I, F] or of one named in
    `config.matrices`, none of other leaves.
    """

    def axes(path: tuple[Any, ...], x: Any) -> optax.contrib.MuonDimensionNumbers | None:
        named = x.ndim > 1 and any(piece in path_of(path) for piece in config.matrices)
        return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if named or x.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(axes, params)
