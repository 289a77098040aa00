"""The indexer's loss against one that builds every matrix, and that it itself never does; layers learn apart."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.evict import indexer_loss as m
from memjax.evict.compact import layer_traits
from memjax.evict.indexer import IndexerConfig, init_indexer, token_scores
from memjax.evict.indexer import index_keys as keys_of
from memjax.evict.indexer import index_scores as scores_of
from memjax.evict.learned import Learned
from memjax.evict.lesson import study
from memjax.evict.once import read_dense
from memjax.evict.policies import View
from memjax.evict.policies.indexer import Indexer
from memjax.models.decoder import make_model, rms_norm
from tests.evict.lessons import small_lessons
from tests.support import random_params, small_config

CONFIG = small_config(family="qwen3", num_layers=2, qk_norm=True, head_size=16, query_scale=0.25, attn_softcap=6.0)
MODEL, PARAMS = make_model(CONFIG), random_params(CONFIG)
INDEX = init_indexer(CONFIG, IndexerConfig.of(CONFIG), jax.random.key(1))
LESSONS = small_lessons()
TARGETS = [m.Target(r, j, window=6, sinks=2) for r, j in itertools.product(("max", "mean"), ("window", "asked"))]
WALK = [pytest.param(t, marks=[pytest.mark.slow] * (t.reduce != "max" or t.judges != "window")) for t in TARGETS]


def teacher(target, model=MODEL, params=PARAMS):
    return m.Teacher(params, model, target)


@pytest.fixture(scope="module")
def taps():
    return study(MODEL, PARAMS, LESSONS, ("x", "q_raw"), ("q", "lse", "x", "q_raw", "k"))


def dense_kl(target, read, layer, row, index=INDEX, head=None):
    """One text's KL with the whole attention matrix in hand; nothing is blocked, masked matrices throughout. head: of the
    queries of this key head alone."""
    at, places = np.asarray(LESSONS["at"][row]), np.asarray(LESSONS["places"][row])
    asks = np.flatnonzero(np.asarray(LESSONS["asks"][row]))
    text, behind = (jax.tree.map(lambda x: np.asarray(x[layer, row], np.float64), part) for part in read)
    every = np.concatenate([text["k"], behind["k"]])
    owner = np.concatenate([np.zeros(len(at)), np.asarray(LESSONS["owner"][row])])
    place = np.concatenate([at, places])
    paid = np.zeros((len(asks), len(at)))
    for i, t in enumerate(asks):
        seen = (place >= 0) & (place <= places[t]) & ((owner == 0) | (owner == LESSONS["owner"][row, t]))
        for n in range(CONFIG.num_heads):
            key_head = n // (CONFIG.num_heads // CONFIG.num_kv_heads)
            if head in (None, key_head):
                logits = every[:, key_head] @ behind["q"][t, n] * CONFIG.query_scale
                weights = np.where(seen, np.exp(6.0 * np.tanh(logits / 6.0)), 0)
                paid[i] += (weights / weights.sum())[: len(at)] / CONFIG.num_heads
    allowed = at >= target.sinks
    paid = paid[:, allowed]
    learned = jax.tree.map(lambda x: x[layer], index)
    norm = PARAMS["layers"]["attn_norm"][layer]
    h = rms_norm(read.text["x"][layer, row], norm, CONFIG)[None]
    keys = keys_of(learned, h)
    if target.judges == "window":
        judge, by, sees = (read.text["q_raw"][layer, row][None, -6:], h[:, -6:]), at[-6:], at[-6:] >= 0
    else:
        judge = (read.behind["q_raw"][layer, row][None], rms_norm(read.behind["x"][layer, row], norm, CONFIG)[None])
        by, sees = places, np.asarray(LESSONS["asks"][row])
    scores = np.asarray(scores_of(learned, *judge, keys)[0, 0 if head is None else head], np.float64)
    scores = np.where(sees[:, None] & (by[:, None] >= at[None]), scores, np.nan)[:, allowed]
    log_softmax = lambda z: (
        z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    )
    rows = paid / paid.sum(axis=-1, keepdims=True)
    if target.reduce == "max":
        p, z = paid.max(axis=0), np.nanmax(scores, axis=0)
    elif target.judges == "window":
        p, z = rows.mean(axis=0), np.nanmean(scores, axis=0)
    else:
        return np.mean(np.sum(rows * (np.log(rows) - log_softmax(scores[asks])), axis=-1))
    p = p / p.sum()
    return np.sum(p * (np.log(p) - log_softmax(z)))


@pytest.mark.parametrize("target", WALK, ids=lambda t: f"{t.reduce}-{t.judges}")
def test_it_is_the_kl_that_whole_matrices_give(target, taps, monkeypatch):
    monkeypatch.setattr(m, "CHUNK", 5)  # chunks that the questions do not fill
    kl, share = m.compare(teacher(target), INDEX, LESSONS)
    for layer, row in itertools.product(range(2), range(2)):
        np.testing.assert_allclose(kl[layer, row], dense_kl(target, taps, layer, row), rtol=2e-3, atol=1e-5)
    assert share.shape == (len(m.RECALLS), 2, 2)
    assert ((share > 0) & (share <= 1.0001)).all()


@pytest.mark.parametrize("target", WALK, ids=lambda t: f"{t.reduce}-{t.judges}")
def test_an_indexer_per_head_follows_the_attention_of_its_own_queries(target, taps, monkeypatch):
    monkeypatch.setattr(m, "CHUNK", 5)
    index = init_indexer(CONFIG, IndexerConfig.of(CONFIG, per_head=True), jax.random.key(1))
    kl, share = m.compare(teacher(target), index, LESSONS)
    for layer, row in itertools.product(range(2), range(2)):
        each = [dense_kl(target, taps, layer, row, index, head) for head in range(CONFIG.num_kv_heads)]
        np.testing.assert_allclose(kl[layer, row], np.mean(each), rtol=2e-3, atol=1e-5)
    assert ((share > 0) & (share <= 1.0001)).all()


def test_every_layer_learns_alone_and_the_base_does_not():
    """One forward pass, a gradient for each layer's own indexer and for nothing else."""
    loss = lambda index, params: m.compare(teacher(TARGETS[0], params=params), index, LESSONS)[0][0].sum()
    own, base = jax.grad(loss, argnums=(0, 1))(INDEX, PARAMS)
    assert all(float(jnp.abs(x[0]).max()) > 0 for x in own.values())
    assert all(float(jnp.abs(x[1]).max()) == 0 for x in own.values())
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(base))


