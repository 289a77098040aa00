"""Tokens are written where each row stands, and on a mesh by the device that holds the row, without asking others."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.memory.cache import append, make_cache
from memjax.sharding import MeshConfig, build_mesh, pinned, put, shardings

LAYERS, ROWS, ROOM, HEADS, SIZE = 3, 8, 12, 4, 8


def given(tokens):
    """(a cache with rows of different lengths, keys, values, positions with padding) of which some do not fit."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    cache = make_cache(LAYERS, ROWS, ROOM, HEADS, SIZE)
    held = jnp.asarray([0, 3, 5, 12, 11, 1, 0, 10], jnp.int32)
    cache = type(cache)(draw(*cache.k.shape), draw(*cache.v.shape), cache.position, held)
    valid = np.minimum(np.array([1, 0, 4, 1, 3, 2, 4, 2]), tokens)
    positions = np.where(np.arange(tokens) < valid[:, None], np.asarray(held)[:, None] + np.arange(tokens), -1)
    new = (LAYERS, ROWS, tokens, HEADS, SIZE)
    return cache, draw(*new), draw(*new), jnp.asarray(positions, jnp.int32)


def written_one_by_one(cache, k, v, positions):
    keys, values, places = (np.array(x) for x in (cache.k, cache.v, cache.position))
    following = np.array(cache.next)
    for row, token in np.argwhere(np.asarray(positions) >= 0):
        at = following[row]
        following[row] += 1
        if at < ROOM:
            keys[:, row, at], values[:, row, at] = k[:, row, token], v[:, row, token]
            places[row, at] = positions[row, token]
    return keys, values, places, following


@pytest.mark.parametrize("sizes", [None, (8, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_tokens_lie_where_each_row_stands(tokens, sizes):
    cache, *rest = given(tokens)
    mesh = None if sizes is None else build_mesh(MeshConfig(*sizes))
    on = cache if mesh is None else put(cache, shardings(cache, "cache", mesh))
    program = jax.jit(lambda *told: pinned(append(*told), "cache", mesh)).lower(on, *rest).compile()
    got = program(on, *rest)
    for one, other in zip(jax.tree.leaves(got), written_one_by_one(cache, *rest), strict=True):
        np.testing.assert_array_equal(np.asarray(one), other)
    assert not re.search(r"all-(gather|reduce|to-all)\S*\(|collective-permute\S*\(", program.as_text())
