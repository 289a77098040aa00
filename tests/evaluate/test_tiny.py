"""The tiny base's training: batches are pure functions of the step, rows keep examples apart, a run is a base."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from memjax.errors import ConfigError
from memjax.evaluate import tiny as t
from memjax.evaluate.pretrain_rows import make_encoder
from memjax.models.config import ModelConfig
from memjax.models.decoder import init_params, make_model, unembed
from memjax.train.base import load
from memjax.train.optimizer import OptimizerConfig
from tests.support import read_alone

CONFIG = t.TinyConfig(
    shape=t.Shape(layers=2, width=32, mlp=48, heads=2, kv_heads=1, head_size=16, window=256),
    stages=(t.Stage("copy", 128, 2, 2), t.Stage("full", 256, 2, 2)),
    optimizer=OptimizerConfig(kind="muon", learning_rate=1e-3, warmup=1),
    log_every=2,
    checked=0,
    save_every=2,
    plot=False,
)
ENCODER = make_encoder(t.build_tokenizer())
MODEL = make_model(ModelConfig.from_hf(t.hf_config(CONFIG.shape, 1456)))


def test_a_batch_depends_on_the_step_alone_and_stages_follow_each_other():
    one, two = t.batch_of(ENCODER, CONFIG, 1), t.batch_of(make_encoder(t.build_tokenizer()), CONFIG, 1)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["tokens"], t.batch_of(ENCODER, CONFIG, 0)["tokens"])
    shapes = [t.batch_of(ENCODER, CONFIG, step)["tokens"].shape for step in range(4)]
    assert shapes == [(2, 128), (2, 128), (2, 256), (2, 256)]
    used = [set(t.batch_of(ENCODER, CONFIG, step)["examples"].tolist()) for step in range(4)]
    assert all(not (used[i] & used[j]) for i in range(4) for j in range(i))


def test_rows_keep_examples_apart():
    batch = t.batch_of(ENCODER, CONFIG, 3)
    for row in range(2):
        segments, positions = batch["segments"][row], batch["positions"][row]
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert (np.diff(at) == 1).all()
            assert positions[at].tolist() == list(range(len(at)))
            assert batch["mask"][row, at[0]] == 0
        assert (positions[segments == 0] == -1).all()
        assert (batch["mask"][row][segments == 0] == 0).all()


def test_the_loss_is_that_of_each_example_read_alone():
    batch = t.batch_of(ENCODER, CONFIG, 0)
    params = jax.tree.map(lambda x: x * 3, init_params(MODEL.config, jax.random.key(0)))
    value, _ = t.base_loss(MODEL, params, batch, jax.random.key(0))
    total = weight = 0.0
    for row in range(2):
        for segment in range(1, batch["segments"][row].max() + 1):
            at = batch["segments"][row] == segment
            ids, mask = batch["tokens"][row][at], batch["mask"][row][at]
            logits = unembed(MODEL, params, read_alone(MODEL, params, ids.tolist()))
            each = optax.softmax_cross_entropy_with_integer_labels(logits[:-1], ids[1:])
            total, weight = total + float((each * mask[1:]).sum()), weight + mask[1:].sum()
    np.testing.assert_allclose(value, total / weight, rtol=1e-4)


def test_a_run_resumes_to_the_same_bits_and_is_a_base(tmp_path):
    # The schedule of a shorter run ends sooner; a constant one makes the two comparable.
    constant = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, schedule="constant"))
    half = dataclasses.replace(constant, stages=CONFIG.stages[:1])
    t.train_tiny(half, tmp_path / "run", progress=False)
    # What a run started from is not read again: it may be gone.
    gone = dataclasses.replace(constant, start=str(tmp_path / "gone"))
    resumed = t.train_tiny(gone, tmp_path / "run", resume=True, progress=False)
    straight = t.train_tiny(constant, tmp_path / "straight", progress=False)
    assert {"one_hop_80", "two_hop_80", "repeat_80"} <= {k.removeprefix("eval/") for k in straight.metrics}
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)
    run, folder = load(tmp_path / "run"), load(tmp_path / "run" / "base")
    assert run.id == folder.id
    jax.tree.map(np.testing.assert_array_equal, run.params, folder.params)
    assert load(tmp_path / "run" / "checkpoints" / "4").id == run.id
    assert load(tmp_path / "run" / "checkpoints" / "2").id != run.id


def test_a_stage_beyond_the_window_is_refused():
    with pytest.raises(ConfigError, match=r"stages\[0\].window is 1024"):
        t.TinyConfig(stages=(t.Stage(window=1024),))
