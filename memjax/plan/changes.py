"""What to change in a plan that does not fit: the nearest change that would make it, found by compiling a few."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from memjax.plan.config import PlanConfig
from memjax.plan.report import Report
from memjax.plan.topology import Topology, next_larger, parse_topology
from memjax.sharding import MeshConfig

COMPILED = 3  # changes that are compiled at most: each takes as long as the plan itself


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a plan: in words, as overrides of its file, and the plan with it.

    needed: bytes per device, by the compiler where `compiled`, else by arithmetic alone.
    """

    what: str
    overrides: tuple[str, ...]
    plan: PlanConfig
    needed: float = 0.0
    fits: bool = False
    compiled: bool = False


def nearest_change(
    plan: PlanConfig, report: Report, make: Callable[[PlanConfig], Report], limit: int = COMPILED
) -> tuple[Change | None, tuple[Change, ...]]:
    """(the first change by which the plan fits, all that were looked at), from the least intrusive to a larger slice.

    Of the candidates `limit` are compiled with `make`; those left over are judged by arithmetic, which divides what the
    plan needs by the growth of what it is divided over, and says so.
    """
    tried: list[Change] = []
    for change in candidates(plan, report.topology):
        if sum(one.compiled for one in tried) < limit:
            found = make(change.plan)
            change = dataclasses.replace(change, needed=found.memory.needed, fits=found.fits, compiled=True)
        else:
            needed = report.memory.needed * report.topology.devices / _devices(change.plan)
            change = dataclasses.replace(change, needed=needed, fits=needed <= _hbm(change.plan))
        tried.append(change)
        if change.fits:
            return change, tuple(tried)
    return None, tuple(tried)


def candidates(plan: PlanConfig, topology: Topology) -> Iterator[Change]:
    """Changes worth trying, the least intrusive first: recomputing, dividing parameters further, fewer rows, more chips."""
    if (changed := _remat(plan)) is not None:
        own = "remat=true" if plan.hypernet is not None else "recipe.remat=true"
        yield Change("recompute the layers in the backward pass", (f"{plan.step}.{own}",), changed)
    mesh = _sized(plan.mesh, topology.devices)
    if mesh.data > 1:
        wider = MeshConfig(1, mesh.data * mesh.fsdp, mesh.tensor)
        told = (f"mesh.data=1 mesh.fsdp={wider.fsdp}").split()
        yield Change("divide the parameters over the rows' devices too", tuple(told), dataclasses.replace(plan, mesh=wider))
    if (fewer := _fewer_rows(plan)) is not None:
        yield fewer
    larger = next_larger(topology)
    while larger is not None and larger.devices <= 4 * topology.devices:
        axis = "tensor" if mesh.fsdp == 1 and mesh.tensor > 1 else "fsdp"
        times = larger.devices // topology.devices
        grown = dataclasses.replace(mesh, **{axis: getattr(mesh, axis) * times})
        told = [f"topology={larger.name}", *(f"mesh.{f.name}={getattr(grown, f.name)}" for f in dataclasses.fields(grown))]
        yield Change(f"take {larger.name}", tuple(told), dataclasses.replace(plan, topology=larger.name, mesh=grown))
        larger = next_larger(larger)


def _remat(plan: PlanConfig) -> PlanConfig | None:
    if plan.distill is not None and not plan.distill.recipe.remat:
        recipe = dataclasses.replace(plan.distill.recipe, remat=True)
        return dataclasses.replace(plan, distill=dataclasses.replace(plan.distill, recipe=recipe))
    if plan.compile is not None and not plan.compile.recipe.remat:
        own = dataclasses.replace(plan.compile.recipe, remat=True)
        return dataclasses.replace(plan, compile=dataclasses.replace(plan.compile, recipe=own))
    if plan.hypernet is not None and not plan.hypernet.remat:
        return dataclasses.replace(plan, hypernet=dataclasses.replace(plan.hypernet, remat=True))
    return None


def _fewer_rows(plan: PlanConfig) -> Change | None:
    """Half the rows of a step, where that changes no recipe: a base's batch in two parts, a server's rows."""
    if plan.train is not None and plan.train.rows % (2 * plan.train.accumulate) == 0:
        parts = 2 * plan.train.accumulate
        smaller = dataclasses.replace(plan.train, accumulate=parts)
        told = (f"train.accumulate={parts}",)
        return Change("read the batch in more parts", told, dataclasses.replace(plan, train=smaller))
    if plan.hypernet is not None and plan.hypernet.shape.groups % (2 * plan.hypernet.fit.accumulate) == 0:
        parts = 2 * plan.hypernet.fit.accumulate
        run = dataclasses.replace(plan.hypernet, fit=dataclasses.replace(plan.hypernet.fit, accumulate=parts))
        told = (f"hypernet.fit.accumulate={parts}",)
        return Change("read the batch in more parts", told, dataclasses.replace(plan, hypernet=run))
    if plan.indexer is not None and plan.indexer.data.rows % (2 * plan.indexer.fit.accumulate) == 0:
        parts = 2 * plan.indexer.fit.accumulate
        taught = dataclasses.replace(plan.indexer, fit=dataclasses.replace(plan.indexer.fit, accumulate=parts))
        told = (f"indexer.fit.accumulate={parts}",)
        return Change("read the batch in more parts", told, dataclasses.replace(plan, indexer=taught))
    if plan.serve is not None and plan.serve.rows > 1:
        rows = plan.serve.rows // 2
        served = dataclasses.replace(plan, serve=dataclasses.replace(plan.serve, rows=rows))
        return Change("serve half the rows at once", (f"serve.rows={rows}",), served)
    return None


def _sized(mesh: MeshConfig, devices: int) -> MeshConfig:
    """The mesh with its 0 filled in."""
    sizes = dataclasses.asdict(mesh)
    known = 1
    for size in sizes.values():
        known *= size or 1
    return MeshConfig(**{axis: size or devices // known for axis, size in sizes.items()})


def _devices(plan: PlanConfig) -> int:
    return parse_topology(plan.topology).devices


def _hbm(plan: PlanConfig) -> float:
    return parse_topology(plan.topology).chip.hbm
