"""The library's own steps on arrays that are only described: what a plan compiles, and what lies in HBM for it.

Each function here describes the arguments that the real caller makes (`write.distill`, `write.compile`, `serve.engine`,
`train.fit`) and lowers the very function that it calls.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memjax.evaluate.hypernet import HypernetConfig, fit_settings
from memjax.evaluate.indexer import IndexerTraining
from memjax.evaluate.lessons import empty_lessons
from memjax.evaluate.tiny import base_loss
from memjax.evict.indexer import IndexerConfig, abstract_indexer
from memjax.evict.indexer_loss import Teacher, indexer_loss
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import make_slots
from memjax.memory.cache import make_cache
from memjax.models.config import ModelConfig
from memjax.models.decoder import Params, abstract_params, make_model, param_shardings, site_shapes
from memjax.models.generate import Decoding, bucket, decode
from memjax.plan.config import CompilePlan, DistillPlan, PlanConfig, ServePlan, TrainPlan, base_shape
from memjax.serve.slots import capacity
from memjax.sharding import Kind, abstract, shardings
from memjax.train.fit import FitConfig, lower_fit
from memjax.write import compile as compiling
from memjax.write import distill as distilling
from memjax.write.hypernet.batches import make_batch
from memjax.write.hypernet.loss import Reader, hyper_loss
from memjax.write.hypernet.network import abstract_hyper, hyper_counts
from memjax.write.pack_answers import ANSWERS, Batch
from memjax.write.pack_tasks import PackedTasks

MOST_STEPS = 1000  # of a run of training, which its schedule needs to know


@dataclasses.dataclass(frozen=True)
class Step:
    """A lowered step, and by role the arguments that it reads: trees of ShapeDtypeStructs with shardings.

    beside: what the process that runs the step holds too, without the step reading it.
    """

    lowered: jax.stages.Lowered
    held: Mapping[str, Any]
    beside: Mapping[str, Any]


def lower(config: PlanConfig, mesh: jax.sharding.Mesh) -> Step:
    """The step of a plan on a mesh of devices, which may only be described."""
    shape, dtype = base_shape(config), jnp.dtype(config.dtype)
    if config.distill is not None:
        return lower_distill(shape, dtype, config.distill, mesh)
    if config.compile is not None:
        return lower_compile(shape, dtype, config.compile, mesh)
    if config.serve is not None:
        return lower_serve(shape, dtype, config.serve, mesh)
    if config.hypernet is not None:
        return lower_hypernet(shape, dtype, config.hypernet, mesh)
    if config.indexer is not None:
        return lower_indexer(shape, dtype, config.indexer, mesh)
    assert config.train is not None
    return lower_train(shape, config.train, mesh)


def bytes_of(tree: Any) -> float:
    """Bytes of a tree of described arrays on one device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in _raw(tree)))


def lower_distill(shape: ModelConfig, dtype: Any, plan: DistillPlan, mesh: jax.sharding.Mesh) -> Step:
    """The training step of `write.distill` on packed answers."""
    recipe = plan.recipe
    params = _base(shape, dtype, mesh)
    below = distilling.frozen_layers(shape, recipe)
    student = jax.eval_shape(
        lambda params: distilling.make_student(make_model(shape), params, recipe), abstract_params(shape, dtype)
    )
    upper = student.model.config
    student = dataclasses.replace(student, params=_base(upper, dtype, mesh))
    trained = jax.eval_shape(lambda: distilling.fresh_tree(upper, recipe))
    batch = _answers(upper, dtype, plan, entered=below > 0)
    batch = dataclasses.replace(batch, header=_on(batch.header, "cache", mesh))
    loss = jax.tree_util.Partial(distilling.distill_loss, student)
    lowered, state = lower_fit(loss, trained, batch, distilling.fit_config(recipe), mesh)
    held = {
        "parameters": student.params,
        "trained": state.params,
        "optimizer": state.opt,
        "batch": _on(batch, "batch", mesh),
    }
    # The student's layers are a copy of the base's; embedding, head and the last norm are the same arrays.
    beside = {"the base's own layers": params["layers"]} if below else {}
    return Step(lowered, held, beside)


