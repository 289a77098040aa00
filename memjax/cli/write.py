"""`memjax write`: a text file becomes a memory."""

from __future__ import annotations

import time
from pathlib import Path

import click

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


@click.command(epilog="Example: memjax write notes.txt --bank ./bank --name trip")
@click.argument("file", type=click.Path())
@bank_option
@click.option("--name", help="The memory's name; the file's name without its ending by default.")
@click.option("--fast", "effort", flag_value="fast", help="Fewer steps: about half the time, fewer facts kept.")
@click.option("--thorough", "effort", flag_value="thorough", help="More questions and steps: about three times as long.")
@base_option
@namespace_option
@json_option
def write(
    file: str,
    bank_path: str,
    name: str | None,
    effort: str | None,
    base_name: str | None,
    namespace: str,
    as_json: bool,
) -> None:
    """Write the text in FILE into a small adapter of the base and keep it in the bank."""
    text = read_text(file)
    from memjax.bank.add import add_text, check_text
    from memjax.bank.store import open_bank
    from memjax.write.distill import recipe
    from memjax.write.prompts import prompt_style

    out = console(as_json)
    name = name or Path(file).stem
    began = time.perf_counter()
    known = _bank_base(bank_path)
    base = load_base(base_name, known)
    style = prompt_style(base.tokenizer.prompt_style)
    config = recipe(effort or "default", style.name)
    tokens = check_text(base, text, style)
    opened = open_bank(bank_path, create=True, base_id=base.id, base_name=base.name)
    with opened as bank, writing_bar(name) as progress:
        entry, written = add_text(base, bank, text, name, style, config, namespace=namespace, progress=progress)
    seconds = time.perf_counter() - began
    if as_json:
        emit(
            {
                "name": entry.name,
                "id": entry.id,
                "new": written is not None,
                "tokens": tokens,
                "bytes": entry.bytes,
                "seconds": seconds,
                "metrics": written.metrics if written else {},
            }
        )
    elif written is None:
        out.print(f"{entry.name}: this text is in the bank already ({entry.id[:12]})")
    else:
        loss = written.metrics.get("kl_read", float("nan"))
        out.print(
            f"{entry.name}: {tokens} tokens written in {seconds:.0f} s, loss {loss:.3f} nats, "
            f"{entry.bytes / 2**20:.1f} MiB, id {entry.id[:12]}"
        )


def _bank_base(path: str) -> str:
    """The name of the base that an existing bank was made with, so that `--base` need not be said twice."""
    from memjax.bank.store import INDEX, open_bank

    if not (Path(path) / INDEX).exists():
        return ""
    with open_bank(path) as bank:
        return bank.base_name
