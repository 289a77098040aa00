"""The attention kernel against the reference, interpreted on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.kernels.segment_attention import Segment, attend
from memjax.kernels.segment_attention.block_sizes import BlockSizes, Shape, block_sizes, queries, vmem_bytes
from memjax.kernels.segment_attention.pallas_tpu import _blocks_to_read, attend_segment
from memjax.kernels.segment_attention.reference import attend_reference
from memjax.kernels.vmem import VMEM_BUDGET

# Sums in another order: a few units in the last place of the softmax, in the queries' dtype.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


def make(batch=3, length=1, held=300, heads=4, groups=2, size=128, q_dtype=jnp.float32, k_dtype=None, rows=None, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, heads, size)).astype(q_dtype)
    k, v = rng.normal(size=(2, rows or batch, held, groups, size)).astype(k_dtype or q_dtype)
    position = np.tile(np.arange(held, dtype=np.int32), (rows or batch, 1))
    q_position = np.tile(held - 1 + np.arange(length, dtype=np.int32), (batch, 1))
    return q, q_position, k, v, position


def both(q, q_position, k, v, position, mask=None, **told):
    """((out, lse) of the kernel, of the reference), as NumPy."""
    told = {"scale": 0.1, "softcap": None, "window": None, **told}

    @jax.jit
    def run(q, q_position, *segment):
        expected = attend_reference(q, q_position, [Segment(*segment)], **told, dtype=jnp.float32)
        return attend_segment(q, q_position, *segment, **told, interpret=True), expected

    return jax.tree.map(np.asarray, run(q, q_position, k, v, position, mask))


def assert_equal(got, expected, dtype):
    np.testing.assert_allclose(got[0], expected[0], atol=TOLERANCE[dtype])
    np.testing.assert_array_equal(np.isneginf(got[1]), np.isneginf(expected[1]))
    seen = np.isfinite(expected[1])
    np.testing.assert_allclose(got[1][seen], expected[1][seen], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("q_dtype", "sizes", "told"),
    [
        (jnp.float32, {"heads": 1, "groups": 1, "held": 77}, {}),
        (jnp.bfloat16, {"heads": 1, "groups": 1, "held": 130}, {"window": 50}),
        (jnp.float32, {"heads": 6, "groups": 2, "held": 641, "length": 3}, {"softcap": 5.0}),
        (jnp.bfloat16, {"heads": 6, "groups": 2, "held": 641, "length": 3}, {"softcap": 5.0}),
        (jnp.float32, {"heads": 4, "groups": 2, "rows": 1, "held": 257, "length": 2}, {"window": 37}),
        (jnp.bfloat16, {"heads": 4, "groups": 2, "size": 256, "rows": 1, "held": 530}, {"softcap": 2.0, "window": 100}),
    ],
)
def test_equals_the_reference(q_dtype, sizes, told):
    q, q_position, k, v, position = make(q_dtype=q_dtype, **sizes)
    assert_equal(*both(q, q_position, k, v, position, **told), q_dtype)


def test_float32_queries_over_a_bfloat16_cache_with_holes_padding_and_rows_of_any_length():
    q, q_position, k, v, position = make(batch=4, length=2, held=700, k_dtype=jnp.bfloat16)
    position[1], position[2, 10:], position[3, ::3], position[0, :600] = -1, -1, -1, -1
    q_position[2, 1], q_position[3, 0] = -1, 5
    got, expected = both(q, q_position, k, v, position)
    assert_equal(got, expected, jnp.float32)
    assert np.isneginf(got[1][1]).all()
    assert not got[0][1].any()


def test_what_lies_in_unseen_places_does_not_matter():
    q, q_position, k, v, position = make(held=300)
    position[:, 40:60], position[0] = -1, -1
    run = jax.jit(lambda k, v: attend_segment(q, q_position, k, v, position, scale=0.1, interpret=True))
    clean = run(k, v)
    k, v = k.copy(), v.copy()
    k[:, 40:60], k[0], v[:, 40:60], v[0] = 1e30, 7, 9, -5
    for one, other in zip(clean, run(k, v), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_that_see_a_shared_segment_differently():
    q, q_position, k, v, position = make(batch=3, rows=1, held=140, length=2)
    position = np.tile(position, (3, 1))
    position[1] = -1
    assert_equal(*both(q, q_position, k, v, position), jnp.float32)
    mask = np.random.default_rng(1).integers(0, 2, size=(3, 2, 140)).astype(bool)
    assert_equal(*both(q, q_position, k, v, position[:1], mask), jnp.float32)


def test_a_window_that_differs_by_layer_and_a_layer_read_in_place():
    q, q_position, k, v, position = make(held=300)
    stacked = [np.stack([np.full_like(x, np.nan), x]) for x in (k, v)]

    @jax.jit
    def read(layer, window):
        in_place = Segment(*stacked, position, layer=layer)
        told = {"scale": 0.1, "window": window}
        expected = attend(q, q_position, [Segment(k, v, position)], kernels="xla", **told)
        return attend(q, q_position, [in_place], kernels="interpret", **told), expected

    for window in (20, 10**6):
        got, expected = read(np.int32(1), np.int32(window))
        assert_equal(*(jax.tree.map(np.asarray, x) for x in (got, expected)), jnp.float32)


def test_segments_of_all_kinds_merge_into_one_softmax():
    q, q_position, k, v, position = make(batch=3, held=200, q_dtype=jnp.bfloat16)
    parts = [
        Segment(k[:1, :130], v[:1, :130], position[:1, :130]),  # a shared prefix
        Segment(
            k[:, 130:], v[:, 130:], np.where(np.arange(3)[:, None] == 1, -1, position[:, 130:])
        ),  # own tails, one empty
        Segment(k[:, :1], v[:, :1], q_position),  # the token itself: too short for a kernel
    ]
    ways = ("interpret", "xla")
    got, expected = jax.jit(lambda parts: [attend(q, q_position, parts, scale=0.1, kernels=way) for way in ways])(parts)
    assert got[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (got, expected)), atol=2e-2)
    np.testing.assert_allclose(got[1], expected[1], atol=2e-2)


def test_refuses_with_a_reason_and_the_api_falls_back():
    cases = {
        "more than 128": make(length=129, held=16, batch=1),
        "shorter than 16": make(held=15),
        "2 key/value heads of 64": make(size=64),
        "3 key/value heads": make(heads=3, groups=3),
        "int8": make(k_dtype=jnp.int8),
        "VMEM": make(batch=1, heads=256, groups=1, length=64, held=16),
    }
    for reason, arrays in cases.items():
        with pytest.raises(NotImplementedError, match=reason):
            attend_segment(*arrays, scale=0.1)
    q, q_position, k, v, position = cases["3 key/value heads"]
    one, other = (attend(q, q_position, [Segment(k, v, position)], scale=0.1, kernels=w) for w in ("pallas", "xla"))
    np.testing.assert_array_equal(one[0], other[0])


def test_blocks_that_no_query_sees_are_not_transferred():
    at = jnp.array([[700], [300], [5], [-1]])
    place = np.tile(np.arange(1024), (4, 1))
    place[0, :256] = -1
    read = lambda window: np.asarray(_blocks_to_read(at, jnp.asarray(place)[:, None], jnp.int32(window), 256))
    np.testing.assert_array_equal(read(10**6), [[1, 1, 2, 2], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(read(40), [[2, 2, 2, 2], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_block_sizes_fit_and_a_shared_segment_is_read_by_all_rows_at_once():
    for heads, groups, size in ((32, 8, 128), (8, 4, 256), (32, 1, 128)):
        for held in (16, 100, 512, 513, 2048, 131072):
            for batch, shared in ((1, False), (32, True), (256, True)):
                shape = Shape(batch, 1, heads, groups, held, size, jnp.bfloat16, jnp.bfloat16, shared)
                blocks = block_sizes(shape)
                assert vmem_bytes(shape, blocks) <= VMEM_BUDGET
                assert batch % blocks.rows == 0
                assert blocks.tokens == held or blocks.tokens % 128 == 0
                assert queries(shape, blocks) == blocks.rows * heads // groups
                assert blocks.rows == batch if batch <= 32 and shared else blocks.rows >= 1
    assert vmem_bytes(shape, BlockSizes(256, 512)) > vmem_bytes(shape, BlockSizes(128, 512))
