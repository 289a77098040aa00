"""Batches of one shape, and the loss with the reference's averages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import ConfigError, DataError
from memjax.memory.adapter import Slots
from memjax.plan.hlo import read_work
from memjax.sharding import MeshConfig, build_mesh, put, shardings
from memjax.write.hypernet.batches import NEVER, BatchShape, Example, make_batch, one_hot
from memjax.write.hypernet.loss import Reader, document_mean, l1_of, read_answers, write_documents
from tests.support import random_adapter
from tests.write.hypernet.support import BASE, CONFIG, chunks_of, logits, moved

SHAPE = BatchShape(groups=2, rows=2, width=48, slots=3, documents=3, chunks=2, query=8, answer=3, top_k=4)


def example(chunks, answer=(7, 8), exact=True):
    target, logp = one_hot(answer, 4)
    return Example(tuple(chunks), [1, 5, 905, 6, *answer[:-1]], target, logp, 4, exact)


def test_chunks_lie_whole_in_rows_and_are_found_by_their_index():
    texts = [chunks_of(), chunks_of("Mira keeps the oven of Halvic.")[:1], []]
    batch = make_batch([example(text, exact=bool(text)) for text in texts for _ in range(2)], SHAPE, marker=1)
    for group in range(2):
        for document, text in enumerate(texts):
            index = batch["index"][group, document]
            assert (index >= 0).sum() == len(text)
            for chunk, at in zip(text, index, strict=False):
                row, slot = divmod(int(at), SHAPE.slots)
                mine = batch["owner"][group, row] == slot
                assert batch["tokens"][group, row][mine].tolist() == list(chunk)
                assert batch["positions"][group, row][mine].tolist() == list(range(len(chunk)))
    assert batch["document"].tolist() == [[0, 1, 2]] * 2
    assert batch["exact"].tolist() == [[True, True, False]] * 2
    assert batch["before"][0, 0].tolist() == [1, 5, 905, 0, 0, 0, 0]
    assert batch["before_places"][0, 0].tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert batch["inputs"][0, 0].tolist() == [6, 7, 0]
    assert batch["places"][0, 0].tolist() == [3, 4, -1]
    assert batch["at"][0, 0].tolist() == [0, 1, 0]
    assert batch["weight"][0, 0].tolist() == [1, 1, 0]
    assert batch["target"][0, 0, :2, 0].tolist() == [7, 8]
    whole = make_batch([example([])], SHAPE)
    assert "before" not in whole
    assert whole["inputs"][0, 0].tolist() == [1, 5, 905, 6, 7, 0, 0, 0]
    assert whole["at"][0, 0].tolist() == [3, 4, 0]


def test_questions_of_one_document_share_its_adapter():
    """Neighbours with the same chunks are written once, and their losses are those of documents asked one question each."""
    shape = dataclasses.replace(SHAPE, groups=1, questions=3)
    one, two = (example(chunks_of(text, count=1)) for text in ("Mira keeps the oven of Halvic.", "Tavin sells bread."))
    asked = [dataclasses.replace(one, target=np.full_like(one.target, n)) for n in (7, 8, 9, 10)]
    batch = make_batch([*asked, two, example([])], shape, marker=1)
    assert batch["document"].tolist() == [[0, 0, 0, 1, -1, -1, 2, -1, -1]]  # the fourth question has no room
    assert (batch["index"] >= 0).sum() == 2
    single = make_batch([asked[2], two, example([])], dataclasses.replace(shape, questions=1), marker=1)
    reader = Reader(BASE.params, jnp.float32(0.1), model=BASE.model, config=CONFIG, slots=shape.slots)
    losses = [read_answers(reader, write_documents(reader, moved(CONFIG), b), b)[0][0] for b in (batch, single)]
    np.testing.assert_allclose(losses[0][jnp.array([2, 3, 6])], losses[1], rtol=1e-5)


def test_what_finds_no_room_is_left_out_and_what_never_would_is_refused():
    long = list(range(40))
    batch = make_batch([example([long]) for _ in range(6)], SHAPE)
    assert batch["document"].tolist() == [[0, 1, -1]] * 2
    assert not batch["weight"][:, 2].any()
    for wrong in (example([list(range(49))]), example([[1]] * 3), example([], answer=(7, 8, 9, 2))):
        with pytest.raises(DataError, match="enlarge shape"):
            make_batch([wrong], SHAPE)
    with pytest.raises(DataError, match="lower marker"):
        make_batch([example([])], SHAPE, marker=5)
    with pytest.raises(ConfigError, match="at least 1"):
        BatchShape(rows=0)


def test_documents_are_written_on_the_device_that_holds_them():
    """Of eight groups on eight devices each reads its own; nothing is sent, and the adapters are those of one device."""
    shape = dataclasses.replace(SHAPE, groups=8, documents=1, rows=1)
    batch = make_batch([example(chunks_of(f"Mira keeps {count} ovens.", count=1)) for count in range(8)], shape)
    reader = Reader(BASE.params, jnp.float32(0.1), model=BASE.model, config=CONFIG, slots=shape.slots)
    wanted = jax.jit(write_documents)(reader, moved(CONFIG), batch)
    mesh = build_mesh(MeshConfig(data=8))
    on = put(reader, jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), reader)), moved(CONFIG)
    rows = put(batch, shardings(batch, "batch", mesh))
    program = jax.jit(write_documents).lower(*on, rows).compile()
    for one, other in zip(jax.tree.leaves(program(*on, rows)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert not read_work(program.as_text()).sent


def test_documents_count_alike_whatever_they_are_asked():
    each, document = jnp.asarray([[1.0, 3.0, 8.0], [5.0, 9.0, 9.0]]), jnp.asarray([[0, 0, 1], [2, -1, -1]])
    mean, count = document_mean(each, document, 3)
    assert (float(mean), float(count)) == (pytest.approx((2 + 8 + 5) / 3), 3.0)


def test_l1_runs_over_the_rank_of_the_longest_document_in_use():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 2, 6, 5)), rng.normal(size=(3, 2, 6, 4))
    slots = Slots({"down": jnp.asarray(a)}, {"down": jnp.asarray(b)}, jnp.ones(2))
    both = l1_of(slots, jnp.asarray([True, True]), jnp.asarray([1, 2]), 2)
    assert float(both) == pytest.approx((np.abs(a).mean((0, 2, 3)).sum() + np.abs(b).mean((0, 2, 3)).sum()) / 2, rel=1e-5)
    one = l1_of(slots, jnp.asarray([True, False]), jnp.asarray([1, 2]), 2)
    assert float(one) == pytest.approx(np.abs(a[:, 0]).sum() / (3 * 4 * 5) + np.abs(b[:, 0]).sum() / (3 * 4 * 4), rel=1e-5)


@pytest.mark.parametrize("marker", [0, 2])
def test_an_answers_loss_is_the_mean_over_its_tokens_of_the_teachers_classes(marker):
    rng = np.random.default_rng(1)
    target = np.stack([rng.permutation(900)[:4] for _ in range(2)]).astype(np.int32)
    logp = np.log(rng.dirichlet(np.ones(4), size=2) * 0.9).astype(np.float32)
    fed = [1, 5, 905, 6, 7]
    batch = make_batch([Example((), fed, target, logp, 4)], BatchShape(1, 1, 8, 1, 2, 1, 8, 4, 4), marker)
    adapters = [random_adapter(BASE.config, seed, 2) for seed in (0, 1)]
    stack = lambda name: {s: jnp.stack([getattr(x, name)[s] for x in adapters], axis=1) for s in ("up", "down")}
    slots = Slots(stack("a"), stack("b"), jnp.ones(2))
    reader = Reader(BASE.params, jnp.float32(0), model=BASE.model, config=CONFIG, slots=1)
    each, right = jax.jit(read_answers)(reader, slots, {k: jnp.asarray(v) for k, v in batch.items()})
    on = np.arange(5)[None] >= (4 - marker if marker else 0)
    found = logits(slots, np.zeros(1, np.int32), rows=(fed,), on=on)[0, 3:5].astype(np.float64)
    logq = found - np.log(np.exp(found).sum(axis=-1, keepdims=True))
    expected = -(np.exp(logp) * np.take_along_axis(logq, target, axis=-1)).sum(axis=-1).mean()
    assert float(each[0, 0]) == pytest.approx(expected, rel=1e-4)
    assert not right[0, 0]
    assert np.exp(NEVER) == 0
