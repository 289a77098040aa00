"""`memjax bank`: what a bank holds, its versions, taking things out of it, and moving them between banks."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from memjax.cli.common import (
    bank_option,
    base_option,
    console,
    emit,
    json_option,
    load_base,
    namespace_option,
    read_text,
    writing_bar,
)
from memjax.errors import InputError

if TYPE_CHECKING:
    from memjax.bank.manage import Forgotten

yes_option = click.option("--yes", is_flag=True, help="Do not ask; needed where nobody can be asked.")


@click.group()
def bank() -> None:
    """List, search, update, delete, move and merge the memories of a bank."""


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
        table.add_row("gate", f"{gate.value.get('rule', 'entropy')}, opens below {gate.value['threshold']:.3f}")
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


@bank.command(epilog='Example: memjax bank search "ferry to Vask" --bank ./bank')
@click.argument("query")
@bank_option
@click.option("--limit", default=5, show_default=True, help="Show at most so many.")
@namespace_option
@json_option
def search(query: str, bank_path: str, limit: int, namespace: str, as_json: bool) -> None:
    """Find the memories whose texts match QUERY best."""
    from memjax.bank.manage import Memories
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        hits = Memories(opened).search(query, namespace, limit)
        texts = [opened.text(hit.entry.name, namespace) or "" for hit in hits]
    if as_json:
        emit([{**_plain(hit.entry), "score": hit.score} for hit in hits])
        return
    table = Table("score", "name", "text")
    for hit, text in zip(hits, texts, strict=True):
        table.add_row(f"{hit.score:.2f}", hit.entry.name, " ".join(text.split())[:100])
    console().print(table if hits else "no memory's text shares a word with that")


@bank.command(epilog="Example: memjax bank update trip notes.txt --bank ./bank")
@click.argument("name")
@click.argument("file", type=click.Path())
@bank_option
@click.option("--fast", "effort", flag_value="fast", help="Fewer steps: about half the time, fewer facts kept.")
@click.option("--thorough", "effort", flag_value="thorough", help="More questions and steps: about three times as long.")
@base_option
@namespace_option
@json_option
def update(
    name: str, file: str, bank_path: str, effort: str | None, base_name: str | None, namespace: str, as_json: bool
) -> None:
    """Write FILE into the next version of memory NAME; the one before is kept for rollback."""
    text = read_text(file)
    from memjax.bank.manage import Memories
    from memjax.bank.store import open_bank
    from memjax.write.distill import recipe

    with open_bank(bank_path) as opened, writing_bar(name) as progress:
        opened.get(name, namespace)
        base = load_base(base_name, opened.base_name)
        opened.bind_base(base.id, base.name)
        config = recipe(effort or "default", base.tokenizer.prompt_style)
        entry = Memories(opened, base, config, progress).update(name, text, namespace=namespace)
    _tell(as_json, _plain(entry), f"{name} is at version {entry.version} now ({entry.id[:12]})")


@bank.command(epilog="Example: memjax bank history trip --bank ./bank")
@click.argument("name")
@bank_option
@namespace_option
@json_option
def history(name: str, bank_path: str, namespace: str, as_json: bool) -> None:
    """Show all versions of a memory."""
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        entries = opened.history(name, namespace)
    if as_json:
        emit([_plain(entry) for entry in entries])
        return
    table = Table("version", "state", "written", "made current", "size", "id")
    for entry in entries:
        times = (_time(entry.created_at), _time(entry.updated_at))
        table.add_row(str(entry.version), entry.state, *times, f"{entry.bytes / 2**20:.1f} MiB", entry.id[:12])
    console().print(table)


@bank.command(epilog="Example: memjax bank rollback trip --to 1 --bank ./bank")
@click.argument("name")
@click.option("--to", "version", type=int, help="The version to go to; the one before by default.")
@bank_option
@namespace_option
@json_option
def rollback(name: str, version: int | None, bank_path: str, namespace: str, as_json: bool) -> None:
    """Make another version of a memory the current one."""
    from memjax.bank.manage import Memories
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        entry = Memories(opened).rollback(name, version, namespace)
    _tell(as_json, _plain(entry), f"{name} is at version {entry.version} now ({entry.id[:12]})")


@bank.command(epilog="Example: memjax bank prune trip --keep 1 --bank ./bank --yes")
@click.argument("name")
@click.option("--keep", default=0, show_default=True, help="Past versions to keep, the newest.")
@yes_option
@bank_option
@namespace_option
@json_option
def prune(name: str, keep: int, yes: bool, bank_path: str, namespace: str, as_json: bool) -> None:
    """Forget the past versions of a memory."""
    from memjax.bank.manage import Memories
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        opened.get(name, namespace)
        _confirm(f"forget past versions of {name!r}, all but {keep}", yes)
        _tell_gone(as_json, f"past versions of {name}", Memories(opened).prune(name, keep, namespace))


@bank.command(epilog="Example: memjax bank delete trip --bank ./bank --yes")
@click.argument("name")
@yes_option
@bank_option
@namespace_option
@json_option
def delete(name: str, yes: bool, bank_path: str, namespace: str, as_json: bool) -> None:
    """Forget a memory: all its versions, its text, its questions and its files."""
    from memjax.bank.manage import Memories
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        opened.get(name, namespace)
        _confirm(f"forget memory {name!r} with all its versions", yes)
        _tell_gone(as_json, name, Memories(opened).delete(name, namespace))


@bank.command("delete-all", epilog="Example: memjax bank delete-all --namespace alice --bank ./bank --yes")
@yes_option
@bank_option
@namespace_option
@json_option
def delete_all(yes: bool, bank_path: str, namespace: str, as_json: bool) -> None:
    """Forget everything in one namespace; the others keep theirs."""
    from memjax.bank.manage import Memories
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        _confirm(f"forget all {opened.count(namespace)} memories of namespace {namespace!r}", yes)
        _tell_gone(as_json, f"namespace {namespace}", Memories(opened).delete_all(namespace))


@bank.command(epilog="Example: memjax bank reset --bank ./bank --yes")
@yes_option
@bank_option
@json_option
def reset(yes: bool, bank_path: str, as_json: bool) -> None:
    """Forget everything in all namespaces, and the base that the bank is for."""
    from memjax.bank.manage import Memories
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        _confirm(f"forget all {opened.count(None)} memories of the whole bank", yes)
        _tell_gone(as_json, "the whole bank", Memories(opened).reset())


@bank.command(epilog="Example: memjax bank expire trip --days 30 --bank ./bank")
@click.argument("name")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Absent after so many days; never without it.")
@bank_option
@namespace_option
@json_option
def expire(name: str, days: float | None, bank_path: str, namespace: str, as_json: bool) -> None:
    """Say when a memory, with all its versions, becomes absent; `memjax bank purge` then removes it for good."""
    from memjax.bank.manage import Memories
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        at = None if days is None else opened.now() + days * 86400
        entry = Memories(opened).expire(name, at, namespace)
    _tell(as_json, _plain(entry), f"{name} expires {'never' if at is None else _time(at)}")


@bank.command(epilog="Example: memjax bank purge --bank ./bank")
@bank_option
@json_option
def purge(bank_path: str, as_json: bool) -> None:
    """Forget what has expired, in all namespaces."""
    from memjax.bank.manage import Memories
    from memjax.bank.store import open_bank

    with open_bank(bank_path) as opened:
        _tell_gone(as_json, "what has expired", Memories(opened).purge())


@bank.command("export", epilog="Example: memjax bank export trip --to ./trip-adapter --bank ./bank")
@click.argument("name", required=False)
@click.option("--to", metavar="PATH", required=True, help="A new folder; without NAME, a new tar file.")
@click.option("--prefix", is_flag=True, help="A buffer as a key/value prefix, which transformers reads (see the README).")
@base_option
@bank_option
@namespace_option
@json_option
def export(
    name: str | None, to: str, prefix: bool, base_name: str | None, bank_path: str, namespace: str, as_json: bool
) -> None:
    """Copy memory NAME to a folder, that of an adapter PEFT loads as it is, or the whole namespace to one tar file."""
    from memjax.bank.exchange import export_memory, export_namespace
    from memjax.bank.store import open_bank

    if prefix and name is None:
        raise InputError("--prefix is for one memory; say its NAME")
    with open_bank(bank_path) as opened:
        if name is None:
            count = export_namespace(opened, Path(to), namespace)
            _tell(as_json, {"count": count, "path": to}, f"{count} memories are in {to}, their texts too")
            return
        if prefix:
            from memjax.bank.prefix_file import export_prefix
            from memjax.write.prompts import prompt_style

            base = load_base(base_name, opened.base_name)
            entry = export_prefix(opened, base, prompt_style(base.tokenizer.prompt_style), name, Path(to), namespace)
        else:
            entry = export_memory(opened, name, Path(to), namespace)
        _tell(as_json, {**_plain(entry), "path": to}, f"{name} is in {to}")


@bank.command("import", epilog='Example: memjax bank import ./adapter --name trip --about "ferry to Vask" --bank ./bank')
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="The memory's name; the folder's by default.")
@click.option("--text", "text_file", metavar="FILE", help="The text that it was written from, to retrieve it by.")
@click.option("--about", metavar="TEXT", help="What it is about, to retrieve it by.")
@base_option
@bank_option
@namespace_option
@json_option
def import_(
    path: Path,
    name: str | None,
    text_file: str | None,
    about: str | None,
    base_name: str | None,
    bank_path: str,
    namespace: str,
    as_json: bool,
) -> None:
    """Keep the adapter, cartridge or prefix of a PEFT folder, an exported memory, or all those of a tar file of `memjax
    bank export`."""
    from memjax.bank.exchange import BaseShape, import_memory, import_namespace
    from memjax.bank.store import INDEX, open_bank
    from memjax.memory.files import MANIFEST
    from memjax.memory.kv_prefix import is_kv_prefix

    if path.is_file():
        if name or text_file or about:
            raise InputError(f"{path} holds names and texts of its own; --name, --text and --about are for a folder")
        with open_bank(bank_path, create=True) as opened:
            entries = import_namespace(opened, path, namespace)
        _tell(as_json, [_plain(entry) for entry in entries], f"{len(entries)} memories imported")
        return
    text = "\n\n".join(part for part in (about, read_text(text_file) if text_file else None) if part) or None
    known = ""
    if (Path(bank_path) / INDEX).exists():
        with open_bank(bank_path) as opened:
            known = opened.base_name
    base = load_base(base_name, known)
    with open_bank(bank_path, create=True, base_id=base.id, base_name=base.name) as opened:
        named = name or path.resolve().name
        if is_kv_prefix(path) and not (path / MANIFEST).exists():
            from memjax.bank.prefix_import import import_prefix
            from memjax.write.prompts import prompt_style

            style = prompt_style(base.tokenizer.prompt_style)
            entry = import_prefix(opened, base, style, path, named, namespace=namespace, text=text)
        else:
            entry = import_memory(opened, BaseShape.of(base), path, named, namespace=namespace, text=text)
    note = "" if text else "; without --about or --text it is found by its name only"
    _tell(as_json, _plain(entry), f"{entry.name} imported ({entry.id[:12]}){note}")


@bank.command(epilog="Example: memjax bank merge ferry hotel --name trip --bank ./bank")
@click.argument("names", nargs=-1, required=True)
@click.option("--name", required=True, help="The merged memory's name.")
@click.option("--way", type=click.Choice(["ties", "sum"]), default="ties", show_default=True, help="How to merge.")
@click.option("--weights", help="One number per memory, with commas.")
@click.option("--rank", type=int, help="The merged memory's rank; that of the largest by default.")
@click.option("--density", default=0.2, show_default=True, help="With ties: the share of each delta's values to keep.")
@base_option
@bank_option
@namespace_option
@json_option
def merge(
    names: Sequence[str],
    name: str,
    way: str,
    weights: str | None,
    rank: int | None,
    density: float,
    base_name: str | None,
    bank_path: str,
    namespace: str,
    as_json: bool,
) -> None:
    """Make one memory of several; they stay, and the new one keeps what they held even when they are deleted."""
    from memjax.bank.merge import merge as merge_memories
    from memjax.bank.store import open_bank

    try:
        numbers = None if weights is None else [float(number) for number in weights.split(",")]
    except ValueError:
        raise InputError(f"--weights {weights} is not a list of numbers; write, for example, --weights 1,0.5") from None
    with open_bank(bank_path) as opened:
        for each in names:
            opened.get(each, namespace)
        base = load_base(base_name, opened.base_name)
        opened.bind_base(base.id, base.name)
        options: dict[str, Any] = {"way": way, "weights": numbers, "rank": rank, "density": density, "namespace": namespace}
        entry, error = merge_memories(opened, base.config, names, name, **options)
    line = f"{name} holds {', '.join(names)} ({entry.id[:12]}); relative error of its rank {error:.3f}"
    _tell(as_json, {**_plain(entry), "rank_error": error}, line)


def _confirm(what: str, yes: bool) -> None:
    """Ask a person; InputError where there is nobody to ask and --yes was not given."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError(f"to {what} without being asked, say --yes; nothing was done")
    click.confirm(f"{what}? It cannot be undone", abort=True, err=True)


def _tell(as_json: bool, value: Any, line: str) -> None:
    if as_json:
        emit(value)
    else:
        console().print(line, soft_wrap=True)


def _tell_gone(as_json: bool, what: str, gone: Forgotten) -> None:
    line = f"deleted {what}"
    if gone.still_in:
        line += f"; its content is still in what was merged from it: {', '.join(gone.still_in)}; delete that too"
    _tell(as_json, {"deleted": what, "ids": list(gone.ids), "still_in": list(gone.still_in)}, line)


def _plain(entry: Any) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(entry).items() if key != "row"}


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
