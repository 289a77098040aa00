"""One optimizer step: accumulated gradients in the compute dtype, AdamW, and the guard against a bad loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from memjax.errors import ConfigError
from memjax.train.optimizer import OptimizerConfig, make_optimizer, path_of, schedule

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "opt", "bad"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class State:
    """What a step turns into the next: `step` int32 [] counts steps done, `bad` int32 [] is the first bad one.

    Bad is a step (0-based) whose loss or gradient is not finite; -1 while there is none. From that step on, params and
    optimizer state stay as they are.
    """

    step: jax.Array
    params: Any
    opt: Any
    bad: jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a step. Equal plans share one compiled program, across calls of `fit` too."""

    optimizer: OptimizerConfig
    steps: int
    accumulate: int = 1
    compute: Literal["float32", "bfloat16"] = "float32"  # float16 would need loss scaling
    shardings: tuple[jax.sharding.Sharding, ...] | None = None  # one per leaf of State


def init_state(params: Any, plan: Plan, mesh: jax.sharding.Mesh | None = None) -> State:
    """A fresh state around a float32 copy of `params` (the step donates its state; the caller's arrays stay alive).

    Sharded leaves stay as they are, optimizer moments like the parameter they belong to; every other leaf is put on all
    devices of `mesh`, if there is one. Raises ConfigError for a leaf that is not floating point.
    """

    def own(path: tuple[Any, ...], x: Any) -> jax.Array:
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ConfigError(
                f"trained leaf {path_of(path)} is {jnp.result_type(x)}; train floats, and bind the rest to the loss "
                "with jax.tree_util.Partial"
            )
        return jnp.array(x, dtype=jnp.float32, copy=True)

    params = jax.tree_util.tree_map_with_path(own, params)
    opt = make_optimizer(plan.optimizer, plan.steps).init(params)
    state = State(jnp.zeros((), jnp.int32), params, opt, jnp.full((), -1, jnp.int32))
    if mesh is None:
        return state
    everywhere = jax.NamedSharding(mesh, jax.P())
    return jax.tree.map(lambda x: x if isinstance(x.sharding, jax.NamedSharding) else jax.device_put(x, everywhere), state)


def abstract_state(params: Any, plan: Plan, mesh: jax.sharding.Mesh) -> State:
    """What `init_state` makes of parameters described by ShapeDtypeStructs, described in the same way."""
    whole = jax.NamedSharding(mesh, jax.P())
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    places = {path_of(path): whole if x.sharding is None else x.sharding for path, x in leaves}

    def lies(path: tuple[Any, ...]) -> jax.sharding.Sharding:
        ends = [name for name in places if f"/{path_of(path)}".endswith(f"/{name}")]
        return places[max(ends, key=len)] if ends else whole

    state = jax.eval_shape(functools.partial(init_state, plan=plan), params)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies(path)), state
    )


def shardings_of(state: State) -> tuple[jax.sharding.Sharding, ...] | None:
    """The sharding of each leaf for `Plan.shardings`, or None where everything lies on one device."""
    found = tuple(x.sharding for x in jax.tree.leaves(state))
    return found if any(len(s.device_set) > 1 for s in found) else None


def compile_step(loss: Loss) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """`step(state, batch, key, plan=...) -> (state, metrics)` for a loss.

    A loss that is a pytree, such as `jax.tree_util.Partial(function, frozen_arrays)`, is an argument of the program:
    its arrays are not baked in as constants, and every such loss around the same function shares one compilation. Any
    other callable is compiled for itself.
    """
    if all(not callable(leaf) for leaf in jax.tree.leaves(loss)):
        return functools.partial(_shared_step, loss)
    return jax.jit(functools.partial(_step, loss), static_argnames="plan", donate_argnums=0)


def _step(loss: Loss, state: State, batch: Any, key: jax.Array, *, plan: Plan) -> tuple[State, dict[str, jax.Array]]:
    value, metrics, grads = gradients(loss, state.params, batch, jax.random.fold_in(key, state.step), plan)
    norm = optax.tree.norm(grads)
    updates, opt = make_optimizer(plan.optimizer, plan.steps).update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)

    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    bad = jnp.where((state.bad < 0) & ~finite, state.step, state.bad)
    # Selected, not branched: the select fuses into the update, and nobody waits for the loss to reach the host.
    params, opt = jax.tree.map(lambda new, old: jnp.where(bad < 0, new, old), (params, opt), (state.params, state.opt))
    rate = jnp.asarray(schedule(plan.optimizer, plan.steps)(state.step), jnp.float32)
    state = State(state.step + 1, params, opt, bad)
    if plan.shardings is not None:
        leaves, tree = jax.tree.flatten(state)
        pinned = [jax.lax.with_sharding_constraint(x, s) for x, s in zip(leaves, plan.shardings, strict=True)]
        state = jax.tree.unflatten(tree, pinned)
    return state, {**metrics, "loss": value, "grad_norm": norm, "learning_rate": rate}


