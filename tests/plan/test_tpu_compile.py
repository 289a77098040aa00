"""Plans compile with the TPU's own compiler and fit their slices: `pip install memjax[tpu]`, one process at a time (-n 0).

The small ones take seconds. Those of Llama-3.1-8B take minutes each, and fail when a step no longer fits its slice.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from memjax.plan import steps
from memjax.plan.config import ServePlan, load_plan
from memjax.plan.hlo import read_work
from memjax.plan.report import make_report
from memjax.plan.topology import described_devices, parse_topology
from memjax.sharding import MeshConfig, build_mesh

pytestmark = pytest.mark.tpu_compile
PLANS = Path(__file__).parents[2] / "configs" / "plans"
TRAIN = PLANS / "train_tiny_v5e.yaml"
LARGE = sorted(file for file in PLANS.glob("*llama*.yaml"))


@pytest.fixture(autouse=True)
def compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; pip install memjax[tpu]")


def serving(topology, **changes):
    """Serving the tiny base from a few slots."""
    plan = load_plan(TRAIN, [f"topology={topology}"])
    told = ServePlan(**{"rows": 16, "resident": 63, "rank": 8, "prefix": 64, "tail": 64, **changes})
    return dataclasses.replace(plan, train=None, serve=told, mesh=MeshConfig(data=8))


@pytest.mark.parametrize("topology", ["v5e-8", "v6e-8"])
def test_training_the_tiny_base_fits(topology):
    report = make_report(load_plan(TRAIN, [f"topology={topology}"]), "train_tiny")
    assert report.fits
    # Each chip holds all parameters and both moments, in float32, and the compiler pads what it lays out.
    assert report.memory.held["optimizer"] == pytest.approx(2 * report.memory.held["parameters"], rel=0.01)
    assert sum(report.memory.held.values()) <= report.memory.arguments < 1.5 * sum(report.memory.held.values())
    kinds = {one.kind for one in report.work.collectives}
    assert "all-reduce" in kinds or "reduce-scatter" in kinds  # of the gradients
    tokens = 64 * 512 / 8
    body = 6 * 128 * (2 * 6 * 32 + 2 * 3 * 32 + 3 * 320) + 128 * 1472
    assert report.work.flops == pytest.approx(6 * body * tokens, rel=0.5)  # attention's products come on top


@pytest.mark.parametrize("topology", ["v5e-8", "v6e-8"])
def test_serving_sends_rows_and_deltas_but_no_adapters(topology):
    report = make_report(serving(topology), "serve_tiny")
    assert report.fits
    assert report.work.sent > report.base_work.sent
    adapters = 16 * 8 * 6 * 2 * sum(sum(shape) for shape in SITES)
    assert report.work.sent - report.base_work.sent < adapters / 2


SITES = [(128, 192), (128, 96), (128, 96), (192, 128), (128, 320), (128, 320), (320, 128)]


def test_work_agrees_with_the_compilers_own_where_that_counts():
    plan = serving("v5e-8")
    devices = described_devices(parse_topology(plan.topology))
    compiled = steps.lower(plan, build_mesh(plan.mesh, devices)).lowered.compile()
    once = read_work(compiled.as_text(), loops=False)
    assert once.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.25)
    assert read_work(compiled.as_text()).flops > 2 * once.flops  # six layers


@pytest.mark.slow
@pytest.mark.parametrize("file", LARGE, ids=lambda file: file.stem)
def test_plans_of_llama_fit(file):
    assert make_report(load_plan(file), file.stem).fits
