"""The steps of plans are those that run: the same program as on real arrays, and the same layout, on eight CPU devices."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import ConfigError
from memjax.evaluate.hypernet import HypernetConfig, NeedleConfig, fit_settings
from memjax.evaluate.indexer import IndexerTraining
from memjax.evaluate.lessons import LessonConfig, empty_lessons
from memjax.evaluate.tiny import base_loss
from memjax.evict.indexer import IndexerConfig, init_indexer
from memjax.evict.indexer_loss import Target, Teacher, indexer_loss
from memjax.memory.adapter import make_slots
from memjax.models.decoder import empty_cache, init_params, make_model, param_shardings, site_shapes
from memjax.models.generate import Decoding, decode
from memjax.plan import steps
from memjax.plan.config import CompilePlan, DistillPlan, PlanConfig, ServePlan, TrainPlan, base_shape, load_plan
from memjax.serve.slots import capacity
from memjax.sharding import MeshConfig, build_mesh, put, shardings
from memjax.train.fit import FitConfig, place, plan_of
from memjax.train.optimizer import OptimizerConfig
from memjax.train.step import init_state, lower_step, shardings_of
from memjax.write import distill as distilling
from memjax.write.compile import CompileConfig
from memjax.write.distill import DistillConfig
from memjax.write.hypernet.batches import BatchShape, make_batch
from memjax.write.hypernet.loss import Reader, hyper_loss
from memjax.write.hypernet.network import HyperConfig, hyper_counts, init_hyper
from tests.shapes import HF, shape_of
from tests.support import small_config

CONFIG = small_config(num_layers=2, num_heads=8, num_kv_heads=4, vocab_size=96)
MESH = functools.cache(lambda: build_mesh(MeshConfig(2, 2, 2)))
DISTILL = DistillPlan(
    8,
    16,
    DistillConfig(rank=4, frozen=0.5, rows=8, row_tokens=8, answer_tokens=6, top_k=8, general=0, keep=0.0, keep_batch=0),
)


def params_on(mesh, config=CONFIG):
    return put(init_params(config, jax.random.key(0)), param_shardings(config, mesh))


def zeros(tree):
    """Real arrays in the places of described ones."""
    return jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), tree)


def test_training_a_base_is_the_program_that_fit_runs():
    mesh, plan = MESH(), TrainPlan(rows=8, window=16, compute="float32", optimizer=OptimizerConfig(warmup=2))
    planned = steps.lower_train(CONFIG, plan, mesh)
    config = FitConfig(steps=steps.MOST_STEPS, optimizer=plan.optimizer)
    state = init_state(params_on(mesh), plan_of(config), mesh)
    told = dataclasses.replace(plan_of(config), shardings=shardings_of(state))
    rows = np.zeros((8, 16), np.int32)
    batch = {**dict.fromkeys(("tokens", "segments", "positions"), rows), "mask": rows.astype(np.float32)}
    key = jax.device_put(jax.random.key(0), state.step.sharding)
    loss = jax.tree_util.Partial(functools.partial(base_loss, make_model(CONFIG)))
    real = lower_step(loss, state, place(batch, None, mesh), key, told)
    assert planned.lowered.as_text() == real.as_text()
    assert steps.bytes_of(planned.held["parameters"]) == sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params)
    )


def test_distilling_is_the_program_that_fit_runs():
    mesh = MESH()
    planned = steps.lower_distill(CONFIG, jnp.float32, DISTILL, mesh)
    student = distilling.make_student(make_model(CONFIG), params_on(mesh), DISTILL.recipe)
    config = distilling.fit_config(DISTILL.recipe)
    state = init_state(distilling.fresh_tree(student.model.config, DISTILL.recipe), plan_of(config), mesh)
    told = dataclasses.replace(plan_of(config), shardings=shardings_of(state))
    whole = jax.NamedSharding(mesh, jax.P())
    student = dataclasses.replace(student, **{n: jax.device_put(getattr(student, n), whole) for n in ("scale", "keep")})
    key = jax.device_put(jax.random.key(0), whole)
    loss = jax.tree_util.Partial(distilling.distill_loss, student)
    real = lower_step(loss, state, zeros(planned.held["batch"]), key, told)
    assert planned.lowered.as_text() == real.as_text()
    for ours, theirs in zip(jax.tree.leaves(planned.held["parameters"]), jax.tree.leaves(student.params), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim)
    # The lower layers stay in memory, and the student holds a copy of the upper ones.
    whole_base = steps.bytes_of(planned.beside["the base's own layers"])
    assert whole_base == 2 * steps.bytes_of(planned.held["parameters"]["layers"])


def test_serving_is_the_program_of_decode():
    mesh = MESH()
    plan = ServePlan(rows=8, resident=20, rank=4, prefix=0, tail=32)
    planned = steps.lower_serve(CONFIG, jnp.float32, plan, mesh)
    whole = jax.NamedSharding(mesh, jax.P())
    params = params_on(mesh)
    cache = empty_cache(CONFIG, 8, 32, params["embed"])
    slots = make_slots(site_shapes(CONFIG), CONFIG.num_layers, capacity(20, mesh), 4, mesh=mesh)
    assert slots.capacity == 24  # a multiple of the devices
    row = lambda kind: jax.device_put(jnp.zeros((8,), kind), whole)
    state = Decoding(row(jnp.int32), row(jnp.int32), cache, row(bool), jax.device_put(jax.random.key(0), whole))
    one = lambda kind: jax.device_put(jnp.zeros((), kind), whole)
    stops = jax.device_put(jnp.zeros((1,), jnp.int32), whole)
    numbers = (one(jnp.int32), stops, one(jnp.float32), one(jnp.float32))
    real = decode.lower(make_model(CONFIG), params, state, *numbers, (), slots, row(jnp.int32))
    assert planned.lowered.as_text() == real.as_text()
    assert steps.bytes_of(planned.held["slots"]) * 8 == sum(x.nbytes for x in jax.tree.leaves(slots))


@pytest.mark.parametrize("scope", ["context+buffer", pytest.param("buffer", marks=pytest.mark.slow)])
def test_compiling_is_lowered_for_a_mesh(scope):
    recipe = CompileConfig(ratio=8, rank=2, windows=4, queries=4, top_k=8, scope=scope)
    planned = steps.lower_compile(CONFIG, jnp.float32, CompilePlan(8, 64, 16, recipe), MESH())
    text = planned.lowered.as_text()
    assert "sharding" in text
    assert planned.held["trained"]["slots"].shape == (8, CONFIG.width)


def test_a_hypernetwork_is_trained_by_the_program_that_fit_runs():
    mesh = MESH()
    network = HyperConfig(rank=2, latents=3, blocks=1, width=16, heads=4, kv_heads=2, head_size=8)
    shape = BatchShape(groups=8, rows=1, width=24, slots=2, documents=2, chunks=1, query=8, top_k=4)
    run = HypernetConfig(network=network, shape=shape, data=NeedleConfig(chunk_shares=(1.0,)), remat=True)
    planned = steps.lower_hypernet(CONFIG, jnp.float32, run, mesh)
    hyper = init_hyper(network, CONFIG, jax.random.key(0))
    hyper = put(hyper, shardings(hyper, "hyper", mesh, counts=hyper_counts(network)))
    l1 = jax.device_put(jnp.float32(1.5), jax.NamedSharding(mesh, jax.P()))
    base = (params_on(mesh), l1)
    reader = Reader(*base, model=make_model(CONFIG), config=network, slots=2, remat=True)
    config = fit_settings(run)
    state = init_state(hyper, plan_of(config), mesh)
    told = dataclasses.replace(plan_of(config), shardings=shardings_of(state))
    key = jax.device_put(jax.random.key(0), state.step.sharding)
    batch = make_batch((), shape, run.marker)
    real = lower_step(jax.tree_util.Partial(hyper_loss, reader), state, place(batch, None, mesh), key, told)
    assert planned.lowered.as_text() == real.as_text()


def test_an_indexer_is_trained_by_the_program_that_fit_runs():
    mesh, data = MESH(), LessonConfig(rows=8, shortest=40, longest=48, behind=16)
    run = IndexerTraining(data=data, target=Target(window=8), fit=FitConfig(steps=9, accumulate=2))
    planned = steps.lower_indexer(CONFIG, jnp.float32, run, mesh)
    teacher = Teacher(params_on(mesh), make_model(CONFIG), run.target)
    state = init_state(init_indexer(CONFIG, IndexerConfig.of(CONFIG), jax.random.key(0)), plan_of(run.fit), mesh)
    told = dataclasses.replace(plan_of(run.fit), shardings=shardings_of(state))
    key = jax.device_put(jax.random.key(0), state.step.sharding)
    batch = place(empty_lessons(data), None, mesh)
    real = lower_step(jax.tree_util.Partial(indexer_loss, teacher), state, batch, key, told)
    assert planned.lowered.as_text() == real.as_text()


def test_a_report_of_a_program_for_cpu():
    from memjax.plan.report import as_json, compile_step
    from memjax.plan.topology import parse_topology

    plan = ServePlan(rows=8, resident=20, rank=4, prefix=32, tail=32)
    step = steps.lower_serve(CONFIG, jnp.float32, plan, MESH())
    report = compile_step(step, "small", "serve", parse_topology("v5e-8"), "2x2x2")
    assert report.fits
    assert report.memory.arguments == pytest.approx(sum(report.memory.held.values()), rel=0.05)
    told = as_json(report)
    assert told["flops"] > 0
    assert told["collectives"]["all-reduce"]["count"] > 0
    json.dumps(told)


def test_the_file_of_a_plan(tmp_path):
    (tmp_path / "shape.json").write_text(json.dumps(HF["llama-3.1-8b"]), "utf-8")
    (tmp_path / "plan.yaml").write_text("topology: v5e-16\nbase: shape.json\nserve: {rows: 4}\n", "utf-8")
    plan = load_plan(tmp_path / "plan.yaml", ["serve.resident=7"])
    assert (plan.step, plan.serve.rows, plan.serve.resident) == ("serve", 4, 7)
    assert base_shape(plan) == shape_of("llama-3.1-8b")
    for lines, told in (
        (
            "topology: v5e-16\nbase: shape.json\n",
            "this has none; give one of distill, compile, serve, train, hypernet, indexer",
        ),
        ("topology: v5e-16\nbase: shape.json\nserve: {}\ntrain: {}\n", "this has serve, train"),
        ("topology: v5e-16\nbase: shape.json\nserve: {row: 3}\n", "serve.row is not a key; the nearest is serve.rows"),
    ):
        (tmp_path / "wrong.yaml").write_text(lines, "utf-8")
        with pytest.raises(ConfigError, match=told):
            load_plan(tmp_path / "wrong.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        base_shape(PlanConfig("v5e-16", str(tmp_path / "none.json"), serve=ServePlan()))
