"""The low-rank delta per row, against the merged weights."""

import numpy as np
import pytest

from memjax.kernels.slot_lora import slot_delta


def test_each_row_gets_the_delta_of_its_slot():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 5)).astype(np.float32)
    a, b = rng.normal(size=(3, 2, 5)).astype(np.float32), rng.normal(size=(3, 2, 7)).astype(np.float32)
    scale = np.array([0.0, 2.0, -1.0], np.float32)
    slot_ids = np.array([2, 0, 1, 2])
    mask = rng.integers(0, 2, size=(4, 3))
    got = slot_delta(x, a, b, scale, slot_ids, mask)
    for row, slot in enumerate(slot_ids):
        merged = scale[slot] * a[slot].T @ b[slot]
        np.testing.assert_allclose(got[row], mask[row, :, None] * (x[row] @ merged), atol=1e-5)


def test_one_slot_for_all_rows_needs_no_ids_and_several_do():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5)).astype(np.float32)
    a, b = rng.normal(size=(1, 2, 5)).astype(np.float32), rng.normal(size=(1, 2, 7)).astype(np.float32)
    one = slot_delta(x, a, b, np.ones(1, np.float32))
    np.testing.assert_allclose(one, slot_delta(x, a, b, np.ones(1, np.float32), np.zeros(2, int)), atol=1e-6)
    with pytest.raises(ValueError, match="slot_ids"):
        slot_delta(x, np.repeat(a, 2, 0), np.repeat(b, 2, 0), np.ones(2, np.float32))
