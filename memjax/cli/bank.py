"""`memjax bank`: what a bank holds, and taking things out of it."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import click
from rich.table import Table

from memjax.cli.common import bank_option, console, emit, json_option, namespace_option


@click.group()
def bank() -> None:
    """List, show, verify and delete the memories of a bank."""


@bank.command("list", epilog="Example: memjax bank list --bank ./bank")
@bank_option
@namespace_option
@json_option
def list_memories(bank_path: str, namespace: str, as_json: bool) -> None:
    """List the memories of a bank."""
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        entries = opened.list(namespace)
    if as_json:
        emit([_plain(entry) for entry in entries])
        return
    table = Table("name", "kind", "version", "size", "written", "id")
    for entry in entries:
        size = f"{entry.bytes / 2**20:.1f} MiB"
        table.add_row(entry.name, entry.kind, str(entry.version), size, _time(entry.created_at), entry.id[:12])
    console().print(table if entries else "the bank is empty; write something into it: memjax write notes.txt --bank DIR")


@bank.command(epilog="Example: memjax bank show trip --bank ./bank")
@click.argument("name")
@bank_option
@namespace_option
@json_option
def show(name: str, bank_path: str, namespace: str, as_json: bool) -> None:
    """Show one memory: what it was written from, how it went, and what it is gated by."""
    from memjax.bank.store import open_bank
    from memjax.memory.files import read_manifest

    with open_bank(bank_path) as opened:
        entry = opened.get(name, namespace)
        provenance = read_manifest(opened.folder(entry.id))["provenance"]
        text = opened.text(name, namespace) or ""
        gate = opened.record("gate", namespace)
    if as_json:
        emit({**_plain(entry), "provenance": provenance, "text": text, "gate": gate.value if gate else None})
        return
    table = Table("field", "value", show_header=False)
    table.add_row("name", entry.name)
    table.add_row("id", entry.id)
    table.add_row("base", f"{provenance['base_name']} ({entry.base_id[:12]})")
    table.add_row("written", _time(entry.created_at))
    table.add_row("size", f"{entry.bytes / 2**20:.1f} MiB")
    for key, value in provenance["recipe"].items():
        table.add_row(f"recipe: {key}", ", ".join(value) if isinstance(value, list) else str(value))
    for key, value in provenance["metrics"].items():
        table.add_row(f"metric: {key}", f"{value:.4g}")
    if gate:
        table.add_row("gate opens below", f"{gate.value['threshold']:.3f} nats")
    table.add_row("text", text if len(text) < 400 else f"{text[:400]} ...")
    console().print(table)


@bank.command(epilog="Example: memjax bank verify --bank ./bank")
@bank_option
@json_option
@click.pass_context
def verify(ctx: click.Context, bank_path: str, as_json: bool) -> None:
    """Check every memory's files against the index; exit status 1 where one is damaged. The others keep working."""
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        report = opened.verify()
    if as_json:
        emit({"ok": report.ok, **dataclasses.asdict(report)})
    else:
        out = console()
        for problem in report.problems:
            out.print(f"[red]{problem}[/red]", soft_wrap=True)
        for orphan in report.orphans:
            out.print(f"[yellow]{orphan}: no name points to it[/yellow]", soft_wrap=True)
        out.print(f"{report.checked} memories checked, {len(report.problems)} damaged")
    ctx.exit(0 if report.ok else 1)


@bank.command(epilog="Example: memjax bank delete trip --bank ./bank")
@click.argument("name")
@bank_option
@namespace_option
@json_option
def delete(name: str, bank_path: str, namespace: str, as_json: bool) -> None:
    """Delete a memory with its text, its questions and its files."""
    from memjax.bank.add import recalibrate
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        removed = opened.delete(name, namespace)
        recalibrate(opened, namespace)
    if as_json:
        emit({"deleted": name, "ids": list(removed)})
    else:
        console().print(f"deleted {name}")


def _plain(entry: Any) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(entry).items() if key != "row"}


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
