"""A grown base computes what the small one did, and everything new in it can learn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import ConfigError
from memjax.evaluate.grow import grow, start_from
from memjax.evaluate.tiny import Shape, model_files
from memjax.models.config import ModelConfig
from memjax.models.decoder import init_params, make_model, unembed
from memjax.models.weights.export import save_folder
from tests.support import read, small_base

SMALL = small_base()
LARGER = dataclasses.replace(
    SMALL.config,
    num_layers=SMALL.config.num_layers + 1,
    width=SMALL.config.width + 16,
    mlp_width=SMALL.config.mlp_width + 8,
    num_heads=2 * SMALL.config.num_heads,
    num_kv_heads=2 * SMALL.config.num_kv_heads,
    norm_eps=1e-9,
)
OLD = dataclasses.replace(SMALL.config, norm_eps=1e-9)  # the epsilon is the one thing that growing changes
TOKENS = np.random.default_rng(0).integers(0, OLD.vocab_size, (2, 12))


def logits(config, params):
    model = make_model(config)
    positions = np.tile(np.arange(TOKENS.shape[1]), (2, 1))
    return unembed(model, params, read(model, params, jnp.asarray(TOKENS), jnp.asarray(positions)).hidden)


def test_a_grown_base_computes_the_same():
    grown = grow(SMALL.params, OLD, LARGER, jax.random.key(0))
    np.testing.assert_allclose(logits(LARGER, grown), logits(OLD, SMALL.params), atol=2e-5)


def test_all_that_is_new_learns():
    grown = grow(SMALL.params, OLD, LARGER, jax.random.key(0))
    slope = jax.grad(lambda params: (logits(LARGER, params) ** 2).mean())
    # What reads zeros, or is read by zeros, learns one step after what writes there.
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, grown, slope(grown))
    for name, leaf in slope(moved)["layers"].items():
        assert np.asarray(leaf != 0).mean() > 0.99, name


def test_a_base_does_not_shrink_or_change_its_kind():
    for change in (
        {"width": OLD.width - 8},
        {"num_layers": 1},
        {"head_size": OLD.head_size + 8},
        {"num_heads": 4 * OLD.num_heads},
    ):
        with pytest.raises(ConfigError):
            grow(SMALL.params, OLD, dataclasses.replace(LARGER, **change), jax.random.key(0))


def test_training_starts_from_a_folder(tmp_path):
    shape = Shape(layers=2, width=32, mlp=48, heads=2, kv_heads=1, head_size=16, window=256)
    files = model_files(shape)
    config = ModelConfig.from_hf(json.loads(files["config.json"]))
    params = init_params(config, jax.random.key(1))
    save_folder(tmp_path, config, params, files)
    again = start_from(tmp_path, config, jax.random.key(0))
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(left, right)
