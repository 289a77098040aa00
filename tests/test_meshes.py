"""Whatever is trained or served gives the same on every mesh as on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.bank.store import open_bank
from memjax.evaluate.tiny import base_loss
from memjax.evict.indexer import IndexerConfig, init_indexer
from memjax.evict.indexer_loss import Target, Teacher, indexer_loss
from memjax.evict.latent import init_memory
from memjax.evict.latent_loss import Evicting, latent_loss
from memjax.evict.learned import Learned
from memjax.evict.policies.indexer import Indexer as IndexerPolicy
from memjax.kernels.segment_attention import Segment
from memjax.memory.latent import Rule
from memjax.models.decoder import empty_cache, forward, param_shardings, unembed
from memjax.serve.engine import Engine, EngineConfig
from memjax.sharding import MeshConfig, build_mesh, put
from memjax.train.base import load, place
from memjax.train.checkpoint import Checkpoints, restore
from memjax.train.fit import FitConfig, fit
from memjax.train.optimizer import OptimizerConfig
from memjax.train.step import Plan, init_state
from memjax.write import compile as c
from memjax.write import distill as d
from memjax.write import tasks as t
from memjax.write.prompts import prompt_style
from memjax.write.teacher import Lesson
from tests.evict.lessons import small_lessons
from tests.small_bank import SAMPLING, TEXTS, add
from tests.support import small_base

SIZES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))
named = functools.partial(pytest.mark.parametrize, "sizes", ids=lambda sizes: "x".join(map(str, sizes)))
on_every_mesh = named(SIZES)
# Programs that take long to compile: the mesh with all three axes always, the others where slow tests run.
on_meshes = named([sizes if sizes == (2, 2, 2) else pytest.param(sizes, marks=pytest.mark.slow) for sizes in SIZES])
BASE = small_base(max_positions=1024, num_layers=2, num_heads=8, num_kv_heads=4, mlp_width=64)
STYLE = dataclasses.replace(prompt_style("plain"), invite="")
RUN = jax.jit(forward, static_argnums=0, static_argnames=("taps",))
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 1400, (8, 12)).astype(np.int32)
PLACES = np.tile(np.arange(12, dtype=np.int32), (8, 1))


def on(sizes):
    return place(BASE, build_mesh(MeshConfig(*sizes)))


def close(got, want, atol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=atol)


def read(base):
    """Logits of two blocks read one after the other through a cache, and the cache."""
    cache = empty_cache(base.config, 8, 16, base.params["embed"])
    first = RUN(base.model, base.params, IDS[:, :8], PLACES[:, :8], cache)
    out = RUN(base.model, base.params, IDS[:, 8:], PLACES[:, 8:], first.cache)
    return unembed(base.model, base.params, out.hidden), out.cache


@on_every_mesh
def test_reading(sizes):
    base = on(sizes)
    logits, cache = read(base)
    close((logits, cache), read(BASE), atol=2e-5)
    held = cache.k.addressable_shards[0].data.shape
    rows, heads = sizes[0] * sizes[1], sizes[2]
    assert held == (2, 8 // rows, 16, 4 // heads, 8)


def test_a_loaded_base_is_handed_out_in_parts():
    mesh, here = build_mesh(MeshConfig(2, 2, 2)), load("tiny")
    found = load("tiny", mesh=mesh)
    places = param_shardings(here.config, mesh)
    for ours, theirs, to in zip(*map(jax.tree.leaves, (found.params, here.params, places)), strict=True):
        assert np.array_equal(ours, theirs)
        assert ours.sharding.is_equivalent_to(to, ours.ndim)


@on_meshes
def test_training_a_base(sizes):
    accumulate = 1 if sizes[0] * sizes[1] == 8 else 2  # 8 rows in two parts are no row for each of 8 devices
    segments, mask = np.ones_like(IDS), np.ones(IDS.shape, np.float32)
    batches = [{"tokens": IDS, "segments": segments, "positions": PLACES, "mask": mask}]
    config = FitConfig(steps=3, accumulate=accumulate, optimizer=OptimizerConfig(learning_rate=1e-3))
    loss = jax.tree_util.Partial(functools.partial(base_loss, BASE.model))
    train = lambda params: fit(loss, params, batches, config, progress=False)
    got, want = train(on(sizes).params), train(BASE.params)
    close(got.params, want.params)
    assert got.metrics["loss"] == pytest.approx(want.metrics["loss"], abs=1e-5)
    places = param_shardings(BASE.config, build_mesh(MeshConfig(*sizes)))
    for leaf, to in zip(jax.tree.leaves(got.params), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim)


DISTILL = d.DistillConfig(
    rank=4, frozen=0.5, steps=3, rows=8, row_tokens=8, answer_tokens=6, top_k=8, general=0, keep=0.0, keep_batch=0, warmup=0
)


@pytest.fixture(scope="module")
def lesson():
    """Twelve made-up answers, so that no test waits for a teacher."""
    rng, n, width = np.random.default_rng(1), 12, 32
    keys = lambda rows, count: rng.normal(size=(2, rows, count, 4, 8)).astype(np.float32)
    header = Segment(jnp.asarray(keys(1, 5)), jnp.asarray(keys(1, 5)), jnp.arange(5)[None])
    place_ = np.tile(5 + np.arange(width, dtype=np.int32), (n, 1))
    positions = np.tile(5 + width + np.arange(6, dtype=np.int32), (n, 1))
    target = rng.integers(0, 1400, (n, 6, 8)).astype(np.int32)
    logp = np.log(rng.dirichlet(np.ones(9), (n, 6))[..., :8]).astype(np.float32)
    inputs = rng.integers(0, 1400, (n, 6)).astype(np.int32)
    return Lesson(
        header, keys(n, width), keys(n, width), place_, inputs, positions, target, logp, np.ones((n, 6), np.float32)
    )


@pytest.fixture(scope="module")
def adapter(lesson):
    return d.train_adapter(BASE, lesson, None, DISTILL)[0]


@on_meshes
def test_distilling(sizes, lesson, adapter):
    close(d.train_adapter(on(sizes), lesson, None, DISTILL)[0], adapter)


COMPILE = c.CompileConfig(ratio=8, rank=2)


def compiled(base):
    """The compiler's loss on made-up tasks, and its gradients."""
    split = t.Split(tuple(range(5, 11)), tuple(range(20, 84)), base, STYLE)
    compiler = c.make_compiler(base, split, COMPILE)
    rng = np.random.default_rng(2)
    trained = c.fresh_tree(compiler, COMPILE)
    trained = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), trained)
    inputs, target = rng.integers(0, 1400, (8, 6)).astype(np.int32), rng.integers(0, 1400, (8, 6, 8)).astype(np.int32)
    logp = np.log(rng.dirichlet(np.ones(9), (8, 6))[..., :8]).astype(np.float32)
    offset = np.tile(np.arange(6, dtype=np.int32), (8, 1))
    both = t.Tasks(inputs, offset, target, logp, np.ones((8, 6), np.float32))
    tasks = {"recon": both.take(np.arange(4)), "query": both.take(np.arange(4, 8))}
    step = jax.jit(jax.value_and_grad(c.compile_loss, argnums=1, has_aux=True))
    return step(compiler, trained, tasks, jax.random.key(0))