def largest(jaxpr):
    """Elements of the largest array that a program makes anywhere."""
    found = 0
    for equation in jaxpr.eqns:
        found = max([found, *(int(np.prod(v.aval.shape)) for v in equation.outvars)])
        for inner in jax.core.jaxprs_in_params(equation.params):
            found = max(found, largest(inner))
    return found


def test_nothing_grows_with_the_square_of_the_text():
    """Forward and backward of the whole loss; the largest array doubles with the text."""
    config = dataclasses.replace(CONFIG, max_positions=8192)
    shaped = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    sizes = {}
    for length in (2048, 4096):
        lessons = {name: jax.ShapeDtypeStruct((1, length), jnp.int32) for name in ("ids", "at")}
        lessons |= {name: jax.ShapeDtypeStruct((1, 256), jnp.int32) for name in ("behind", "places", "owner")}
        lessons |= {"asks": jax.ShapeDtypeStruct((1, 256), jnp.bool_)}
        told = m.Teacher(shaped(PARAMS), make_model(config), m.Target())
        loss = lambda index, told, lessons: m.indexer_loss(told, index, lessons, None)[0]
        sizes[length] = largest(jax.make_jaxpr(jax.grad(loss))(shaped(INDEX), told, lessons).jaxpr)
    assert sizes[4096] < 4096**2
    assert sizes[4096] < 2.2 * sizes[2048]