_shared_step = jax.jit(_step, static_argnames="plan", donate_argnums=1)


def lower_step(loss: Loss, state: State, batch: Any, key: Any, plan: Plan) -> jax.stages.Lowered:
    """The step of `compile_step` for a loss that is a pytree, on arguments that may be ShapeDtypeStructs; nothing runs."""
    return _shared_step.lower(loss, state, batch, key, plan=plan)


def gradients(
    loss: Loss, params: Any, batch: Any, key: jax.Array, plan: Plan
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """(loss, metrics, gradients) of a batch, over `plan.accumulate` microbatches, in float32.

    Microbatch i takes rows i, i+A, i+2A, ... so that a batch sharded on its rows is split without moving rows between
    devices. When the metrics hold `weight` (say, the number of target tokens), the mean over microbatches is weighted
    by it and thereby equals that of the whole batch; `weight` itself is summed.
    """

    def objective(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value, metrics = loss(cast(params, plan.compute), batch, key)
        for name, metric in metrics.items():
            if jnp.ndim(metric):
                raise ConfigError(f"metric {name!r} of the loss has shape {jnp.shape(metric)}; return scalars")
        return value.astype(jnp.float32), {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    one = jax.value_and_grad(objective, has_aux=True)
    if plan.accumulate == 1:
        (value, metrics), grads = one(params, batch, key)
        return value, metrics, grads

    rows, fixed = split_rows(batch, plan.accumulate)

    def add(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
        index, rows = part
        (value, metrics), grads = one(params, {**rows, **fixed}, jax.random.fold_in(key, index))
        weight = metrics.get("weight", jnp.float32(1))
        scaled = jax.tree.map(lambda x: x * weight, (value, metrics, grads))
        return jax.tree.map(jnp.add, total, (*scaled, weight)), None

    first = {k: v[0] for k, v in rows.items()}
    (value, metrics), grads = jax.eval_shape(one, params, {**first, **fixed}, key)
    # Gradients start as zeros *like the parameters*, which keeps their sharding.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (value, metrics))
    start = (*zeros, jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
    (value, metrics, grads, weight), _ = jax.lax.scan(add, start, (jnp.arange(plan.accumulate), rows))
    share = jnp.maximum(weight, 1e-9)
    value, metrics, grads = jax.tree.map(lambda x: x / share, (value, metrics, grads))
    if "weight" in metrics:
        metrics["weight"] = weight
    return value, metrics, grads


def split_rows(batch: Any, parts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves of a batch as [parts, B / parts, ...], and apart from them the entries without a batch axis.

    Raises ConfigError when the number of rows is no multiple of `parts`, or the batch is no flat dict.
    """
    if not isinstance(batch, dict):
        raise ConfigError(f"accumulate={parts} needs batches that are dicts of arrays; got {type(batch).__name__}")

    def split(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise ConfigError(f"batch entry {path_of(path)} has {x.shape[0]} rows; accumulate={parts} must divide them")
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    fixed = {k: v for k, v in batch.items() if any(jnp.ndim(x) == 0 for x in jax.tree.leaves(v))}
    rows = {k: v for k, v in batch.items() if k not in fixed}
    return jax.tree_util.tree_map_with_path(split, rows), fixed


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floating leaves in `dtype`; gradients through it come back in the leaves' own dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def remat(
    function: Callable[..., Any], keep: Literal["all", "matmuls", "nothing"] = "nothing", *, scanned: bool = True
) -> Callable[..., Any]:
    """`function` with its intermediate values recomputed in the backward pass, for use around a layer inside a loss.

    keep="matmuls" saves the outputs of matrix products without a batch dimension (weights times activations) and
    recomputes the cheap rest; "nothing" recomputes all; "all" leaves the function as it is. `scanned` says that the
    function is the body of a `lax.scan`, where the compiler cannot undo the recomputation and needs no barrier against
    it.
    """
    if keep == "all":
        return function
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if keep == "matmuls" else policies.nothing_saveable
    return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)