@pytest.fixture(scope="module")
def slots():
    return compiled(BASE)


@pytest.mark.slow
@on_every_mesh
def test_compiling_a_context(sizes, slots):
    close(compiled(on(sizes)), slots)


LESSONS = jax.tree.map(lambda x: jnp.tile(x, (4, 1)), small_lessons())


def evicting(base):
    """The losses of indexer and latent memory on eight lessons, with their gradients."""
    index = init_indexer(base.config, IndexerConfig.of(base.config), jax.random.key(1))
    teacher = Teacher(base.params, base.model, Target(window=6, sinks=2))
    rule = Rule("add", 4)
    removed = jnp.asarray([0.5, 0.9])
    told = Evicting(base.params, Learned(index), removed, base.model, IndexerPolicy(window=6), rule, events=2)
    step = lambda loss, *given: jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True))(*given)
    key = jax.random.key(0)
    memory = init_memory(base.config, rule, key)
    return step(indexer_loss, teacher, index, LESSONS, key), step(latent_loss, told, memory, LESSONS, key)


@pytest.fixture(scope="module")
def evicted():
    return evicting(BASE)


@pytest.mark.slow
@on_every_mesh
def test_learning_to_evict(sizes, evicted):
    close(evicting(on(sizes)), evicted)


@on_meshes
def test_answering_from_a_bank(sizes, tmp_path, caplog):
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        for seed, name in enumerate(TEXTS, start=1):
            add(bank, name, seed, base=BASE)
        start = lambda base: Engine(base, bank, STYLE, EngineConfig(candidates=3, resident=4, rank=4))
        question = "When does the ferry to Vask leave?"
        engine = start(on(sizes))
        got, want = (x.ask(question, gate=False, sampling=SAMPLING) for x in (engine, start(BASE)))
        assert got.text == want.text
        assert [x.name for x in got.choice.candidates] == [x.name for x in want.choice.candidates]
        for ours, theirs in zip(got.choice.candidates, want.choice.candidates, strict=True):
            for number in ("entropy", "margin", "kl"):
                assert getattr(ours, number) == pytest.approx(getattr(theirs, number), abs=1e-5), number
        add(bank, "lamp", 9, base=BASE, text="The lamp of Vask is red.")
        with jax.log_compiles():
            engine.ask("What is red?", memory="lamp", sampling=SAMPLING)
    assert not [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]


def test_a_checkpoint_of_one_mesh_is_read_on_every_other(tmp_path):
    saver = Checkpoints(tmp_path)
    params = on((2, 2, 2)).params
    state = init_state(params, Plan(OptimizerConfig(), 3), build_mesh(MeshConfig(2, 2, 2)))
    moments = jax.tree.map(lambda x: x + 0.5 if x.ndim else x, state.opt)
    saver.save(1, trained=state.params, optimizer=moments, data={}, config={})
    saver.close()
    for sizes in SIZES:
        mesh = build_mesh(MeshConfig(*sizes))
        for item, saved in (("trained", BASE.params), ("optimizer", moments)):
            found = restore(tmp_path, item=item, mesh=mesh)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
                assert np.array_equal(a, b)
        q = restore(tmp_path, mesh=mesh)["layers"]["q"]
        assert q.sharding.shard_shape(q.shape) == (2, 32 // sizes[1], 64 // sizes[2])


def test_a_base_on_no_mesh_has_no_shardings_in_its_programs():
    assert "sharding" not in RUN.lower(BASE.model, BASE.params, IDS, PLACES).as_text()
    on_mesh = put(BASE.params, param_shardings(BASE.config, build_mesh(MeshConfig(2, 2, 2))))
    assert "sharding" in RUN.lower(BASE.model, on_mesh, IDS, PLACES).as_text()
