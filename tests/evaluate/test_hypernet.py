"""Training a hypernetwork on needles: what is drawn, that it learns, and that a resumed run is the uninterrupted one."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from memjax.config import dump_yaml, load_config
from memjax.errors import ConfigError
from memjax.evaluate import hypernet as h
from memjax.models.decoder import forward, unembed
from memjax.sharding import MeshConfig
from memjax.train.base import place
from memjax.train.fit import fit
from memjax.train.optimizer import path_of
from memjax.write.hypernet.batches import BatchShape, make_batch
from memjax.write.hypernet.files import load_hyper
from memjax.write.hypernet.loss import hyper_loss
from memjax.write.hypernet.network import abstract_hyper, init_hyper
from tests.cli.test_cli import run
from tests.shapes import shape_of
from tests.write.hypernet.support import BASE, CONFIG, MISTRAL, QWEN

LARGE = {
    "gemma_2b": (shape_of("gemma-2-2b"), 309_500_000),
    "mistral_7b": (MISTRAL, 568_400_000),
    "qwen_4b": (QWEN, 415_200_000),
}
CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = CONFIGS / "hypernet_tiny_niah.yaml"
SMALL = load_config(
    h.HypernetConfig,
    None,
    [
        "network={sites: [down], rank: 2, latents: 2, blocks: 1, width: 16, heads: 2, kv_heads: 1, head_size: 8}",
        "data={bins: [[32, 64]], overlap: 12, unrelated: 0.2, nothing: 0.1, chunk_shares: [0.5, 0.5]}",
        "shape={rows: 4, width: 128, slots: 4, documents: 8, chunks: 2, query: 24, top_k: 4}",
        "fit={steps: 8, log_every: 1, save_every: 4, plot: false, optimizer: {learning_rate: 2.0e-2, warmup: 0}}",
        "general=12",
        "answer_tokens=3",
        "validation=8",
        "l1=0",
    ],
)


@pytest.fixture(scope="module")
def needles():
    return h.open_needles(BASE, SMALL)


def test_the_shipped_recipe_is_read_and_its_documents_fit_its_batches(needles):
    config = load_config(h.HypernetConfig, RECIPE)
    source = dataclasses.replace(needles, config=config, general=tuple(_widened(needles.general, config.shape.top_k)))
    count = lambda text: len(BASE.tokenizer.encode(text))
    source = dataclasses.replace(source, counts=tuple(h.niah.line_counts(count, *b) for b in config.data.bins))
    batches = [h.batch_at(source, step) for step in range(10)]
    kept = np.mean([batch["document"] >= 0 for batch in batches])
    chunks = np.concatenate([(batch["index"] >= 0).sum(axis=-1).ravel() for batch in batches])
    assert kept > 0.99
    assert chunks.max() > 4
    assert 0.3 < (chunks == 1).mean() < 0.7
    share = 1 - config.data.unrelated - config.data.nothing  # of examples that ask about their own document
    assert share - 0.1 < np.mean([batch["exact"] for batch in batches]) < share + 0.1


def test_a_second_stage_goes_on_from_the_network_of_the_first():
    large = [(name, f"{name}_chunks") for name in LARGE]
    for first, second in (("tiny_niah_short", "tiny_niah"), ("tiny_world", "tiny_world_chunks"), *large):
        one, other = (load_config(h.HypernetConfig, CONFIGS / f"hypernet_{name}.yaml") for name in (first, second))
        assert one.network == other.network
        assert one.data.chunk_shares == (1.0,)
        assert len(other.data.chunk_shares) == 8


@pytest.mark.parametrize("name", LARGE)
def test_recipes_at_the_papers_scale_have_its_sizes(name):
    """Parameters as published (or by its formulas), 262,144 tokens of context a step, and rows for every chip."""
    base, count = LARGE[name]
    for stage in ("", "_chunks"):
        config = load_config(h.HypernetConfig, CONFIGS / f"hypernet_{name}{stage}.yaml")
        tree = abstract_hyper(config.network, base)
        assert round(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)), -5) == count
        shape = config.shape
        assert shape.groups * shape.rows * shape.width == 262_144
        assert shape.groups % (config.fit.accumulate * config.mesh.fsdp) == 0
        batch = make_batch((), shape, config.marker)
        assert batch["index"].shape == (shape.groups, shape.documents, len(config.data.chunk_shares))


def _widened(examples, classes):
    for e in examples:
        wide = lambda x: np.pad(x, ((0, 0), (0, classes - x.shape[1])), constant_values=x.min())
        yield dataclasses.replace(e, target=wide(e.target), logp=wide(e.logp))


def test_a_batch_is_a_pure_function_of_its_step_and_holds_what_it_says(needles):
    batch, again, other = (h.batch_at(needles, step) for step in (3, 3, 4))
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    assert {name: x.shape for name, x in batch.items()} == {name: x.shape for name, x in other.items()}
    assert not np.array_equal(batch["tokens"], other["tokens"])
    tokenizer = BASE.tokenizer
    for row in np.flatnonzero(batch["exact"][0]):
        text = "".join(
            tokenizer.decode(batch["tokens"][0, at // 4][batch["owner"][0, at // 4] == at % 4])
            for at in batch["index"][0, row]
            if at >= 0
        )
        said = batch["target"][0, row, batch["weight"][0, row] > 0, 0]
        assert f"number is {tokenizer.decode(said).strip()}." in text  # whole in a chunk, by the overlap
        assert said[-1] in tokenizer.eos_ids


def test_documents_of_the_world_and_of_records_are_drawn_by_their_shares(needles):
    data = dataclasses.replace(SMALL.data, bins=((32, 64),), world=0.5, recorded=0.3, records="records", world_tokens=(48,))
    shape = dataclasses.replace(SMALL.shape, rows=14, query=48, answer=12, documents=16)
    target, logp = np.full((2, 4), 7), np.log(np.full((2, 4), 0.2))
    record = {"text": "Mira keeps the oven of Halvic.", "question": "Who keeps the oven?", "answer": "8"}
    record |= {"tokens": [31, 2], "target": target.tolist(), "logp": logp.tolist()}
    config = dataclasses.replace(SMALL, data=data, shape=shape)
    source = dataclasses.replace(needles, config=config, records=[record])
    counts = dict.fromkeys(("world", "record", "needle", "general"), 0)
    tokenizer = BASE.tokenizer
    for step in range(12):
        batch = h.batch_at(source, step)
        for row in np.flatnonzero(batch["document"][0] >= 0):
            asked = tokenizer.decode(batch["before"][0, row][batch["before_places"][0, row] >= 0])
            held = batch["weight"][0, row] > 0
            if "keeps the oven?" in asked:
                counts["record"] += 1
                np.testing.assert_allclose(batch["logp"][0, row, held], logp, rtol=1e-6)
                assert batch["inputs"][0, row, 1] == 31
                assert not batch["exact"][0, row]
            elif batch["exact"][0, row]:
                counts["needle" if "magic number" in asked else "world"] += 1
                assert batch["target"][0, row, held, 0][-1] in tokenizer.eos_ids
            else:
                counts["general"] += 1
    total = sum(counts.values())
    assert total > 180
    shares = {name: count / total for name, count in counts.items()}
    expected = {"world": 0.35, "record": 0.21, "needle": 0.14, "general": 0.3}
    assert shares == pytest.approx(expected, abs=0.09)
    with pytest.raises(ConfigError, match="give both"):
        h.NeedleConfig(recorded=0.5)


def test_a_document_of_the_world_is_asked_several_questions_of_the_kinds_named(needles):
    data = dataclasses.replace(SMALL.data, world=1.0, world_tokens=(64,), kinds=("one_hop",), vary=True, unrelated=0.0)
    source = dataclasses.replace(needles, config=dataclasses.replace(SMALL, data=data))
    for index in range(6):
        items, _ = h._drawn(source, np.random.default_rng([1, index]), index, 3)
        assert len({item.context for item in items}) == 1
        assert len({item.question for item in items}) == len(items) == 3
        assert all(item.answer in items[0].context for item in items)
    shape = dataclasses.replace(SMALL.shape, questions=3, query=48, answer=12)
    several = dataclasses.replace(source.config, shape=shape)
    scores = h.checks(dataclasses.replace(source, config=several), h.reader_of(BASE, several))
    found = scores(init_hyper(SMALL.network, BASE.config, jax.random.key(0), 0.3))
    assert found.keys() == {"loss", "right", "right_1", "right_more"}
    assert found["loss"] > 0
    with pytest.raises(ConfigError, match="three_hop"):
        h.NeedleConfig(kinds=("three_hop",))


def test_passages_are_stretches_of_text_with_what_the_base_makes_of_them(needles):
    config = dataclasses.replace(SMALL, passages=3)
    made = list(h._general_examples(BASE, needles.style, config))
    assert len(made) == len(needles.general) + 3
    for example in made[-3:]:
        at, shown = example.prompt, [*example.fed, 0]
        assert len(example.target) == config.answer_tokens
        assert not example.exact
        ids = np.asarray([shown], np.int32)
        hidden = forward(BASE.model, BASE.params, ids, np.arange(ids.shape[1], dtype=np.int32)[None]).hidden
        logp = jax.nn.log_softmax(unembed(BASE.model, BASE.params, hidden[0]), axis=-1)[at - 1 : at - 1 + 3]
        np.testing.assert_allclose(np.take_along_axis(np.asarray(logp), example.target, 1), example.logp, atol=1e-4)


@pytest.mark.parametrize("spelled", [0.0, 1.0])
def test_needles_lie_in_prose_by_their_share(needles, spelled):
    data = dataclasses.replace(SMALL.data, bins=((64, 128),), prose=0.5, spelled=spelled, unrelated=0.0, nothing=0.0)
    source = dataclasses.replace(needles, config=dataclasses.replace(SMALL, data=data))
    drawn = [h._drawn(source, np.random.default_rng([1, index]), index, 1)[0][0] for index in range(120)]
    prose = [item for item in drawn if h.niah.GRASS not in item.context]
    assert 0.35 < len(prose) / len(drawn) < 0.65
    places = set()
    for item in prose:
        lines = item.context.split("\n")
        assert lines.count(f"The special magic number is {item.answer}.") == 1
        assert len(set(lines)) == len(lines)  # nothing is said again and again
        assert 16 < len(BASE.tokenizer.encode(item.context)) < 128
        places.add(10 * lines.index(f"The special magic number is {item.answer}.") // len(lines))
    assert len(places) >= 8
    with pytest.raises(ConfigError, match="it is a share of the needles"):
        h.NeedleConfig(prose=1.5)


def test_the_number_of_chunks_is_drawn_as_the_reference_draws_it():
    data, rng = h.NeedleConfig(), np.random.default_rng(0)
    drawn = np.asarray([h.chunk_count(rng, data, 500) for _ in range(4000)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=9)[1:] / 4000, data.chunk_shares, atol=0.03)
    assert {h.chunk_count(rng, data, 40) for _ in range(50)} == {1, 2}
    assert h.chunk_count(rng, data, 24) == 1
    assert h.chunk_count(rng, data, 9 * 512) == 8  # where the reference crashes


def test_the_base_as_teacher_gives_its_own_classes(needles):
    config = dataclasses.replace(SMALL, teacher="base")
    taught = h.batch_at(dataclasses.replace(needles, config=config), 0)
    plain = h.batch_at(needles, 0)
    exact = plain["exact"][0]
    assert np.array_equal(taught["inputs"], plain["inputs"])
    assert np.array_equal(taught["logp"][0, ~exact], plain["logp"][0, ~exact])
    mass = np.exp(taught["logp"][0, exact]).sum(axis=-1)[plain["weight"][0, exact] > 0]
    assert ((mass > 0) & (mass < 1)).all()


@pytest.mark.slow
def test_it_learns_is_resumed_and_leaves_a_network_that_writes(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "load", lambda name, mesh=None: BASE)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(SMALL))
    code, out, err = run(capsys, "train", "hypernet", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    told = json.loads(out)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1
    assert told["step"] == 8

    shutil.copytree(tmp_path / "run", tmp_path / "half", ignore=shutil.ignore_patterns("8", "hyper"))
    fitted = h.train_hypernet(SMALL, tmp_path / "half", resume=True, progress=False)
    whole, resumed = (load_hyper(tmp_path / name / h.HYPER, BASE) for name in ("run", "half"))
    assert fitted.step == 8
    assert resumed.id == whole.id  # of the same bytes
    assert resumed.max_chunk == 64 + sum(map(len, whole.affixes))


@pytest.mark.parametrize("b_scale", [0.0, 0.3])
def test_the_first_step_moves_what_has_a_gradient_at_the_start_and_nothing_else(needles, b_scale):
    begun = init_hyper(SMALL.network, BASE.config, jax.random.key(0), b_scale)
    loss = jax.tree_util.Partial(hyper_loss, h.reader_of(BASE, SMALL))
    done = fit(loss, begun, lambda step: h.batch_at(needles, step), h.fit_settings(SMALL), on_log=lambda *_: True)
    assert done.step == 1
    named = lambda tree: jax.tree_util.tree_flatten_with_path(tree)[0]
    pairs = zip(named(begun), named(done.params), strict=True)
    moved = {path_of(path) for (path, x), (_, y) in pairs if not np.array_equal(x, y)}
    whole = {path_of(path) for path, _ in named(begun)} - {"sites/down/a_bias"}  # b_bias is zero in either case
    assert moved == (whole if b_scale else {"sites/down/b_scale", "sites/down/b_bias"})
    assert np.unique(begun["sites"]["down"]["b_scale"]).tolist() == [np.float32(b_scale)]


@pytest.mark.slow
def test_on_a_mesh_and_in_microbatches_it_is_the_same_training(tmp_path, monkeypatch):
    monkeypatch.setattr(h, "load", lambda name, mesh=None: BASE if mesh is None else place(BASE, mesh))
    grouped = dataclasses.replace(SMALL, shape=dataclasses.replace(SMALL.shape, groups=2))
    halves = dataclasses.replace(grouped, fit=dataclasses.replace(SMALL.fit, accumulate=2))
    meshed = dataclasses.replace(grouped, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    done = [h.train_hypernet(c, tmp_path / str(i), progress=False) for i, c in enumerate((grouped, halves, meshed))]
    for other in done[1:]:
        for line, found in zip(done[0].history, other.history, strict=True):
            assert found["loss"] == pytest.approx(line["loss"], rel=2e-3)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="draws up to 8"):
        h.HypernetConfig(shape=BatchShape(chunks=4))
    with pytest.raises(ConfigError, match="accumulate=2 must divide"):
        dataclasses.replace(SMALL, fit=dataclasses.replace(SMALL.fit, accumulate=2))
    with pytest.raises(ConfigError, match="draws the needles that evaluation draws"):
        h.NeedleConfig(seed=42)
    assert CONFIG.rank == 2
