"""The slot kernel against the reference, interpreted on CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from memjax.kernels.slot_lora import slot_delta
from memjax.kernels.slot_lora.block_sizes import Shape, block_size, vmem_bytes
from memjax.kernels.slot_lora.pallas_tpu import rows_delta
from memjax.kernels.slot_lora.reference import slot_delta_reference
from memjax.kernels.vmem import VMEM_BUDGET


def make(batch=5, length=1, slots=7, rank=3, size_in=40, size_out=25, x_dtype=jnp.float32, dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, size_in)).astype(x_dtype)
    a = (rng.normal(size=(slots, rank, size_in)) / size_in**0.5).astype(dtype or x_dtype)
    b, scale = rng.normal(size=(slots, rank, size_out)).astype(dtype or x_dtype), rng.normal(size=slots).astype(np.float32)
    a[0], b[0], scale[0] = 0, 0, 0
    return x, a, b, scale


@partial(jax.jit, static_argnames=("interpret",))
def run(x, a, b, scale, slot_ids, interpret=True):
    return rows_delta(x, a, b, scale[slot_ids], slot_ids, interpret=interpret)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "tolerance"),
    [(jnp.float32, jnp.float32, 1e-5), (jnp.bfloat16, jnp.bfloat16, 2e-2), (jnp.float32, jnp.bfloat16, 1e-5)],
)
@pytest.mark.parametrize("length", [1, 3])
def test_equals_the_reference(x_dtype, dtype, tolerance, length):
    x, a, b, scale = make(x_dtype=x_dtype, dtype=dtype, length=length)
    slot_ids = jnp.array([3, 0, 6, 3, 1])  # one twice, apart; slot 0 between
    got = run(x, a, b, scale, slot_ids)
    assert got.dtype == x_dtype
    expected = slot_delta_reference(x, a, b, scale, slot_ids)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), tolerance, tolerance)


def test_slot_zero_is_exactly_zero_whatever_was_left_in_memory():
    x, a, b, scale = make()
    got = np.asarray(run(x, a, b, scale, jnp.array([0, 4, 0, 0, 2])))
    assert not got[[0, 2, 3]].any()
    assert got[[1, 4]].any()
    assert not np.asarray(run(x, a, b, scale, jnp.zeros(5, jnp.int32))).any()


def test_only_the_rows_own_slots_are_read():
    x, a, b, scale = make()
    slot_ids = jnp.array([5, 2, 2, 5, 5])
    others = [0, 1, 3, 4, 6]
    clean = run(x, a, b, scale, slot_ids)
    a[others], b[others] = np.nan, np.nan
    np.testing.assert_array_equal(clean, run(x, a, b, scale, slot_ids))


def test_a_layer_is_read_in_place_with_a_mask_per_token():
    x, a, b, scale = make(length=3)
    stacked = [np.stack([np.full_like(w, np.nan), w]) for w in (a, b)]
    mask = jnp.asarray(np.random.default_rng(1).integers(0, 2, size=(5, 3)))
    slot_ids = jnp.array([1, 2, 3, 0, 1])
    expected = slot_delta_reference(x, a, b, scale, slot_ids, mask)
    for way in ("interpret", "xla"):
        got = slot_delta(x, *stacked, scale, slot_ids, mask, jnp.int32(1), kernels=way)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_output_in_several_blocks(monkeypatch):
    import memjax.kernels.slot_lora.pallas_tpu as kernel

    x, a, b, scale = make(size_out=300)
    monkeypatch.setattr(kernel, "block_size", lambda shape: 128)
    slot_ids = jnp.array([1, 2, 3, 0, 1])
    expected = slot_delta_reference(x, a, b, scale, slot_ids)
    got = rows_delta(x, a, b, scale[slot_ids], slot_ids, interpret=True)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_tpu_interpret_mode_finds_no_access_out_of_bounds():
    arrays = (*make(length=2), jnp.array([1, 2, 3, 0, 1]))
    one, other = (run(*arrays, interpret=interpret) for interpret in (pltpu.InterpretParams(), True))
    np.testing.assert_array_equal(one, other)


def test_refuses_with_a_reason_and_the_api_falls_back():
    slot_ids = jnp.array([1, 2, 3, 0, 1])
    long, ints = make(length=129), make(dtype=jnp.int8)
    for reason, (*arrays, _) in {"more than 128": long, "int8": ints, "VMEM": make(size_in=2**20, rank=8, slots=2)}.items():
        with pytest.raises(NotImplementedError, match=reason):
            rows_delta(*arrays, np.ones(5, np.float32), slot_ids)
    one, other = (slot_delta(*long, slot_ids, kernels=way) for way in ("pallas", "xla"))
    np.testing.assert_array_equal(one, other)


def test_block_sizes_fit_with_room_to_spare():
    for size_in, size_out in ((4096, 4096), (4096, 14336), (14336, 4096), (2304, 9216), (9216, 2304)):
        for length, rank in ((1, 8), (1, 128), (16, 8), (64, 16)):
            shape = Shape(length, size_in, size_out, rank, jnp.bfloat16, jnp.bfloat16)
            size = block_size(shape)
            assert vmem_bytes(shape, size) <= VMEM_BUDGET
            assert size == size_out or size % 128 == 0
