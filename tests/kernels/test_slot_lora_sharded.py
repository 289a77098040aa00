"""Slots divided among devices give the same as slots on one, wherever the rows' slots lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.kernels.slot_lora import slot_delta
from memjax.sharding import MeshConfig, build_mesh, put, shardings

ROWS, TOKENS, SLOTS, RANK, IN, OUT, LAYERS = 13, 2, 16, 4, 24, 40, 3
DELTA = jax.jit(slot_delta, static_argnames=("kernels",))


def arrays(stacked, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    outer = (LAYERS,) if stacked else ()
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    a, b = draw(*outer, SLOTS, RANK, IN), draw(*outer, SLOTS, RANK, OUT)
    return draw(ROWS, TOKENS, IN), a, b, jnp.asarray(rng.normal(size=SLOTS), jnp.float32)


IDS = {
    "spread": np.arange(ROWS) % SLOTS,
    "random": np.random.default_rng(1).integers(0, SLOTS, ROWS),
    "one device": np.arange(ROWS) % 2 + 4,
    "one slot": np.full(ROWS, SLOTS - 1),
}


def placed(x, a, b, scale, sizes):
    mesh = build_mesh(MeshConfig(*sizes))
    rows = jax.NamedSharding(mesh, jax.P(None, None, "tensor"))
    tree = {"a": {"q": a}, "b": {"q": b}, "scale": scale}
    on = put(tree, shardings(tree, "slots", mesh, strict=a.ndim == 4))
    return jax.device_put(x, rows), on["a"]["q"], on["b"]["q"], on["scale"]


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2)], ids=["1x1x8", "2x2x2"])
def test_the_same_deltas(sizes, ids):
    given, ids = arrays(stacked=True), jnp.asarray(ids, jnp.int32)
    layer, mask = jnp.int32(1), jnp.asarray(np.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 3 > 0, jnp.float32)
    wanted = DELTA(*given, ids, mask, layer)
    got = DELTA(*placed(*given, sizes), ids, mask, layer)
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=2e-6, atol=2e-6)
    assert np.abs(np.asarray(wanted)).max() > 1


def test_no_adapter_crosses_devices():
    """What is exchanged is rows and deltas: nothing of the size of the rows' adapters, in any program."""
    given, ids = arrays(stacked=True, dtype=jnp.bfloat16), jnp.asarray(IDS["spread"], jnp.int32)
    x, *slots = placed(*given, (1, 1, 8))
    text = DELTA.lower(x, *slots, ids, None, jnp.int32(0)).compile().as_text()
    from memjax.plan.hlo import read_work

    assert 0 < read_work(text).sent <= 2 * 4 * ROWS * TOKENS * (IN + OUT)  # in float32, which the CPU computes in


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 2, 4)], ids=str)
def test_the_kernel_reads_the_slots_of_a_device(sizes):
    given, ids = arrays(stacked=True), jnp.asarray(IDS["random"], jnp.int32)
    wanted = DELTA(*given, ids, None, jnp.int32(1))
    got = DELTA(*placed(*given, sizes), ids, None, jnp.int32(1), kernels="interpret")
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_of_slots_that_are_whole_the_kernel_reads_for_the_rows_of_a_device(sizes):
    mesh = build_mesh(MeshConfig(*sizes))
    x, *slots = arrays(stacked=False)
    x, ids = x[:8], jnp.asarray(IDS["random"][:8], jnp.int32)
    x = jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    slots = [jax.device_put(each[:7], jax.NamedSharding(mesh, jax.P())) for each in slots]  # 7 do not divide
    got = DELTA(x, *slots, ids % 7, kernels="interpret")
    wanted = DELTA(np.asarray(x), *[np.asarray(each) for each in slots], ids % 7)
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_those_of_the_reference():
    given, ids = arrays(stacked=True), jnp.asarray(IDS["random"], jnp.int32)
    loss = lambda x, a, b, scale: (slot_delta(x, a, b, scale, ids, None, jnp.int32(2)) ** 2).sum()
    wanted = jax.jit(jax.grad(loss, argnums=(0, 1)))(*given)
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(*placed(*given, (2, 2, 2)))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-4)
