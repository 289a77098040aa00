"""The loop: it learns, resumes exactly, shares compilations, stops on bad numbers, and leaves the host alone."""

import os
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from memjax.errors import ConfigError, DataError, TrainingError
from memjax.train.checkpoint import latest_complete, restore
from memjax.train.data import DataConfig, Generated, batched
from memjax.train.fit import FitConfig, fit
from memjax.train.metrics import read_metrics
from memjax.train.optimizer import OptimizerConfig
from memjax.train.step import _shared_step

FAST = OptimizerConfig(learning_rate=0.05, schedule="constant")
quiet = partial(fit, progress=False)


def pair(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    x = rng.normal(size=4).astype(np.float32)
    return {"x": x, "y": np.float32(x @ np.array([1.0, -2.0, 0.5, 3.0]) + 0.7)}


DATA = Generated(pair, 64)


def squared(params, batch, key):
    error = batch["x"] @ params["w"] + params["bias"] - batch["y"]
    return jnp.mean(error**2), {"worst": jnp.abs(error).max()}


def params0():
    return {"w": jnp.zeros(4), "bias": jnp.zeros(())}


def batches(**kwargs):
    return batched(DATA, DataConfig(batch=8, **kwargs))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_it_learns_and_leaves_the_callers_params_alone():
    start = params0()
    fitted = quiet(squared, start, batches(), FitConfig(steps=300, optimizer=OptimizerConfig(learning_rate=0.05)))
    np.testing.assert_allclose(fitted.params["w"], [1.0, -2.0, 0.5, 3.0], atol=1e-2)
    assert fitted.step == 300
    assert fitted.metrics["loss"] < 1e-3
    assert fitted.metrics["worst"] >= 0
    assert fitted.metrics["steps_per_second"] > 0
    assert same(start, params0())


@pytest.mark.parametrize(
    "make",
    [
        lambda: [{k: v for k, v in b.items() if k != "examples"} for b, _ in zip(batches(), range(5), strict=False)],
        lambda: lambda step: {k: np.stack([DATA[(step * 3 + i) % 64][k] for i in range(8)]) for k in ("x", "y")},
        batches,
    ],
    ids=["list", "function", "dataset"],
)
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, make):
    config = FitConfig(steps=30, log_every=7, plot=False)
    whole = quiet(squared, params0(), make(), config)
    first = quiet(squared, params0(), make(), config, out=tmp_path, on_log=lambda step, line: step == 14)
    assert first.step == 14
    second = quiet(squared, params0(), make(), config, out=tmp_path, resume=True)
    assert second.step == 30
    assert same(whole.params, second.params)
    again = quiet(squared, params0(), make(), config, out=tmp_path, resume=True)  # nothing is left to do
    assert again.step == 30
    assert same(whole.params, again.params)


def test_resume_without_a_checkpoint_starts_and_a_used_folder_is_refused(tmp_path):
    config = FitConfig(steps=3, plot=False)
    assert quiet(squared, params0(), batches(), config, out=tmp_path, resume=True).step == 3
    with pytest.raises(ConfigError, match="--resume"):
        quiet(squared, params0(), batches(), config, out=tmp_path)


def test_resume_with_other_shapes_is_refused_in_one_line(tmp_path):
    config = FitConfig(steps=3, plot=False)
    quiet(squared, params0(), batches(), config, out=tmp_path)
    with pytest.raises(TrainingError, match="cannot be restored") as error:
        quiet(squared, {"w": jnp.zeros(5), "bias": jnp.zeros(())}, batches(), config, out=tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_fits_around_one_function_compile_once():
    def scaled(scale, params, batch, key):
        value, metrics = squared(params, batch, key)
        return scale * value, metrics

    before = _shared_step._cache_size()
    ends = [
        quiet(Partial(scaled, jnp.float32(s)), params0(), batches(), FitConfig(steps=4, log_every=2)) for s in (1, 2, 3)
    ]
    assert _shared_step._cache_size() == before + 1
    assert not same(ends[0].metrics["loss"], ends[1].metrics["loss"])


def test_the_host_reads_only_when_it_logs(monkeypatch):
    reads = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: reads.append(1) or real(x))
    quiet(squared, params0(), batches(), FitConfig(steps=40, log_every=20))
    assert len(reads) == 3  # steps 1, 20, 40


def broken(params, batch, key):
    value, metrics = squared(params, batch, key)
    return jnp.where(jnp.any(batch["x"][:, 0] == 99.0), jnp.nan, value), metrics


def test_a_bad_loss_names_step_and_examples_and_keeps_the_last_good_state(tmp_path):
    def make(index, rng):
        example = pair(index, rng)
        return example | ({"x": np.full(4, 99, np.float32)} if index == 50 else {})

    source = Generated(make, 64)
    config = DataConfig(batch=8, shuffle=False)  # example 50 is in step 7, the batch of 48..55
    with pytest.raises(TrainingError) as error:
        quiet(broken, params0(), batched(source, config), FitConfig(steps=20, log_every=5, save_every=5), out=tmp_path)
    message = str(error.value)
    assert message.startswith("step 7: the loss is nan (examples 48, 49, 50, 51, 52, 53, 54, 55)")
    assert str(latest_complete(tmp_path)) in message
    assert latest_complete(tmp_path).name == "5"
    good = quiet(squared, params0(), batched(source, config), FitConfig(steps=20, log_every=5), on_log=lambda s, _: s == 5)
    assert same(restore(tmp_path), good.params)