def _answers(upper: ModelConfig, dtype: Any, plan: DistillPlan, entered: bool) -> Batch:
    """The shapes of `Packer.batch`, with answers that are `entered` or tokens still."""
    recipe, keys = plan.recipe, (upper.num_kv_heads, upper.head_size)
    rows, tokens = recipe.rows, recipe.row_tokens
    held = ANSWERS * bucket(plan.prompt)
    whole = lambda *sizes: _array((*sizes, *keys), dtype)
    header = bucket(plan.header)
    shared = whole(upper.num_layers, 1, header)
    inputs = _array((rows, tokens, upper.width), dtype) if entered else _array((rows, tokens), jnp.int32)
    return Batch(
        header=Segment(shared, shared, _array((1, header), jnp.int32)),
        k=whole(upper.num_layers, rows, held),
        v=whole(upper.num_layers, rows, held),
        place=_array((rows, held), jnp.int32),
        holder=_array((rows, held), jnp.int32),
        inputs=inputs,
        positions=_array((rows, tokens), jnp.int32),
        owner=_array((rows, tokens), jnp.int32),
        target=_array((rows, tokens, recipe.top_k), jnp.int32),
        logp=_array((rows, tokens, recipe.top_k), jnp.float32),
        weight=_array((rows, tokens), jnp.float32),
        read=_array((rows, tokens), jnp.bool_),
    )


def lower_compile(shape: ModelConfig, dtype: Any, plan: CompilePlan, mesh: jax.sharding.Mesh) -> Step:
    """The training step of `write.compile`: slots written by the base with its adapter, and read by the base."""
    recipe, model = plan.recipe, make_model(shape)
    params = _base(shape, dtype, mesh)
    keys = (shape.num_kv_heads, shape.head_size)

    def read(tokens: int) -> Segment:
        kept = _array((shape.num_layers, 1, tokens, *keys), dtype)
        return _on(Segment(kept, kept, _array((1, tokens), jnp.int32)), "cache", mesh)

    header = read(bucket(plan.header))
    held = read(bucket(plan.header + plan.context)) if recipe.scope == "buffer" else None
    make = lambda params, header, context, held: compiling.assemble(
        model, params, header, context, plan.context, held, plan.header, recipe
    )
    given = (abstract_params(shape, dtype), header, _array((plan.context,), jnp.int32), held)
    compiler = dataclasses.replace(jax.eval_shape(make, *given), params=params, header=header, held=held)
    trained = jax.eval_shape(lambda: compiling.fresh_tree(compiler, recipe))
    kinds = recipe.classes or shape.vocab_size

    # No two tasks share a row, as if each were as long as the longest.
    every = {"recon": recipe.windows, "query": recipe.queries, "asked": recipe.asks}
    counts = {kind: count for kind, count in every.items() if count}
    tokens = sum(count * (recipe.window if kind == "recon" else recipe.answer_tokens) for kind, count in counts.items())
    flat, answers = (sum(counts.values()), bucket(plan.tokens)), bucket(tokens)
    tasks = PackedTasks(
        inputs=_array(flat, jnp.int32),
        offset=_array(flat, jnp.int32),
        owner=_array(flat, jnp.int32),
        at=_array((answers,), jnp.int32),
        target=_array((answers, kinds), jnp.int32),
        logp=_array((answers, kinds), jnp.float32),
        share={kind: _array((answers,), jnp.float32) for kind in counts},
        norm=_array((answers,), jnp.float32) if recipe.loss == "mse" else None,
    )
    loss = jax.tree_util.Partial(compiling.compile_loss, compiler)
    lowered, state = lower_fit(loss, trained, tasks, compiling.fit_config(recipe), mesh)
    caches = (header,) if held is None else (header, held)
    roles = {"parameters": params, "trained": state.params, "optimizer": state.opt, "cache": caches}
    return Step(lowered, {**roles, "batch": _on(tasks, "batch", mesh)}, {})


def lower_serve(shape: ModelConfig, dtype: Any, plan: ServePlan, mesh: jax.sharding.Mesh) -> Step:
    """`decode` over rows with a slot each; its loop over tokens counts as one."""
    model, params = make_model(shape)._replace(kernels=_kernels(mesh)), _base(shape, dtype, mesh)
    heads = (shape.num_kv_heads, shape.head_size, dtype)
    cache = lambda rows, tokens: jax.eval_shape(lambda: make_cache(shape.num_layers, rows, tokens, *heads))
    tails = _on(cache(plan.rows, bucket(plan.tail)), "cache", mesh)
    whole = jax.NamedSharding(mesh, jax.P())
    row = lambda kind: _array((plan.rows,), kind, whole)
    one = lambda kind: _array((), kind, whole)
    key = one(jax.eval_shape(jax.random.key, 0).dtype)
    state = Decoding(row(jnp.int32), row(jnp.int32), tails, row(jnp.bool_), key)
    segments: tuple[Segment, ...] = ()
    if plan.prefix:
        shared = _on(cache(1, bucket(plan.prefix)), "cache", mesh)
        segments = (Segment(shared.k, shared.v, shared.position),)
    slots = None
    if plan.resident:
        count = capacity(plan.resident, mesh)
        slots = jax.eval_shape(lambda: make_slots(site_shapes(shape), shape.num_layers, count, plan.rank, dtype))
        slots = _on(slots, "slots", mesh)
    stops = _array((max(len(shape.eos_ids), 1),), jnp.int32, whole)
    chosen = row(jnp.int32) if slots is not None else None
    numbers = (one(jnp.int32), stops, one(jnp.float32), one(jnp.float32))
    lowered = decode.lower(model, params, state, *numbers, segments, slots, chosen)
    roles: dict[str, Any] = {"parameters": params, "cache": (tails, segments)}
    return Step(lowered, roles if slots is None else {**roles, "slots": slots}, {})


