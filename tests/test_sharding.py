"""Where everything lies: goldens per base and mesh, and what is refused while they are built.

A golden that no longer fits is written anew by `python -m tests.test_sharding`; read its diff before committing it.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import sharding
from memjax.errors import ConfigError
from memjax.memory.adapter import make_slots
from memjax.models.decoder import abstract_params, empty_cache, head_counts, param_shardings, site_shapes
from memjax.sharding import MeshConfig, Rules, build_mesh
from memjax.train import step as training
from memjax.train.optimizer import OptimizerConfig
from memjax.train.step import Plan, init_state
from tests.shapes import HF, shape_of
from tests.support import small_config

GOLDENS = Path(__file__).parent / "goldens" / "sharding"
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))
SLOTS, ROWS = 64, 16


def abstract_state(config, kind="adamw"):
    """The state of training all parameters, as shapes."""
    plan = Plan(OptimizerConfig(kind=kind), 10)
    return jax.eval_shape(lambda params: init_state(params, plan), abstract_params(config))


def layout(name, sizes):
    """All that the golden of (base, mesh) holds; shapes only, nothing is made."""
    config, mesh = shape_of(name), dict(zip(sharding.MESH_AXES, sizes, strict=True))
    counts = head_counts(config)
    slots = functools.partial(make_slots, site_shapes(config), config.num_layers, SLOTS, 8)
    rows = jax.ShapeDtypeStruct((ROWS, 512), jnp.int32)
    trees = {
        "params": ("params", abstract_params(config)),
        "optimizer": ("params", abstract_state(config).opt),
        "slots": ("slots", jax.eval_shape(slots)),
        "cache": ("cache", jax.eval_shape(lambda: empty_cache(config, ROWS, 1024))),
        "batch": ("batch", dict.fromkeys(("tokens", "segments", "positions", "mask"), rows)),
    }
    told = {what: sharding.describe(tree, kind, mesh, counts=counts) for what, (kind, tree) in trees.items()}
    whole = {what: sharding.left_whole(tree, kind, mesh, counts=counts) for what, (kind, tree) in trees.items()}
    return {**told, "left_whole": {what: found for what, found in whole.items() if found}}


def golden(name, sizes):
    return GOLDENS / f"{name}-{MeshConfig(*sizes)}.json"


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("name", HF)
def test_golden(name, sizes):
    assert layout(name, sizes) == json.loads(golden(name, sizes).read_text("utf-8"))


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_lie_where_the_table_puts_them(sizes, kind):
    config = small_config(num_heads=8, num_kv_heads=4, vocab_size=96)
    mesh = build_mesh(MeshConfig(*sizes))
    places = param_shardings(config, mesh)
    params = sharding.put(jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract_params(config)), places)
    state = init_state(params, Plan(OptimizerConfig(kind=kind), 10), mesh)
    wanted = sharding.shardings(state.opt, "params", mesh, counts=head_counts(config))
    described = sharding.abstract(abstract_params(config), places)
    told = training.abstract_state(described, Plan(OptimizerConfig(kind=kind), 10), mesh)
    for leaf, place in zip(jax.tree.leaves(state.opt), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.shape, leaf.sharding, place)
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(told), strict=True):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)


def test_two_dimensions_on_one_mesh_axis_are_refused_by_the_name_of_the_array():
    with pytest.raises(ConfigError, match=r"params embed: vocab and width both lie on the mesh axis tensor"):
        Rules(width=("tensor",))
    with pytest.raises(ConfigError, match=r"cache k: batch and kv_heads both lie on the mesh axis tensor"):
        Rules(batch=("data", "tensor"))
    with pytest.raises(ConfigError, match=r"rules.mlp names 'expert'"):
        Rules(mlp=("expert",))


def test_an_array_without_a_row_in_the_table_is_refused_by_name():
    mesh = build_mesh(MeshConfig(fsdp=8))
    for tree in ({"layers": {"gait": np.zeros((2, 8, 8))}}, {"layers": {"q": np.zeros((8, 8))}}):
        with pytest.raises(ConfigError, match=r"params layers/(gait|q) \((2, )?8, 8\) has no row in the table"):
            sharding.shardings(tree, "params", mesh)
    spare = sharding.shardings({"q": np.zeros((8, 8))}, "params", mesh, strict=False)
    assert spare["q"].is_fully_replicated


def test_meshes_that_do_not_fit_the_devices_are_refused():
    assert build_mesh(MeshConfig(data=2, fsdp=0, tensor=2)).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    for config in (MeshConfig(fsdp=3), MeshConfig(data=0, tensor=3), MeshConfig(tensor=16), MeshConfig()):
        with pytest.raises(ConfigError, match="there are 8"):
            build_mesh(config)
    for wrong in ({"data": 0, "fsdp": 0}, {"tensor": -1}):
        with pytest.raises(ConfigError, match="give each axis at least 1"):
            MeshConfig(**wrong)


def test_the_mesh_of_the_environment():
    assert sharding.mesh_from({}) is None
    assert sharding.mesh_from({"MEMJAX_MESH": "1x0x4"}).shape == {"data": 1, "fsdp": 2, "tensor": 4}
    for text in ("2x4", "2x2xtwo", "2x2x4"):
        with pytest.raises(ConfigError, match=r"MEMJAX_MESH|there are 8"):
            sharding.mesh_from({"MEMJAX_MESH": text})


def test_rows_of_a_table_are_found_on_every_mesh():
    table, ids = np.arange(96 * 16, dtype=np.float32).reshape(96, 16), np.arange(40).reshape(8, 5) * 2
    for sizes in MESHES:
        mesh = build_mesh(MeshConfig(*sizes))
        placed = sharding.put({"embed": table}, sharding.shardings({"embed": table}, "params", mesh))["embed"]
        for some in (ids, ids[:3], ids[0]):
            assert np.array_equal(jax.jit(sharding.looked_up)(placed, some), table[some])


def test_heads_are_never_cut_and_as_many_axes_are_used_as_divide():
    tree = {"layers": {"k": np.zeros((2, 64, 96))}, "embed": np.zeros((96, 64))}
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    counts = {"heads": 6, "kv_heads": 3}
    assert sharding.describe(tree, "params", sizes, counts=counts) == {
        "embed": "96/tensor, 64/fsdp",
        "layers/k": "2, 64/fsdp, 96",
    }
    assert sharding.left_whole(tree, "params", sizes, counts=counts) == {"layers/k": "2 over tensor"}
    slots = {"scale": np.zeros(12)}
    assert sharding.describe(slots, "slots", sizes) == {"scale": "12/data/fsdp"}
    assert sharding.left_whole(slots, "slots", sizes) == {"scale": "0 over tensor"}


def test_the_share_of_rows_of_the_only_process_is_all():
    for sizes in MESHES:
        assert sharding.row_share(build_mesh(MeshConfig(*sizes))) == (0, 1)


def test_values_made_from_arrays_on_a_mesh_know_it_and_others_know_none():
    mesh = build_mesh(MeshConfig(2, 2, 2))
    seen = []
    look = jax.jit(lambda x: (seen.append(sharding.mesh_of(x.astype(jnp.bfloat16) * 2)), x)[1])
    look(jnp.ones(8))
    look(jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P("data"))))
    assert seen[0] is None
    assert seen[1].shape == mesh.shape
    assert sharding.mesh_of(jnp.ones(8)) is None
    explicit = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))
    assert sharding.mesh_of(jax.device_put(jnp.ones(8), jax.NamedSharding(explicit, jax.P("fsdp")))) is None


def test_slots_are_made_in_their_places_and_stay_there():
    config = small_config()
    mesh = build_mesh(MeshConfig(2, 2, 2))
    slots = make_slots(site_shapes(config), config.num_layers, 16, 4, mesh=mesh)
    for leaf in jax.tree.leaves(slots):
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    assert dataclasses.asdict(MeshConfig(2, 2, 2)) == mesh.shape


if __name__ == "__main__":
    for base in HF:
        for shape in MESHES:
            golden(base, shape).write_text(json.dumps(layout(base, shape), indent=1) + "\n", encoding="utf-8")