def test_after_a_bad_step_params_do_not_move():
    from memjax.train.step import Plan, compile_step, init_state

    plan = Plan(FAST, 10)
    state, step, key = init_state(params0(), plan), compile_step(broken), jax.random.key(0)
    good = {"x": jnp.ones((2, 4)), "y": jnp.ones(2)}
    for x in (1.0, 99.0, 1.0):
        state, _ = step(state, good | {"x": jnp.full((2, 4), x)}, key, plan=plan)
        if x == 99.0:
            frozen = jax.tree.map(np.array, (state.params, state.opt))
    assert int(state.bad) == 1
    assert int(state.step) == 3
    assert same(frozen, (state.params, state.opt))


def test_accumulated_microbatches_equal_the_whole_batch():
    def weighted(params, batch, key):
        weight = batch["m"].sum()
        error = (batch["x"] @ params["w"] - batch["y"]) ** 2
        return (error * batch["m"]).sum() / weight, {"weight": weight, "scale": batch["c"]}

    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(12, 4)).astype(np.float32),
        "y": rng.normal(size=12).astype(np.float32),
        "m": rng.integers(0, 2, size=12).astype(np.float32) + np.eye(12, dtype=np.float32)[0],
        "c": np.float32(3),
    }
    start = {"w": jnp.ones(4)}
    whole, parts = (
        quiet(weighted, start, [batch], FitConfig(steps=5, log_every=1, accumulate=n, optimizer=FAST)) for n in (1, 3)
    )
    np.testing.assert_allclose(whole.params["w"], parts.params["w"], rtol=1e-5)
    for key in ("loss", "weight", "scale", "grad_norm"):
        np.testing.assert_allclose(whole.metrics[key], parts.metrics[key], rtol=1e-5)
    with pytest.raises(ConfigError, match="12 rows; accumulate=5"):
        quiet(weighted, start, [batch], FitConfig(steps=5, accumulate=5))


def test_the_loss_sees_the_compute_dtype_and_the_state_stays_float32():
    seen = []

    def look(params, batch, key):
        seen.append(params["w"].dtype)
        return squared(params, batch, key)

    fitted = quiet(look, params0(), batches(), FitConfig(steps=2, compute="bfloat16"))
    assert set(seen) == {jnp.dtype("bfloat16")}
    assert fitted.params["w"].dtype == jnp.float32


def test_keys_differ_by_step_and_by_seed():
    def drawn(params, batch, key):
        return squared(params, batch, key)[0], {"draw": jax.random.uniform(key)}

    runs = [quiet(drawn, params0(), batches(), FitConfig(steps=3, log_every=1, seed=s)) for s in (0, 0, 1)]
    draws = [[line["draw"] for line in run.history] for run in runs]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 3


def test_best_is_kept_beside_the_last(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 2.5, 2.2])
    config = FitConfig(steps=10, log_every=10, eval_every=2, save_every=2, keep_last=1, best="score", plot=False)
    fitted = quiet(squared, params0(), batches(), config, out=tmp_path, evaluate=lambda p: {"score": next(scores)})
    assert fitted.best == (4, 1.0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "4"]
    with pytest.raises(ConfigError, match="'scoore' is not a metric"):
        quiet(squared, params0(), batches(), FitConfig(steps=2, best="scoore"), evaluate=lambda p: {"score": 1.0})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_so_and_exits(tmp_path, capsys, number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def interrupt(step, line):
        if step == 5:
            os.kill(os.getpid(), number)

    config = FitConfig(steps=50, log_every=5, plot=False)
    with pytest.raises(SystemExit) as leaving:
        quiet(squared, params0(), batches(), config, out=tmp_path, on_log=interrupt)
    assert leaving.value.code == 128 + number
    saved = latest_complete(tmp_path)
    assert saved.name == "6"  # the step in progress is finished
    assert f"{number.name} after step 6; saved {saved}" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    whole = quiet(squared, params0(), batches(), config)
    assert same(quiet(squared, params0(), batches(), config, out=tmp_path, resume=True).params, whole.params)


def test_the_data_may_run_out(tmp_path):
    fitted = quiet(squared, params0(), batches(epochs=1), FitConfig(steps=100, log_every=5, plot=False), out=tmp_path)
    assert fitted.step == 8
    assert latest_complete(tmp_path).name == "8"
    assert fitted.metrics["step"] == 8


def test_outputs_of_a_run(tmp_path):
    config = FitConfig(steps=12, log_every=4, eval_every=6, writers=("tensorboard",))
    fitted = quiet(squared, params0(), batches(), config, out=tmp_path, evaluate=lambda p: {"loss": 0.5})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 4, 6, 8, 12]
    assert lines == list(fitted.history)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "tensorboard").iterdir())
    assert restore(tmp_path, item="config")["fit"]["steps"] == 12


def test_frozen_paths_do_not_move():
    config = FitConfig(steps=5, optimizer=OptimizerConfig(freeze=("bias",), weight_decay=0.5))
    fitted = quiet(squared, {"w": jnp.ones(4), "bias": jnp.float32(2)}, batches(), config)
    assert fitted.params["bias"] == 2
    assert not np.array_equal(fitted.params["w"], np.ones(4))


def test_what_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="trained leaf n is int32"):
        quiet(squared, {"n": jnp.zeros(3, jnp.int32)}, batches(), FitConfig())
    with pytest.raises(DataError, match="empty"):
        quiet(squared, params0(), [], FitConfig())
    with pytest.raises(ConfigError, match="plain iterator"):
        quiet(squared, params0(), iter([]), FitConfig(save_every=5), out=tmp_path)
    with pytest.raises(ConfigError, match="no evaluate function"):
        quiet(squared, params0(), batches(), FitConfig(best="score"))
    with pytest.raises(ConfigError, match="steps is 0"):
        FitConfig(steps=0)
    with pytest.raises(ConfigError, match="metric 'worst' of the loss has shape"):
        quiet(lambda p, b, k: (squared(p, b, k)[0], {"worst": b["y"]}), params0(), batches(), FitConfig())
