"""The report of a plan: what a step holds per device, what it does, how long that takes at least, and whether it fits.

Everything is an estimate made before the program has run anywhere. Memory is the compiler's own (`memory_analysis`, or its
words where it refuses); work is read from the compiled program (`plan.hlo`); times divide by peak rates, so they are lower
bounds, and the side that binds is the one that no tuning of the others can hide.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memjax.errors import ConfigError
from memjax.plan.hlo import Collective, Work, read_work
from memjax.plan.topology import GIB, Topology, described_devices, parse_topology

if TYPE_CHECKING:
    from memjax.plan.config import PlanConfig

BINDS = ("compute", "hbm", "interconnect")
_UNITS = {"": 1.0, "K": 1024.0, "M": 1024.0**2, "G": GIB, "T": 1024.0**4}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device. arguments, output, aliased (output in their place), temporaries, program: the compiler's.

    held: arguments by role, beside: what else the process holds; both summed up from shapes and shardings. When the
    compiler refused, `refused` is what it wanted in all, and its own numbers are 0.
    """

    held: Mapping[str, float]
    beside: Mapping[str, float]
    arguments: float = 0.0
    output: float = 0.0
    aliased: float = 0.0
    temporaries: float = 0.0
    program: float = 0.0
    refused: float = 0.0

    @property
    def needed(self) -> float:
        """All that must be in HBM while the step runs."""
        step = self.arguments + self.output - self.aliased + self.temporaries + self.program
        return max(step, self.refused) + sum(self.beside.values())


@dataclasses.dataclass(frozen=True)
class Report:
    """A plan that was compiled (or refused by the compiler) for a topology; see the module. work is None where refused.

    base_work: of the same decode step by the base alone, without slots; None for other steps.
    """

    name: str
    step: str
    topology: Topology
    mesh: str
    memory: Memory
    work: Work | None
    compile_seconds: float
    versions: Mapping[str, str]
    base_work: Work | None = None

    @property
    def hbm(self) -> float:
        """Bytes of HBM that a program may use per device."""
        return self.topology.chip.hbm

    @property
    def spare(self) -> float:
        """Bytes left over per device; negative where it does not fit."""
        return self.hbm - self.memory.needed

    @property
    def fits(self) -> bool:
        """Whether the step fits with all that lies beside it."""
        return self.spare >= 0

    @property
    def seconds(self) -> dict[str, float]:
        """{side: seconds} of one step at the peak rates of a device; empty where the compiler refused."""
        if self.work is None:
            return {}
        chip = self.topology.chip
        sides = (
            (self.work.flops, chip.flops),
            (self.work.hbm_bytes, chip.hbm_bandwidth),
            (self.work.sent, chip.ici_bandwidth),
        )
        return {side: done * chip.devices / rate for side, (done, rate) in zip(BINDS, sides, strict=True)}

    @property
    def binds(self) -> str | None:
        """The side that takes longest."""
        seconds = self.seconds
        return max(seconds, key=lambda side: seconds[side]) if seconds else None


def make_report(config: PlanConfig, name: str, topology: Topology | None = None) -> Report:
    """Compiles the step of a plan for its topology (or another) without a device of it. ConfigError where it cannot be.

    A program that the compiler refuses for want of memory is a report too: one that does not fit.
    """
    from memjax.plan.steps import lower
    from memjax.sharding import build_mesh

    topology = parse_topology(config.topology) if topology is None else topology
    mesh = build_mesh(config.mesh, described_devices(topology))
    shape = "x".join(str(n) for n in mesh.shape.values())
    report = compile_step(lower(config, mesh), name, config.step, topology, shape)
    if config.serve is None or not config.serve.resident or report.work is None:
        return report
    alone = dataclasses.replace(config, serve=dataclasses.replace(config.serve, resident=0))
    return dataclasses.replace(report, base_work=compile_step(lower(alone, mesh), name, "serve", topology, shape).work)


def compile_step(step: Any, name: str, kind: str, topology: Topology, mesh: str) -> Report:
    """The report of a lowered `plan.steps.Step`."""
    from memjax.plan.steps import bytes_of

    held = {role: bytes_of(tree) for role, tree in step.held.items()}
    beside = {role: bytes_of(tree) for role, tree in step.beside.items()}
    began = time.perf_counter()
    told: dict[str, Any] = {"name": name, "step": kind, "topology": topology, "mesh": mesh, "versions": versions()}
    try:
        compiled = step.lowered.compile()
    except Exception as error:  # jaxlib's own class, which has moved between versions
        refused = wanted_bytes(str(error))
        if refused is None:
            raise
        memory = Memory(held, beside, refused=refused)
        return Report(**told, memory=memory, work=None, compile_seconds=time.perf_counter() - began)
    seconds = time.perf_counter() - began
    found = compiled.memory_analysis()
    memory = Memory(
        held,
        beside,
        float(found.argument_size_in_bytes),
        float(found.output_size_in_bytes),
        float(found.alias_size_in_bytes),
        float(found.temp_size_in_bytes),
        float(found.generated_code_size_in_bytes),
    )
    return Report(**told, memory=memory, work=read_work(compiled.as_text()), compile_seconds=seconds)


def wanted_bytes(message: str) -> float | None:
    """The bytes that the compiler wanted when it says that memory is exhausted; None for any other message."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    for pattern in (r"Used ([\d.]+)([KMGT]?) of", r"\(([\d.]+)([KMGT]?)i?B?\) exceeds", r"allocate ([\d.]+)([KMGT]?)"):
        if found := re.search(pattern, message):
            return float(found[1]) * _UNITS[found[2]]
    raise ConfigError(f"the compiler ran out of memory and does not say how much it wanted: {message.splitlines()[0]}")


def versions() -> dict[str, str]:
    """The versions that an estimate depends on."""
    import importlib.metadata as metadata

    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values: bytes, seconds, counts; everything per device."""
    memory, work = report.memory, report.work
    told: dict[str, Any] = {
        "plan": report.name,
        "step": report.step,
        "topology": report.topology.name,
        "shape": report.topology.shape,
        "chips": report.topology.chips,
        "hosts": report.topology.hosts,
        "devices": report.topology.devices,
        "mesh": report.mesh,
        "fits": report.fits,
        "hbm_bytes": report.hbm,
        "needed_bytes": memory.needed,
        "spare_bytes": report.spare,
        "memory": {
            "held": dict(memory.held),
            "beside": dict(memory.beside),
            **{n: getattr(memory, n) for n in ("arguments", "output", "aliased", "temporaries", "program", "refused")},
        },
        "estimates_by": "the compiler, ahead of time; nothing was run",
        "compile_seconds": report.compile_seconds,
        "versions": dict(report.versions),
    }
    if work is not None:
        told |= {
            "flops": work.flops,
            "bytes_accessed": work.hbm_bytes,
            "bytes_sent": work.sent,
            "collectives": {one.kind: _collective(one) for one in work.collectives},
            "seconds_at_peak": report.seconds,
            "binds": report.binds,
        }
    if work is not None and report.base_work is not None:
        base = report.base_work
        told["base_alone"] = {"bytes_accessed": base.hbm_bytes, "bytes_sent": base.sent, "flops": base.flops}
        told["for_the_slots"] = {
            "bytes_held": memory.held.get("slots", 0.0),
            "bytes_accessed": work.hbm_bytes - base.hbm_bytes,
            "bytes_sent": work.sent - base.sent,
        }
    return told


def _collective(one: Collective) -> dict[str, float]:
    return {"count": one.count, "bytes": one.bytes, "sent": one.sent}
