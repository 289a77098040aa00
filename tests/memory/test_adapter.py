"""The algebra of adapters, against deltas written out in NumPy."""

import dataclasses

import numpy as np
import pytest

from memjax.errors import ArtefactError
from memjax.memory.adapter import concatenate, recompress, ties, ties_merge, weighted_sum
from tests.support import random_adapter, small_config

CONFIG = small_config(width=16, mlp_width=24, num_layers=2, num_heads=2, num_kv_heads=1)


def adapter(seed, rank=3, scale=0.7):
    return dataclasses.replace(random_adapter(CONFIG, seed, rank), scale=np.float32(scale))


def deltas(x):
    """{site: [L, F, I]}, float64."""
    as64 = lambda tree: {site: np.asarray(value, np.float64) for site, value in tree.items()}
    a, b = as64(x.a), as64(x.b)
    return {site: float(x.scale) * np.einsum("lrf,lri->lfi", b[site], a[site]) for site in a}


def assert_deltas(actual, expected, atol=2e-5):
    actual = deltas(actual)
    assert actual.keys() == expected.keys()
    for site in expected:
        np.testing.assert_allclose(actual[site], expected[site], atol=atol)


def test_concatenated_ranks_are_the_sum_of_deltas():
    first, second = adapter(1), adapter(2, rank=5, scale=-0.3)
    both = concatenate([first, second])
    assert both.rank == 8
    one, two = deltas(first), deltas(second)
    assert_deltas(both, {site: one[site] + two[site] for site in one})


def test_a_weighted_sum_is_that_of_the_deltas_and_a_weight_of_zero_takes_no_rank():
    first, second = adapter(1), adapter(2, rank=5)
    one, two = deltas(first), deltas(second)
    assert_deltas(weighted_sum([first, second], [0.25, -2.0]), {site: 0.25 * one[site] - 2 * two[site] for site in one})
    chosen = weighted_sum([first, second], [1.0, 0.0])
    assert chosen.rank == first.rank
    assert_deltas(chosen, one)
    assert_deltas(weighted_sum([first], [1.0]), one)
    assert not any(value.any() for value in deltas(weighted_sum([first, second], [0.0, 0.0])).values())


def test_recompression_loses_nothing_where_the_rank_suffices():
    both = weighted_sum([adapter(1), adapter(2)], [1.0, 0.5])
    for rank in (6, 9):
        same, error = recompress(both, rank)
        assert same.rank == rank
        assert error < 1e-3
        assert_deltas(same, deltas(both))


def test_recompression_is_the_truncated_svd_and_its_error_is_what_was_cut():
    both = weighted_sum([adapter(1), adapter(2)], [1.0, 0.5])
    small, error = recompress(both, 2)
    cut = whole = 0.0
    for site, delta in deltas(both).items():
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        np.testing.assert_allclose(
            deltas(small)[site], np.einsum("lfr,lr,lri->lfi", u[..., :2], s[:, :2], v[:, :2]), atol=1e-4
        )
        cut, whole = cut + (s[:, 2:] ** 2).sum(), whole + (s**2).sum()
    np.testing.assert_allclose(error, np.sqrt(cut / whole), rtol=1e-4)
    assert 0.1 < error < 1


def ties_reference(deltas, weights, density):
    """TIES-Merging of [n, F, I], one value at a time."""
    trimmed = []
    for delta in deltas:
        kept = max(round(density * delta.size), 1)
        least = sorted(abs(value) for value in delta.flat)[-kept]
        trimmed.append(np.where(abs(delta) >= least, delta, 0))
    out = np.zeros_like(deltas[0])
    for place in np.ndindex(out.shape):
        values = [float(t[place]) for t in trimmed]
        sign = np.sign(sum(w * v for w, v in zip(weights, values, strict=True)))
        agreeing = [(w, v) for w, v in zip(weights, values, strict=True) if v and np.sign(v) == sign]
        if agreeing:
            out[place] = sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) * sum(weights)
    return out


@pytest.mark.parametrize(("weights", "density"), [((1.0, 1.0, 1.0), 0.2), ((0.5, 0.3, 0.2), 0.5), ((2.0, 0.1, 1.0), 1.0)])
def test_ties_merging_is_the_papers(weights, density):
    parts = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    merged = ties_merge(parts, np.asarray(weights, np.float32), density)
    np.testing.assert_allclose(merged, ties_reference(parts, weights, density), atol=1e-5)


def test_ties_of_adapters_merges_their_deltas_site_by_site():
    parts = [adapter(1), adapter(2), adapter(3, rank=2)]
    merged, error = ties(parts, [0.5, 0.3, 0.2], 0.3, rank=16)
    assert error < 1e-3  # no site of this shape has a higher rank
    each = [deltas(part) for part in parts]
    for site in ("q", "down"):
        for layer in range(CONFIG.num_layers):
            expected = ties_reference([x[site][layer] for x in each], [0.5, 0.3, 0.2], 0.3)
            np.testing.assert_allclose(deltas(merged)[site][layer], expected, atol=1e-4)
    assert ties(parts, [0.5, 0.3, 0.2], 0.3, rank=2)[1] > 0.1


def test_ties_of_one_is_itself_and_a_weight_of_zero_leaves_out():
    first, second = adapter(1), adapter(2)
    for parts, weights in (([first], [1.0]), ([first, second], [1.0, 0.0])):
        merged, error = ties(parts, weights, 1.0, first.rank)
        assert error < 1e-3
        assert_deltas(merged, deltas(first))


def test_what_cannot_be_merged_is_refused():
    first = adapter(1)
    other = random_adapter(small_config(), 1)
    partial = dataclasses.replace(first, a={"q": first.a["q"]}, b={"q": first.b["q"]})
    for parts, weights, message in (
        ([first, other], [1, 1], "differ in sites or shapes"),
        ([first, partial], [1, 1], "differ in sites or shapes"),
        ([first], [1, 1], "one weight for each"),
        ([], [], "one weight for each"),
    ):
        with pytest.raises(ArtefactError, match=message):
            weighted_sum(parts, weights)
    for weights, density in (([-1.0], 0.5), ([0.0], 0.5), ([1.0], 0.0), ([1.0], 1.5)):
        with pytest.raises(ArtefactError, match="TIES needs"):
            ties([first], weights, density, 2)