def test_a_long_text_is_read_in_blocks_like_a_short_one_at_once(monkeypatch):
    whole = study(MODEL, PARAMS, LESSONS, ("x", "q_raw"), ("q", "lse"))
    monkeypatch.setattr("memjax.evict.lesson.PREFILL_BLOCK", 8)
    parts = study(MODEL, PARAMS, LESSONS, ("x", "q_raw"), ("q", "lse"))
    held = np.asarray(LESSONS["at"]) >= 0
    for name, value in whole.text.items():
        np.testing.assert_allclose(np.asarray(parts.text[name])[:, held], np.asarray(value)[:, held], atol=2e-5)
    asks = np.asarray(LESSONS["asks"])
    for name, value in whole.behind.items():
        np.testing.assert_allclose(np.asarray(parts.behind[name])[:, asks], np.asarray(value)[:, asks], atol=2e-5)


def test_what_is_trained_is_what_judges():
    """Pitfall 4: the same post-norm input, the same last queries, the same reduction, no positions in either."""
    target, length = m.Target(window=6, sinks=0), 20
    text = np.asarray(LESSONS["ids"][0]).tolist()
    read = study(MODEL, PARAMS, LESSONS, ("x", "q_raw"), ("q",))
    dense = read_dense(MODEL, PARAMS, [text], 6, learned=Learned(INDEX), block=32)
    at = LESSONS["at"][:1]
    reach, frequency = layer_traits(CONFIG)
    for layer in range(2):
        learned = jax.tree.map(lambda x, layer=layer: x[layer], INDEX)
        h = rms_norm(read.text["x"][layer, :1], PARAMS["layers"]["attn_norm"][layer], CONFIG)
        trained = m.window_scores(target, learned, read.text["q_raw"][layer, :1], h, at, reach[layer])
        position = jnp.broadcast_to(dense.cache.position[:, None], (1, 2, dense.cache.capacity))
        q = dense.queries
        view = View(
            dense.cache.k[layer], dense.cache.v[layer], position, q.q[layer], q.q_raw[layer], q.position, dense.length,
            jnp.int32(5), jnp.int32(6), jnp.int32(reach[layer]), frequency[layer], jnp.int32(layer), scale=1.0,
            learned=learned, index=dense.index[layer], h=q.h[layer],
        )  # fmt: skip
        judged = Indexer(window=6, sinks=0).score(view)
        assert dense.cache.capacity == 32  # padded on the left, as lessons are
        np.testing.assert_allclose(judged[0, 0, -length:], trained[0, 0], atol=1e-4)


def test_mass_that_is_nowhere_is_no_nan():
    """Pitfall 9: rows without mass, keys that are not allowed and scores that no query gave."""
    score = jnp.asarray([[0.0, 1.0, jnp.finfo(jnp.float32).min], [0.0, 1.0, 2.0]])
    weights, allowed = jnp.asarray([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]), jnp.asarray([[True] * 3, [False] * 3])
    value, grad = jax.value_and_grad(lambda s: m.kl_of(weights, s, allowed).sum())(score)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(value, np.log(0.5) + np.log(1 + np.e) - 0.5, rtol=1e-5)
    places = jnp.asarray([[[0, 1, 2]]] * 2)
    unseen = token_scores(score[:, None, None], jnp.asarray([[-1], [0]]), places, jnp.int32(9), mean=False)
    assert (unseen[0] == jnp.finfo(jnp.float32).min).all()


def test_recall_is_the_mass_that_the_best_scored_hold():
    weights, allowed = jnp.asarray([[0.4, 0.3, 0.2, 0.1]]), jnp.ones((1, 4), bool)
    perfect, worst = m.recall(weights, weights, allowed), m.recall(weights, -weights, allowed)
    np.testing.assert_allclose(perfect, 1, rtol=1e-6)
    np.testing.assert_allclose(worst[:, 0], [0.25, 0.25, 0.3 / 0.7], rtol=1e-5)


def test_no_word_is_predicted_in_it():
    """Pitfall 3: what the base would say next plays no part; the loss says which tokens of the text were attended to."""
    other = {**PARAMS, "final_norm": -PARAMS["final_norm"]}
    assert not np.allclose(other["final_norm"], PARAMS["final_norm"])
    loss = jax.jit(m.indexer_loss)
    key = jax.random.key(0)
    first, second = (loss(teacher(TARGETS[0], params=params), INDEX, LESSONS, key)[0] for params in (PARAMS, other))
    assert float(first) == float(second) > 0
