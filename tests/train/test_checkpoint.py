"""Checkpoints: only complete ones are found, arrays saved and donated stay right, and any mesh can read them."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from memjax.errors import TrainingError
from memjax.train.checkpoint import ITEMS, Checkpoints, find_step, is_complete, latest_complete, restore
from memjax.train.fit import FitConfig, fit

TREE = {"layers": {"q": jnp.arange(32.0).reshape(1, 8, 4), "norm": jnp.ones(8)}, "head": jnp.zeros((4, 8))}
quiet = partial(fit, progress=False)


def save(folder, *steps, tree=TREE, **kwargs):
    saver = Checkpoints(folder, keep_last=9, **kwargs)
    for step in steps:
        saver.save(step, trained=tree, optimizer=[tree["head"]], data={"step": step}, config={"a": [1, None, "b"]})
    saver.close()


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_items_are_separate_and_come_back(tmp_path):
    save(tmp_path / "checkpoints", 3, 7)
    assert {p.name for p in (tmp_path / "checkpoints" / "7").iterdir() if p.is_dir()} >= set(ITEMS)
    assert latest_complete(tmp_path) == tmp_path / "checkpoints" / "7" == latest_complete(tmp_path / "checkpoints")
    assert equal(restore(tmp_path), TREE)
    assert restore(tmp_path).keys() == TREE.keys()
    assert restore(tmp_path / "checkpoints" / "3", item="data") == {"step": 3}
    assert restore(tmp_path, item="config") == {"a": [1, None, "b"]}


@pytest.mark.parametrize("gone", ["optimizer", "trained/_METADATA", "data/metadata"])
def test_a_half_written_checkpoint_is_never_picked(tmp_path, gone):
    save(tmp_path, 5, 10)
    path = tmp_path / "10" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(tmp_path / "5", tmp_path / "15.orbax-checkpoint-tmp")
    assert not is_complete(tmp_path / "10")
    assert latest_complete(tmp_path).name == "5"
    assert find_step(tmp_path).name == "5"
    saver = Checkpoints(tmp_path)
    assert saver.latest() == 5
    saver.save(10, trained=TREE, optimizer=[TREE["head"]], data={}, config={})  # the step can be written again
    saver.close()
    assert latest_complete(tmp_path).name == "10"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "10.incomplete", "5"]


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    saver = Checkpoints(tmp_path)
    trash = jax.jit(lambda x: x * 0 - 1.0, donate_argnums=0)
    x = jnp.arange(1_000_000.0) + 0
    saver.save(1, trained={"x": x}, optimizer={"y": jnp.ones(1)}, data={}, config={})
    for _ in range(3):
        x = trash(x)
    saver.close()
    np.testing.assert_array_equal(restore(tmp_path)["x"], np.arange(1_000_000.0, dtype=np.float32))


def test_paths_and_targets_that_do_not_fit_are_refused_in_one_line(tmp_path):
    with pytest.raises(TrainingError, match="no such folder"):
        restore(tmp_path / "none")
    with pytest.raises(TrainingError, match="holds no complete checkpoint"):
        restore(tmp_path)
    save(tmp_path, 1)
    for target in ({"x": jnp.zeros(3)}, TREE | {"head": jnp.zeros((4, 9))}, TREE | {"extra": jnp.zeros(2)}):
        with pytest.raises(TrainingError, match="cannot be restored") as error:
            restore(tmp_path, target=target)
        assert "\n" not in str(error.value)
    for data in (tmp_path / "1" / "trained").rglob("*"):
        if data.is_file() and data.parent.name == "d":
            data.write_bytes(b"torn")
    with pytest.raises(TrainingError, match="cannot be restored"):
        restore(tmp_path)
    with pytest.raises(TrainingError, match="item='trainde'"):
        restore(tmp_path, item="trainde")


def mesh_of(shape, names):
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def test_restored_onto_another_mesh(tmp_path):
    here = jax.NamedSharding(mesh_of((8,), ("fsdp",)), jax.P("fsdp"))
    wide = here.update(spec=jax.P(None, "fsdp"))
    save(tmp_path, 1, tree=jax.device_put(TREE, {"layers": {"q": wide, "norm": here}, "head": wide}))
    there = mesh_of((2, 2), ("fsdp", "tensor"))
    for found in (
        restore(tmp_path),
        restore(tmp_path, mesh=there),
        restore(tmp_path, target=TREE),
        restore(tmp_path, shardings=jax.tree.map(lambda x: jax.NamedSharding(there, jax.P()), TREE)),
    ):
        assert equal(found, TREE)
    placed = restore(tmp_path, mesh=there)
    assert placed["layers"]["q"].sharding == jax.NamedSharding(there, jax.P(None, "fsdp", "tensor"))
    assert placed["layers"]["norm"].sharding.is_fully_replicated  # the table has no row for it
    assert len(placed["layers"]["norm"].sharding.device_set) == 4


# --- training on a mesh ---


def mlp(params, batch, key):
    hidden = jnp.tanh(jnp.einsum("bi,if->bf", batch["x"], params["up"]))
    out = jnp.einsum("bf,fo->bo", hidden, params["down"])
    error = ((out - batch["y"]) ** 2).mean(-1)
    return error.mean(), {"weight": jnp.float32(len(error))}


def problem():
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(8, 16)).astype(np.float32), "down": rng.normal(size=(16, 8)).astype(np.float32)}
    batches = [{k: rng.normal(size=(16, 8)).astype(np.float32) for k in "xy"} for _ in range(4)]
    return params, batches


def sharded(params, mesh):
    specs = {"up": jax.P("fsdp", "tensor"), "down": jax.P("tensor", "fsdp")}
    return {k: jax.device_put(v, jax.NamedSharding(mesh, specs[k])) for k, v in params.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sharded_training_equals_unsharded_and_moves_between_meshes(tmp_path, accumulate):
    params, batches = problem()
    config = FitConfig(steps=8, log_every=4, accumulate=accumulate, plot=False)
    alone = quiet(mlp, params, batches, config)
    wide, flat = mesh_of((4, 2), ("fsdp", "tensor")), mesh_of((2, 1), ("fsdp", "tensor"))
    rows = {mesh: jax.NamedSharding(mesh, jax.P("fsdp")) for mesh in (wide, flat)}
    start = sharded(params, wide)
    first = quiet(mlp, start, batches, config, batch_sharding=rows[wide], out=tmp_path, on_log=lambda step, _: step == 4)
    assert {k: v.sharding for k, v in first.params.items()} == {k: v.sharding for k, v in start.items()}
    end = quiet(mlp, sharded(params, flat), batches, config, batch_sharding=rows[flat], out=tmp_path, resume=True)
    assert len(end.params["up"].sharding.device_set) == 2
    for name in params:
        np.testing.assert_allclose(end.params[name], alone.params[name], rtol=2e-5, atol=1e-6)
    moments = restore(tmp_path, item="optimizer", mesh=wide)
    assert any(leaf.shape == (8, 16) for leaf in jax.tree.leaves(moments))


def test_explicit_axes_train_too():
    params, batches = problem()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))

    def loss(params, batch, key):
        up = jax.sharding.reshard(params["up"], jax.P())
        error = (jnp.tanh(batch["x"] @ up) @ jax.sharding.reshard(params["down"], jax.P()) - batch["y"]) ** 2
        return error.mean(), {}

    config = FitConfig(steps=4, log_every=4, accumulate=2)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P("fsdp"))
        start = jax.device_put(params, rows)
        end = quiet(loss, start, batches, config, batch_sharding=rows)
    alone = quiet(lambda p, b, k: (mlp(p, b, k)[0], {}), params, batches, config)
    assert end.params["up"].sharding.is_equivalent_to(rows, 2)
    for name in params:
        np.testing.assert_allclose(end.params[name], alone.params[name], rtol=2e-5, atol=1e-6)


def test_small_params_beside_a_sharded_frozen_base_land_on_its_mesh(tmp_path):
    mesh = mesh_of((8,), ("fsdp",))
    base = jax.device_put(jnp.arange(64.0).reshape(8, 8) / 64, jax.NamedSharding(mesh, jax.P("fsdp")))

    def loss(base, params, batch, key):
        return ((batch["x"] @ (base + params["delta"]) - batch["y"]) ** 2).mean(), {}

    _, batches = problem()
    config, start = FitConfig(steps=4, plot=False), {"delta": jnp.zeros((8, 8))}
    whole = quiet(Partial(loss, base), start, batches, config)
    quiet(Partial(loss, base), start, batches, config, out=tmp_path, on_log=lambda step, _: step == 1)
    again = quiet(Partial(loss, base), start, batches, config, out=tmp_path, resume=True)
    assert whole.params["delta"].sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P()), 2)
    assert equal(whole.params, again.params)