def lower_train(shape: ModelConfig, plan: TrainPlan, mesh: jax.sharding.Mesh) -> Step:
    """The step that trains all parameters of a base on packed rows."""
    params = _base(shape, jnp.float32, mesh)
    rows = _array((plan.rows, plan.window), jnp.int32)
    batch = {**dict.fromkeys(("tokens", "segments", "positions"), rows), "mask": _array(rows.shape, jnp.float32)}
    loss = jax.tree_util.Partial(functools.partial(base_loss, make_model(shape)))
    config = FitConfig(steps=MOST_STEPS, accumulate=plan.accumulate, compute=plan.compute, optimizer=plan.optimizer)
    lowered, state = lower_fit(loss, params, batch, config, mesh)
    held = {"parameters": state.params, "optimizer": state.opt, "batch": _on(batch, "batch", mesh)}
    return Step(lowered, held, {})


def lower_hypernet(shape: ModelConfig, dtype: Any, run: HypernetConfig, mesh: jax.sharding.Mesh) -> Step:
    """The training step of `evaluate.hypernet`: documents become adapters, and the base answers with them."""
    params, network = _base(shape, dtype, mesh), run.network
    hyper = abstract_hyper(network, shape)
    hyper = abstract(hyper, shardings(hyper, "hyper", mesh, counts=hyper_counts(network)))
    l1, model, slots = _array((), jnp.float32), make_model(shape), run.shape.slots
    reader = Reader(params, l1, model=model, config=network, slots=slots, remat=run.remat)
    batch = {name: _array(x.shape, jnp.dtype(x.dtype)) for name, x in make_batch((), run.shape, run.marker).items()}
    lowered, state = lower_fit(jax.tree_util.Partial(hyper_loss, reader), hyper, batch, fit_settings(run), mesh)
    held = {"parameters": params, "trained": state.params, "optimizer": state.opt}
    return Step(lowered, {**held, "batch": _on(batch, "batch", mesh)}, {})


def lower_indexer(shape: ModelConfig, dtype: Any, run: IndexerTraining, mesh: jax.sharding.Mesh) -> Step:
    """The training step of `evaluate.indexer`: the base reads texts, and what it attends to is taught to every layer."""
    params = _base(shape, dtype, mesh)
    trained = abstract_indexer(shape, run.shape or IndexerConfig.of(shape))
    batch = {name: _array(x.shape, jnp.dtype(x.dtype)) for name, x in empty_lessons(run.data).items()}
    teacher = Teacher(params, make_model(shape), run.target)
    lowered, state = lower_fit(jax.tree_util.Partial(indexer_loss, teacher), trained, batch, run.fit, mesh)
    held = {"parameters": params, "trained": state.params, "optimizer": state.opt}
    return Step(lowered, {**held, "batch": _on(batch, "batch", mesh)}, {})


def _base(shape: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh) -> Params:
    return abstract(abstract_params(shape, dtype), param_shardings(shape, mesh))


def _kernels(mesh: jax.sharding.Mesh) -> str:
    """What `kernels.choose.chosen` makes of "auto" for rows of one token where the devices are the default backend."""
    return "pallas" if mesh.devices.flat[0].platform == "tpu" else "auto"


def _on(tree: Any, kind: Kind, mesh: jax.sharding.Mesh) -> Any:
    return abstract(tree, shardings(tree, kind, mesh))


def _array(sizes: tuple[int, ...], dtype: Any, place: jax.sharding.Sharding | None = None) -> Any:
    """A described array, of a type that passes for an array's."""
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)


def _raw(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
