"""Schedules reach what they say at the step they say; decay, clipping and freezing touch the right leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax.errors import ConfigError
from memjax.train.optimizer import OptimizerConfig, decayed, make_optimizer, schedule, trainable


def rates(steps=100, **kwargs):
    at = schedule(OptimizerConfig(learning_rate=1.0, **kwargs), steps)
    return np.array([float(at(jnp.int32(i))) for i in range(steps)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_a_schedule_warms_up_peaks_and_ends(kind, warmup):
    values = rates(schedule=kind, warmup=warmup, final=0.1)
    np.testing.assert_allclose(values[:warmup], np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
    assert values[warmup] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1)
    assert (np.diff(values[warmup:]) <= 1e-6).all()


def test_shapes_of_the_schedules():
    cosine = rates(101, schedule="cosine", final=0.0)
    np.testing.assert_allclose(cosine[50], 0.5, atol=1e-6)
    np.testing.assert_allclose(cosine[25], 0.5 * (1 + np.cos(np.pi / 4)), atol=1e-6)
    np.testing.assert_allclose(rates(101, schedule="linear", final=0.0)[25], 0.75, atol=1e-6)
    wsd = rates(schedule="wsd", warmup=10, decay=0.2, final=0.0)
    assert (wsd[9:80] == 1.0).all()
    assert wsd[80] == pytest.approx(0.95)
    assert wsd[90] == pytest.approx(0.45)
    assert (rates(schedule="constant", warmup=4)[3:] == 1.0).all()


def test_a_single_step_has_a_rate():
    assert rates(1, schedule="cosine")[0] == 1.0


TREE = {
    "layers": {"attn_norm": jnp.ones((2, 3)), "q": jnp.ones((2, 3, 4)), "q_bias": jnp.ones((2, 4))},
    "gain": jnp.ones(3),
}


def test_norms_biases_and_vectors_are_not_decayed():
    mask = decayed(TREE, OptimizerConfig())
    assert mask == {"layers": {"attn_norm": False, "q": True, "q_bias": False}, "gain": False}
    assert trainable(TREE, OptimizerConfig(freeze=("layers/q",))) == {
        "layers": {"attn_norm": True, "q": False, "q_bias": False},
        "gain": True,
    }


def test_decay_acts_only_where_the_mask_says():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5, clip=None)
    opt = make_optimizer(config, 10)
    updates, _ = opt.update(jax.tree.map(jnp.zeros_like, TREE), opt.init(TREE), TREE)
    np.testing.assert_allclose(updates["layers"]["q"], -0.05, rtol=1e-6)
    assert not updates["layers"]["attn_norm"].any()
    assert not updates["gain"].any()


def test_it_is_adamw_after_clipping():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.01, clip=1.0, beta2=0.99)
    ours = make_optimizer(config, 10)
    mask = decayed(TREE, config)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, 0.9, 0.99, 1e-8, weight_decay=0.01, mask=mask))
    a, b = ours.init(TREE), theirs.init(TREE)
    for scale in (3.0, -0.1):
        grads = jax.tree.map(lambda x, s=scale: s * x, TREE)
        got, a = ours.update(grads, a, TREE)
        want, b = theirs.update(grads, b, TREE)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_frozen_leaves_count_neither_in_norm_nor_in_updates():
    tree = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    grads = {"a": jnp.full((2, 2), 0.1), "b": jnp.full((2, 2), 1e6)}
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5, freeze=("b",), eps=1.0)
    got, _ = (opt := make_optimizer(config, 10)).update(grads, opt.init(tree), tree)
    alone, _ = opt.update({"a": grads["a"], "b": 0 * grads["b"]}, opt.init(tree), tree)
    np.testing.assert_array_equal(got["a"], alone["a"])
    assert not got["b"].any()


def test_bad_settings_are_refused():
    for kwargs in ({"beta1": 2.0}, {"clip": 0.0}, {"warmup": -1}, {"final": -0.1}):
        with pytest.raises(ConfigError, match="optimizer." + next(iter(kwargs))):
            OptimizerConfig(**kwargs)
    with pytest.raises(ConfigError, match="warmup is 10 of 10 steps"):
        schedule(OptimizerConfig(warmup=10), 10)


def test_muon_orthogonalises_stacked_matrices_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = {"layers": {"q": jnp.ones((2, 6, 4)), "norm": jnp.ones((2, 6))}, "embed": jnp.ones((9, 6))}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = make_optimizer(OptimizerConfig(kind="muon", learning_rate=1.0, schedule="constant", clip=None), 10)
    update = optimizer.update(grads, optimizer.init(params), params)[0]
    adam = optax.adamw(1.0, b1=0.9, b2=0.95, weight_decay=0.0, nesterov=True)
    other = adam.update(grads, adam.init(params), params)[0]
    for layer in range(2):
        values = np.linalg.svd(update["layers"]["q"][layer], compute_uv=False)
        assert values.max() / values.min() < 2
        assert np.linalg.cond(grads["layers"]["q"][layer]) > 2
        # Entries of about 0.2, where Adam's first update has entries of one (arXiv 2502.16982, section 2.2).
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(update["layers"]["q"][layer] ** 2)), 0.2, rtol=0.3)
    np.testing.assert_allclose(update["embed"], other["embed"], rtol=1e-5)
    np.testing.assert_allclose(update["layers"]["norm"], other["layers"]["norm"], rtol=1e-5)


def test_muon_takes_the_leaves_that_are_named_as_matrices_over_their_last_two_axes():
    rng = np.random.default_rng(0)
    params = {"project": {"up": jnp.ones((6, 4))}, "head": jnp.ones((2, 3, 6, 4)), "embed": jnp.ones((9, 6))}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    told = OptimizerConfig(kind="muon", learning_rate=1.0, schedule="constant", clip=None, matrices=("project", "head"))
    update, plain = (
        (made := make_optimizer(config, 10)).update(grads, made.init(params), params)[0]
        for config in (told, dataclasses.replace(told, matrices=()))
    )
    for x in (update["project"]["up"], *update["head"].reshape(-1, 6, 4)):
        values = np.linalg.svd(x, compute_uv=False)
        assert values.max() / values.min() < 2
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(x**2)), 0.2, rtol=0.3)
    np.testing.assert_allclose(update["embed"], plain["embed"], rtol=1e-5)
    assert np.abs(plain["head"]).min() > 0.9  # Adam's first step
