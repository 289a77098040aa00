"""The indexer's forward pass: the paper's parameter counts, and its formula against loops."""

import math

import jax
import numpy as np
import pytest

from memjax.evict.indexer import IndexerConfig, abstract_indexer, index_keys, index_scores, init_indexer
from tests.support import small_config

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
    assert keys.shape == (2, 7, index.size)
    assert got.shape == (2, 3, 7)

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
        np.testing.assert_allclose(got[b, t, s], total, rtol=1e-4, atol=1e-5)
