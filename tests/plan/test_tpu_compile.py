"""Plans compile with the TPU's own compiler and fit their slices: `pip install memjax[tpu]`, one process at a time (-n 0).

The small ones take seconds. Those of Llama-3.1-8B take minutes each, and fail when a step no longer fits its slice.
"""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from memjax.evaluate.hypernet import HypernetConfig, NeedleConfig
from memjax.evaluate.indexer import IndexerTraining
from memjax.evaluate.lessons import LessonConfig
from memjax.models.decoder import abstract_params
from memjax.plan import steps
from memjax.plan.config import ServePlan, base_shape, load_plan
from memjax.plan.hlo import read_work
from memjax.plan.report import make_report
from memjax.plan.topology import described_devices, parse_topology
from memjax.sharding import MeshConfig, build_mesh
from memjax.write.hypernet.batches import BatchShape
from memjax.write.hypernet.network import HyperConfig

pytestmark = pytest.mark.tpu_compile
PLANS = Path(__file__).parents[2] / "configs" / "plans"
TRAIN = PLANS / "train_small_v5e.yaml"
LARGE = sorted({*PLANS.glob("*.yaml")} - {TRAIN})
SITES = [(128, 192), (128, 96), (128, 96), (192, 128), (128, 320), (128, 320), (320, 128)]


@pytest.fixture(autouse=True)
def compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; pip install memjax[tpu]")


@pytest.mark.parametrize("topology", ["v5e-8", "v6e-8"])
def test_training_a_small_base_fits(topology):
    report = make_report(load_plan(TRAIN, [f"topology={topology}"]), "train_small")
    assert report.fits
    # Each chip holds all parameters and both moments in float32.
    assert report.memory.held["optimizer"] == pytest.approx(2 * report.memory.held["parameters"], rel=0.01)
    assert sum(one.count for one in report.work.collectives if one.kind in ("all-reduce", "reduce-scatter")) > 0
    products = 2 * sum(i * f for i, f in SITES) + 128 * 1472
    assert report.work.flops == pytest.approx(6 * products * 64 * 128 / 8, rel=0.4)  # attention's come on top


@pytest.mark.parametrize("topology", ["v5e-8", "v6e-8"])
def test_serving_sends_rows_and_deltas_but_no_adapters(topology):
    plan = load_plan(TRAIN, [f"topology={topology}"])
    told = ServePlan(rows=16, resident=63, rank=8, prefix=64, tail=64)
    report = make_report(dataclasses.replace(plan, train=None, serve=told, mesh=MeshConfig(data=8)), "serve_small")
    assert report.fits
    adapters = told.rows * told.rank * 2 * 2 * sum(map(sum, SITES))
    assert 0 < report.work.sent - report.base_work.sent < adapters / 2


@pytest.mark.parametrize("topology", ["v5e-8", "v6e-8"])
@pytest.mark.parametrize("step", ["indexer", "hypernet"])
def test_what_is_trained_beside_a_frozen_base_fits(step, topology):
    """Rows of the batch lie one to a chip, and the base is divided among all: it is gathered layer by layer."""
    network = HyperConfig(rank=2, latents=3, blocks=1, width=64, heads=4, kv_heads=2, head_size=16)
    shape = BatchShape(groups=8, rows=1, width=256, slots=2, documents=2, chunks=1, query=64, top_k=4)
    told = {
        "indexer": IndexerTraining(data=LessonConfig(rows=8, shortest=96, longest=384, behind=128)),
        "hypernet": HypernetConfig(network=network, shape=shape, data=NeedleConfig(chunk_shares=(1.0,)), remat=True),
    }
    plan = load_plan(TRAIN, [f"topology={topology}"])
    plan = dataclasses.replace(plan, train=None, mesh=MeshConfig(fsdp=8), **{step: told[step]})
    report = make_report(plan, "small")
    assert report.fits
    assert report.memory.held["parameters"] < 2 * base_bytes(plan) / 8
    assert sum(one.count for one in report.work.collectives if one.kind == "all-gather") > 0


def base_bytes(plan):
    """Of the base's parameters in bfloat16, on one device."""
    return sum(2 * math.prod(x.shape) for x in jax.tree.leaves(abstract_params(base_shape(plan))))


@pytest.mark.parametrize(("topology", "sizes"), [("v6e-128", (1, 64, 2)), ("v5e-16", (1, 2, 8)), ("v5p-64", (2, 16, 1))])
def test_a_mesh_may_divide_a_side_of_the_slice_between_two_axes(topology, sizes):
    devices = described_devices(parse_topology(topology))
    mesh = build_mesh(MeshConfig(*sizes), devices)
    assert tuple(mesh.devices.shape) == sizes
    assert set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize("topology", ["v5e-8", "v6e-8"])
def test_a_decode_step_copies_no_cache(topology):
    """Of the heads of Llama-3.1-8B one lies on each chip and is read there by kernels: no cache is copied or gathered."""
    plan = load_plan(TRAIN)
    shape = dataclasses.replace(base_shape(plan), num_heads=32, num_kv_heads=8, head_size=128)
    mesh = build_mesh(MeshConfig(tensor=8), described_devices(parse_topology(topology)))
    told = ServePlan(rows=256, resident=0, prefix=512, tail=512)
    text = steps.lower_serve(shape, jnp.bfloat16, told, mesh).lowered.compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # the prefix and the rows' own; a token alone is XLA's
    cache = r"bf16\[2,256,512(?:,1)?,128\]"
    assert re.search(cache, text)
    assert not re.findall(rf"= {cache}\S* copy\(", text)
    gathered = sum(one.bytes for one in read_work(text).collectives if one.kind == "all-gather")
    assert gathered < 2 * 256 * 512 * 128 * 2 / 100


def test_multiplications_are_those_that_the_compiler_counts():
    plan = load_plan(TRAIN)
    devices = described_devices(parse_topology(plan.topology))
    compiled = steps.lower(plan, build_mesh(plan.mesh, devices)).lowered.compile()
    once = read_work(compiled.as_text(), loops=False)
    assert once.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)  # which has more than products


@pytest.mark.slow
@pytest.mark.parametrize("file", LARGE, ids=lambda file: file.stem)
def test_plans_fit(file):
    assert make_report(load_plan(file), file.stem).fits
