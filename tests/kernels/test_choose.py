"""The choice of an implementation is an argument, and nothing but the reference runs where no TPU is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.kernels.choose import chosen
from memjax.kernels.segment_attention import Segment, attend
from memjax.kernels.slot_lora import slot_delta

WAYS = ("xla", "interpret")
Q, KV = jnp.ones((2, 1, 2, 128)), jnp.ones((2, 40, 1, 128))
POSITION = jnp.tile(jnp.arange(40), (2, 1))


def read(kernels):
    return lambda q, kv: attend(q, POSITION[:, -1:], [Segment(kv, kv, POSITION)], scale=0.1, kernels=kernels)[0]


def test_no_tpu_means_the_reference():
    assert [chosen(name) for name in ("auto", "xla", "pallas", "interpret")] == ["xla", "xla", "pallas", "interpret"]
    with pytest.raises(ValueError, match="use one of auto"):
        chosen("cuda")


def test_on_a_tpu_short_rows_are_the_kernels(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert [chosen("auto", length) for length in (1, 128, 129)] == ["pallas", "pallas", "xla"]
    for kind, way in ((jax.sharding.AxisType.Auto, "pallas"), (jax.sharding.AxisType.Explicit, "xla")):
        with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(kind,))):
            assert chosen("auto") == way


def test_the_default_is_the_reference_program():
    x, a, b, scale, ids = jnp.ones((2, 1, 8)), jnp.ones((3, 2, 8)), jnp.ones((3, 2, 8)), jnp.ones(3), jnp.array([1, 2])

    def texts(kernels):
        delta = jax.jit(lambda x: slot_delta(x, a, b, scale, ids, kernels=kernels)).lower(x).as_text()
        return jax.jit(read(kernels)).lower(Q, KV).as_text(), delta

    assert texts("auto") == texts("xla")
    assert all(one != other for one, other in zip(texts("auto"), texts("interpret"), strict=True))


def test_pallas_is_lowered_for_a_tpu_that_is_not_there():
    text = jax.jit(read("pallas")).trace(Q, KV).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
    assert "tpu_custom_call" not in jax.jit(read("xla")).trace(Q, KV).lower(lowering_platforms=("tpu",)).as_text()


def test_gradients_through_the_kernels_are_the_references():
    rng = np.random.default_rng(0)
    q, kv = (jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (Q, KV))
    grads = [jax.jit(jax.grad(lambda q, kv, way=w: (read(way)(q, kv) ** 2).sum(), (0, 1)))(q, kv) for w in WAYS]
    for one, other in zip(*grads, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    x, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 8), (3, 2, 8), (3, 2, 5)))
    ids, mask = jnp.array([2, 1]), jnp.array([[1, 0, 1], [1, 1, 1]])

    def loss(x, a, b, way):
        return (slot_delta(x, a, b, jnp.ones(3), ids, mask, kernels=way) ** 2).sum()

    grads = [jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)(x, a, b, way) for way in WAYS]
    for one, other in zip(*grads, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
