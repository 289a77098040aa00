"""`memjax plan`: does a step fit a TPU slice, and what binds it, without having one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from memjax.cli.common import console, emit, json_option
from memjax.errors import ConfigError

if TYPE_CHECKING:
    from memjax.plan.changes import Change
    from memjax.plan.report import Report

UNFIT = 3  # exit status: the plan was made, and the step does not fit
FOLDER = "configs/plans"


@click.command(
    epilog="Example: memjax plan configs/plans/distill_llama_v5e.yaml --topology v6e-8 mesh.fsdp=8 distill.recipe.rows=8"
)
@click.argument("config", type=click.Path(), required=False)
@click.argument("overrides", nargs=-1)
@click.option("--topology", metavar="NAME", help="Another slice than the file's: v5e-16, v6e-8, v5p-64, v5p-4x4x12, …")
@click.option(
    "--all", "every", is_flag=True, help=f"Plan every file of a folder; CONFIG is the folder, {FOLDER} by default."
)
@json_option
@click.pass_context
def plan(
    ctx: click.Context, config: str | None, overrides: tuple[str, ...], topology: str | None, every: bool, as_json: bool
) -> None:
    """Compile the real step of CONFIG ahead of time for a TPU slice, and report memory, work and the bound on time.

    No TPU is needed, only its compiler: pip install 'memjax[tpu]'. OVERRIDES are key=value pairs. All numbers are per
    device and estimates of the compiler; nothing is run. Exit status 3 when the step does not fit, with the nearest change
    that would.
    """
    # Plans are for chips that are only described; a chip of this machine must not be taken for them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from memjax.cli.train import file_and_overrides

    path, given = file_and_overrides(config, overrides)
    if topology and any(text.startswith("topology=") for text in given):
        raise ConfigError("the topology is given twice, as an option and as an override; keep one")
    if topology:
        given = (*given, f"topology={topology}")
    if not every and path is None:
        raise ConfigError(f"no plan is named; give a file such as {FOLDER}/distill_llama_v5e.yaml, or --all")
    files = plan_files(Path(path or FOLDER)) if every else [Path(path or "")]
    screen = console(as_json)
    found = [planned(file, given, screen) for file in files]
    if as_json:
        emit([told for _, told in found] if every else found[0][1])
    if not all(report.fits for report, _ in found):
        ctx.exit(UNFIT)


def plan_files(folder: Path) -> list[Path]:
    """The plans of a folder in the order of their names; ConfigError where there are none."""
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise ConfigError(f"{folder} holds no plans (*.yaml); give the folder that does")
    return files


def planned(file: Path, overrides: Sequence[str], screen: Console) -> tuple[Report, dict[str, Any]]:
    """(the report of a file, the same as plain values), shown on the way; with changes where it does not fit."""
    from memjax.plan.changes import nearest_change
    from memjax.plan.config import load_plan
    from memjax.plan.report import as_json, make_report

    settings = load_plan(file, overrides)
    with screen.status(f"compiling {file.stem} for {settings.topology} …"):
        report = make_report(settings, file.stem)
    show(report, screen)
    told = as_json(report)
    if not report.fits:
        with screen.status("looking for the nearest change that fits …"):
            best, tried = nearest_change(settings, report, lambda other: make_report(other, file.stem))
        show_changes(best, tried, screen)
        told["changes"] = [change_json(one) for one in tried]
        told["nearest_change"] = None if best is None else change_json(best)
    return report, told


def show(report: Report, screen: Console) -> None:
    """Tables of what lies in HBM, what the step does, and one line with the verdict."""
    memory, where = report.memory, report.topology
    title = f"{report.name}: {report.step} on {where.name} ({where.chips} chips, {where.hosts} hosts), mesh {report.mesh}"
    table = Table("per device", "GiB", title=title)
    table.columns[1].justify = "right"
    for role, size in memory.held.items():
        table.add_row(role, gib(size))
    if memory.refused:
        table.add_row("the compiler wants in all, and refuses", gib(memory.refused))
    else:
        table.add_row("arguments, as the compiler lays them out", gib(memory.arguments))
        table.add_row("output that takes no argument's place", gib(memory.output - memory.aliased))
        table.add_row("temporaries (activations, gathered parameters)", gib(memory.temporaries))
        table.add_row("program", gib(memory.program))
    for role, size in memory.beside.items():
        table.add_row(f"beside the step: {role}", gib(size))
    table.add_section()
    table.add_row("needed", gib(memory.needed))
    table.add_row("HBM of a device", gib(report.hbm))
    screen.print(table)
    if report.work is not None:
        screen.print(work_table(report))
    verb = "fits" if report.fits else "does NOT fit"
    rest = f"{gib(abs(report.spare))} GiB {'to spare' if report.fits else 'too much'}"
    told = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    screen.print(f"{report.name} {verb} {where.name}: {rest} (the compiler's estimates; {told})", soft_wrap=True)


def work_table(report: Report) -> Table:
    """What a device does in one step, and the time that takes at peak rates."""
    assert report.work is not None
    work, seconds = report.work, report.seconds
    table = Table("one step, per device", "amount", "ms at peak", "")
    for column in (1, 2):
        table.columns[column].justify = "right"
    amounts = {
        "compute": f"{work.flops / 1e12:,.3f} TFLOP",
        "hbm": f"{work.hbm_bytes / 1e9:,.2f} GB",
        "interconnect": f"{work.sent / 1e9:,.3f} GB sent",
    }
    for side, amount in amounts.items():
        table.add_row(side, amount, f"{seconds[side] * 1e3:,.3f}", "binds" if side == report.binds else "")
    for one in work.collectives:
        table.add_row(f"  {one.kind}, {one.count} times", f"{one.bytes / 1e9:,.3f} GB", "", "")
    if report.base_work is not None:
        base = report.base_work
        table.add_section()
        for name, more, alone in (
            ("hbm", work.hbm_bytes - base.hbm_bytes, base.hbm_bytes),
            ("sent", work.sent - base.sent, base.sent),
        ):
            table.add_row(f"{name}: the slots, beside the base alone", f"{more / 1e9:,.3f} + {alone / 1e9:,.3f} GB", "", "")
    return table


def show_changes(best: Change | None, tried: Sequence[Change], screen: Console) -> None:
    """What was tried, and the nearest change that fits."""
    table = Table("change", "GiB needed", "", "known by", title="what would fit")
    for one in tried:
        how = "compiled" if one.compiled else "arithmetic only"
        table.add_row(f"{one.what}: {' '.join(one.overrides)}", gib(one.needed), "fits" if one.fits else "", how)
    screen.print(table)
    if best is None:
        screen.print("none of these fits; take a slice with more chips or HBM, or a smaller step")
    else:
        sure = "" if best.compiled else " (by arithmetic only; plan it to be sure)"
        screen.print(f"nearest change that fits{sure}: {' '.join(best.overrides)}", soft_wrap=True)


def change_json(change: Change) -> dict[str, Any]:
    """A change as plain values."""
    return {
        "what": change.what,
        "overrides": list(change.overrides),
        "needed_bytes": change.needed,
        "fits": change.fits,
        "known_by": "compiled" if change.compiled else "arithmetic",
    }


def gib(size: float) -> str:
    """Bytes in GiB, as a table shows them."""
    return f"{size / 2**30:,.3f}"
