"""Arithmetic of reports, what the compiler says when it refuses, and the nearest change that fits."""

import dataclasses
import json
from pathlib import Path

import pytest

from memjax.errors import ConfigError
from memjax.plan.changes import candidates, nearest_change
from memjax.plan.config import CompilePlan, PlanConfig, ServePlan, TrainPlan, base_shape, load_plan
from memjax.plan.hlo import Collective, Work
from memjax.plan.report import Memory, Report, as_json, wanted_bytes
from memjax.plan.topology import GIB, parse_topology
from memjax.sharding import MeshConfig
from tests.shapes import shape_of

PLANS = Path(__file__).parents[2] / "configs" / "plans"
WORK = Work(flops=197e12, hbm_bytes=2 * 819e9, collectives=(Collective("all-gather", 3, 8e9, 0.5 * 200e9),))
MEMORY = Memory({"parameters": 4 * GIB}, {"the base's own layers": GIB}, 5 * GIB, 2 * GIB, 1.5 * GIB, 3 * GIB, GIB / 4)


def report(memory=MEMORY, work=WORK, topology="v5e-16"):
    return Report("small", "serve", parse_topology(topology), "1x16x1", memory, work, 1.0, {"jax": "0"})


def test_what_is_needed_is_all_that_lies_in_hbm_at_once():
    assert MEMORY.needed == (5 + 2 - 1.5 + 3 + 0.25 + 1) * GIB
    found = report()
    assert found.fits
    assert found.spare == pytest.approx((15.75 - 9.75) * GIB)
    full = dataclasses.replace(MEMORY, temporaries=9.5 * GIB)
    assert not report(full).fits
    assert report(full).spare == pytest.approx(-0.5 * GIB)


def test_the_side_that_takes_longest_binds():
    assert report().seconds == pytest.approx({"compute": 1.0, "hbm": 2.0, "interconnect": 0.5})
    assert report().binds == "hbm"
    assert report(work=dataclasses.replace(WORK, hbm_bytes=1.0)).binds == "compute"
    # A device of tpu7x is half a chip.
    assert report(work=dataclasses.replace(WORK, flops=2307e12), topology="tpu7x-8").seconds["compute"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (37.19G) exceeds "
            "available HBM (15.75G).",
            37.19 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.", 20.5 * GIB),
        ("RESOURCE_EXHAUSTED: Attempting to allocate 512.0M.", GIB / 2),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_how_much_the_compiler_wanted(message, size):
    assert wanted_bytes(message) == (None if size is None else pytest.approx(size))


def test_a_refusal_without_a_number_is_an_error():
    with pytest.raises(ConfigError, match="does not say how much"):
        wanted_bytes("RESOURCE_EXHAUSTED: no room")


def test_a_program_that_was_refused_is_a_report_that_does_not_fit():
    refused = report(Memory({}, {"the base's own layers": GIB}, refused=20 * GIB), None)
    assert not refused.fits
    assert refused.memory.needed == 21 * GIB
    assert refused.binds is None
    assert "flops" not in json.loads(json.dumps(as_json(refused)))


def test_as_plain_values():
    told = as_json(dataclasses.replace(report(), base_work=dataclasses.replace(WORK, hbm_bytes=1e9, collectives=())))
    assert told["topology"] == "v5e-16"
    assert told["binds"] == "hbm"
    assert told["collectives"] == {"all-gather": {"count": 3, "bytes": 8e9, "sent": 0.5 * 200e9}}
    assert told["for_the_slots"]["bytes_accessed"] == pytest.approx(2 * 819e9 - 1e9)
    assert told["for_the_slots"]["bytes_sent"] == pytest.approx(0.5 * 200e9)
    json.dumps(told)


COMPILING = PlanConfig("v6e-8", "x", MeshConfig(tensor=8), compile=CompilePlan())


def made(needed_by_devices):
    """What compiles a plan in these tests: it needs these GiB in all, divided by the devices; remat halves them."""

    def make(plan):
        topology = parse_topology(plan.topology)
        half = 2 if plan.compile is not None and plan.compile.recipe.remat else 1
        memory = Memory({}, {}, temporaries=needed_by_devices * GIB / topology.devices / half)
        return dataclasses.replace(report(memory), topology=topology)

    return make


def test_the_least_change_that_fits_is_found_by_compiling():
    best, tried = nearest_change(COMPILING, made(400)(COMPILING), made(400))
    assert best.overrides == ("compile.recipe.remat=true",)
    assert best.compiled
    assert best.plan.compile.recipe.remat
    assert tried == (best,)


def test_beyond_the_limit_changes_are_arithmetic_only():
    # 800 GiB in all: 100 on each of 8, 50 with remat; 25 on each of 32.
    best, tried = nearest_change(COMPILING, made(800)(COMPILING), made(800), limit=1)
    assert [one.compiled for one in tried] == [True, False, False]
    assert best.overrides == ("topology=v6e-32", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=32")
    assert not best.compiled
    assert best.needed == 25 * GIB
    none, _ = nearest_change(COMPILING, made(80_000)(COMPILING), made(80_000))
    assert none is None


def test_changes_begin_with_the_least_intrusive():
    training = PlanConfig("v5e-16", "x", MeshConfig(data=8, fsdp=2), train=TrainPlan(rows=64))
    told = [change.overrides for change in candidates(training, parse_topology("v5e-16"))]
    assert told[:2] == [("mesh.data=1", "mesh.fsdp=16"), ("train.accumulate=2",)]
    assert told[2][0] == "topology=v5e-32"
    serving = PlanConfig("v6e-8", "x", MeshConfig(tensor=0), serve=ServePlan(rows=256))
    told = [change.overrides for change in candidates(serving, parse_topology("v6e-8"))]
    assert told[0] == ("serve.rows=128",)
    assert told[1] == ("topology=v6e-16", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=16")


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.yaml")), ids=lambda file: file.stem)
def test_files_of_plans_say_how_they_are_run(file):
    first = file.read_text("utf-8").splitlines()[0]
    assert first == f"# memjax plan configs/plans/{file.name}"
    plan = load_plan(file)
    topology = parse_topology(plan.topology)
    sizes = [size for size in dataclasses.astuple(plan.mesh) if size]
    assert topology.devices % (sizes[0] * sizes[1] * (sizes[2] if len(sizes) > 2 else 1)) == 0
    assert base_shape(plan).num_layers > 0


def test_the_shape_of_a_plan_is_the_published_one():
    assert base_shape(load_plan(PLANS / "distill_llama_v5e.yaml")) == shape_of("llama-3.1-8b")
