"""The indexer: the paper's parameter counts, its formula against loops, and the policy of a bounded cache."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import ConfigError
from memjax.evict.bounded import index_block, make_plan, read_block
from memjax.evict.compact import empty_kept
from memjax.evict.indexer import IndexerConfig, abstract_indexer, index_keys, index_scores, init_indexer
from memjax.evict.learned import Learned
from memjax.evict.policies import View
from memjax.evict.policies.indexer import Indexer
from tests.evict.test_bounded import MODELS, PARAMS, TEXT
from tests.support import read, small_config

LLAMA = {"width": 4096, "num_heads": 32, "num_kv_heads": 8, "head_size": 128}


@pytest.mark.parametrize(("layers", "total"), [(1, 622_648), (32, 19_924_736), (36, 22_415_328)])
def test_parameter_counts_are_the_papers(layers, total):
    config = small_config(num_layers=layers, **LLAMA)
    index = IndexerConfig.of(config)
    assert (index.heads, index.size) == (16, 8)
    assert sum(math.prod(leaf.shape) for leaf in abstract_indexer(config, index).values()) == total


def test_the_query_map_is_as_wide_as_the_queries_not_as_the_model():
    config = small_config(width=1024, num_heads=16, num_kv_heads=8, head_size=128)  # Qwen3-0.6B
    assert abstract_indexer(config, IndexerConfig.of(config))["q"].shape == (3, 2048, 8 * 8)


def test_scores_are_the_formula():
    config = small_config(num_heads=4, head_size=64, width=32)
    index = IndexerConfig.of(config)
    stacked = init_indexer(config, index, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = {name: np.asarray(x[1]) + 0.1 * rng.normal(size=x.shape[1:]).astype(np.float32) for name, x in stacked.items()}
    q, h = rng.normal(size=(2, 3, 4, 64)).astype(np.float32), rng.normal(size=(2, 7, 32)).astype(np.float32)
    keys = index_keys(params, h)
    got = index_scores(params, q, h[:, -3:], keys)
    assert keys.shape == (2, 7, 1, index.size)
    assert got.shape == (2, 1, 3, 7)

    def norm(x, name):
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return x * params[name] + params[f"{name}_bias"]

    for b, t, s in np.ndindex(2, 3, 7):
        key = norm(h[b, s] @ params["k"] + params["k_bias"], "k_norm")
        weight = h[b, 4 + t] @ params["w"] + params["w_bias"]
        mapped = (q[b, t].reshape(-1) @ params["q"]).reshape(index.heads, index.size)
        total = sum(
            w / np.sqrt(index.heads * index.size) * max(0.0, norm(row, "q_norm") @ key)
            for w, row in zip(weight, mapped, strict=True)
        )
        np.testing.assert_allclose(got[b, 0, t, s], total, rtol=1e-4, atol=1e-5)


def test_an_indexer_per_head_has_a_score_for_each_and_no_ties_below_zero():
    """Pitfall 5: with one index head for a key head there is nothing to weigh, and no ReLU."""
    config = small_config(num_layers=1, **LLAMA)
    whole = IndexerConfig.of(config, per_head=True)
    assert (whole.heads, whole.size) == (8, 128)
    assert sum(math.prod(leaf.shape) for leaf in abstract_indexer(config, whole).values()) == 4_719_232
    with pytest.raises(ConfigError, match="has 8 heads, not 4"):
        abstract_indexer(config, IndexerConfig(4, 128, per_head=True))
    config = small_config(num_heads=4, num_kv_heads=2, head_size=16, width=32)
    stacked = init_indexer(config, IndexerConfig.of(config, per_head=True), jax.random.key(0))
    assert not {"w", "w_bias"} & set(stacked)
    params = {name: np.asarray(x[1]) for name, x in stacked.items()}
    rng = np.random.default_rng(0)
    q, h = rng.normal(size=(1, 3, 4, 16)).astype(np.float32), rng.normal(size=(1, 7, 32)).astype(np.float32)
    keys = index_keys(params, h)
    assert keys.shape == (1, 7, 2, 16)
    got = np.asarray(index_scores(params, q, h[:, -3:], keys))
    norm = lambda x: (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    for p, t, s in np.ndindex(2, 3, 7):
        mapped = (q[0, t].reshape(-1) @ params["q"]).reshape(2, 16)[p]
        np.testing.assert_allclose(got[0, p, t, s], norm(mapped) @ norm(h[0, s] @ params["k"]) / 4, rtol=1e-4, atol=1e-5)
    assert (got < 0).sum() > 5
    assert len(np.unique(got)) == got.size


def test_heads_that_are_scored_apart_keep_their_own_tokens_and_index_keys():
    model, params, count = MODELS["qwen3"], PARAMS["qwen3"], 64
    config = model.config
    learned = Learned(init_indexer(config, IndexerConfig.of(config, per_head=True), jax.random.key(2)))
    text, at = jnp.asarray([TEXT[:count]], jnp.int32), jnp.arange(count, dtype=jnp.int32)[None]
    keys, _ = index_block(
        model, params, learned.indexer, read(model, params, text, at, taps=("x",), tap_last=1).taps["x"], 1
    )
    kept = empty_kept(config, 1, 24, jnp.float32, learned.index_shape)
    plan = make_plan(Indexer(), 24, count, config.num_layers)
    for begin in (0, 32):
        part = slice(begin, begin + 32)
        _, kept = read_block(model, params, text[:, part], at[:, part], kept, plan, learned, policy=Indexer())
    position = np.asarray(kept.position)
    assert (position[:, 0, 0] != position[:, 0, 1]).any()
    for layer, head in np.ndindex(config.num_layers, config.num_kv_heads):
        # Of the first block, whose inputs do not depend on what was evicted.
        own = position[layer, 0, head]
        first = (own >= 0) & (own < 32)
        np.testing.assert_allclose(kept.index[layer, 0, first, head], keys[layer, 0, own[first], head], atol=1e-5)


def test_the_policy_takes_the_largest_score_of_the_queries_that_see_a_token():
    config = small_config(num_heads=4, head_size=64, width=32)
    params = jax.tree.map(lambda x: x[0], init_indexer(config, IndexerConfig.of(config), jax.random.key(1)))
    rng = np.random.default_rng(1)
    size, count = (IndexerConfig.of(config).size, 9)
    keys = rng.normal(size=(2, count, 1, size)).astype(np.float32)
    q_raw, h = rng.normal(size=(2, 3, 4, 64)).astype(np.float32), rng.normal(size=(2, 3, 32)).astype(np.float32)
    position = np.tile(np.asarray([0, 4, 5, 6, 7, 8, 9, 10, -1], np.int32), (2, 2, 1))
    at = np.asarray([[8, 9, 10], [-1, 9, 10]], np.int32)  # the second row's first query is padding
    none, zeros = jnp.int32(0), jnp.zeros((2, count, 2, 64))
    view = View(
        zeros, zeros, jnp.asarray(position), q_raw, q_raw, jnp.asarray(at), jnp.asarray([11, 11]), none, none,
        jnp.int32(5), jnp.zeros(32), none, scale=1.0, learned=params, index=jnp.asarray(keys), h=h,
    )  # fmt: skip
    scores = np.asarray(index_scores(params, q_raw, h, keys))[:, 0]
    largest, mean = (np.asarray(Indexer(mean=mean).score(view)) for mean in (False, True))
    for b, s in np.ndindex(2, count):
        seen = [t for t in range(3) if at[b, t] >= 0 and 0 <= at[b, t] - position[b, 0, s] < 5 and position[b, 0, s] >= 0]
        assert (largest[b, 0, s] == largest[b, 1, s]).all()
        if position[b, 0, s] == 0:
            assert largest[b, 0, s] > largest[b, 0, 1:].max()  # the first tokens stay
        elif seen:
            np.testing.assert_allclose(largest[b, 0, s], scores[b, seen, s].max(), rtol=1e-5)
            np.testing.assert_allclose(mean[b, 0, s], scores[b, seen, s].mean(), rtol=1e-5)
        else:
            assert largest[b, 0, s] == np.finfo(np.float32).min


@pytest.mark.parametrize("family", ["qwen3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "mistral"))])
def test_a_bounded_cache_holds_the_index_keys_of_what_it_keeps(family):
    """By blocks, on random bases: index keys move with their tokens, and room for all changes no bit of the cache."""
    model, params, policy, count, block = MODELS[family], PARAMS[family], Indexer(), 96, 32
    config, index = model.config, IndexerConfig.of(model.config)
    assert index.size == 8  # a sixteenth of these heads would be one number, which the norm turns into zero
    learned = Learned(init_indexer(config, index, jax.random.key(2)))
    text = jnp.asarray([TEXT[:count]], jnp.int32)
    at = jnp.arange(count, dtype=jnp.int32)[None]
    x = read(model, params, text, at, taps=("x",), tap_last=1).taps["x"]
    assert x.shape[2] == count  # the layers' input belongs to the tokens, not to their queries
    keys, _ = index_block(model, params, learned.indexer, x, 1)
    for capacity in (count, 24):
        kept = empty_kept(config, 1, capacity, jnp.float32, (1, index.size))
        plan = make_plan(policy, capacity, count, config.num_layers)
        for begin in range(0, count, block):
            part = slice(begin, begin + block)
            _, kept = read_block(model, params, text[:, part], at[:, part], kept, plan, learned, policy=policy)
        position = np.asarray(kept.position)
        assert (position == position[:, :, :1]).all()  # all heads of a layer keep the same
        assert (position >= 0).sum() == position[..., 0].size * capacity
        np.testing.assert_allclose(kept.index[0, 0], keys[0, 0, position[0, 0, 0]], atol=1e-5)
        if capacity == count:
            np.testing.assert_allclose(kept.index, keys, atol=1e-4)
            assert kept.bytes - empty_kept(config, 1, capacity, jnp.float32).bytes == kept.index.nbytes
    if family != "mistral":  # whose layers all keep what their window still reaches
        assert len({tuple(layer) for layer in position[:, 0, 0].tolist()}) > 1  # each layer judges for itself
