"""`memjax write`: a text file becomes a memory."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from memjax.errors import InputError

if TYPE_CHECKING:
    from memjax.models.base import Base
    from memjax.write.hypernet.encode import Hyper


@click.command(epilog="Example: memjax write notes.txt --bank ./bank --name trip [--how compile --ratio 8]")
@click.argument("file", type=click.Path())
@bank_option
@click.option("--name", help="The memory's name; the file's name without its ending by default.")
@click.option(
    "--how",
    type=click.Choice(["distill", "compile", "internalize"]),
    default="distill",
    show_default=True,
    help="distill: into an adapter; compile: into key/value slots for the untouched base (experimental, see README); "
    "internalize: into an adapter in one pass of a trained hypernetwork, a text of any length.",
)
@click.option(
    "--hyper",
    metavar="DIR",
    help="With internalize: a hypernetwork, where none ships or another is wanted.",
)
@click.option(
    "--chunk",
    type=click.IntRange(min=2),
    help="With internalize or compile: tokens of a chunk.  [default: the hypernetwork's own; as many as the base reads]",
)
@click.option(
    "--chunks",
    type=click.Choice(["sequential", "independent"]),
    help="With compile, for texts longer than the base's window: whether a chunk is read behind the slots of those before "
    "it.  [default: sequential]",
)
@click.option("--overlap", type=click.IntRange(min=0), help="With internalize: tokens that chunks share.  [default: 16]")
@click.option("--ratio", type=click.FloatRange(min=1), help="With compile: tokens per slot.  [default: 16]")
@click.option("--minutes", type=click.FloatRange(min=0), help="With compile: stop after so long, with the best so far.")
@click.option(
    "--distractors",
    type=click.IntRange(min=1),
    help="With compile: train with up to so many of the bank's other buffers beside it, for asking of several at once.",
)
@click.option("--fast", "effort", flag_value="fast", help="Fewer steps: about half the time, fewer facts kept.")
@click.option("--thorough", "effort", flag_value="thorough", help="More questions and steps: about three times as long.")
@base_option
@namespace_option
@json_option
def write(
    file: str,
    bank_path: str,
    name: str | None,
    how: str,
    hyper: str | None,
    chunk: int | None,
    chunks: str | None,
    overlap: int | None,
    ratio: float | None,
    minutes: float | None,
    distractors: int | None,
    effort: str | None,
    base_name: str | None,
    namespace: str,
    as_json: bool,
) -> None:
    """Write the text in FILE into a small memory of the base and keep it in the bank.

    On several devices set MEMJAX_MESH (data x fsdp x tensor), such as 1x4x2. On several hosts start the same command, with
    --base, on each as `memjax train base`; the first one writes the bank, which the others need not reach.
    """
    if how != "compile" and (ratio, minutes, chunks, distractors) != (None,) * 4:
        raise InputError("--ratio, --minutes, --chunks and --distractors are for --how compile")
    if how == "internalize" and effort is not None:
        raise InputError("--how internalize has no --fast or --thorough")
    if how != "internalize" and (hyper, overlap) != (None, None):
        raise InputError("--hyper and --overlap are for --how internalize")
    if how == "distill" and chunk is not None:
        raise InputError("--chunk is for --how internalize and --how compile")
    text = read_text(file)
    import jax

    from memjax.bank.add import add_text, check_text, text_meta, write_text
    from memjax.bank.store import open_bank
    from memjax.distributed import agreed, joined
    from memjax.memory.buffer import Buffer
    from memjax.write.break_even import break_even, reading_seconds
    from memjax.write.prompts import prompt_style

    out = console(as_json)
    name = name or Path(file).stem
    began = time.perf_counter()
    with joined() as first:
        hosts = jax.process_count()
        if hosts > 1:
            _check_hosts(base_name, how, distractors)
        base = load_base(base_name, _bank_base(bank_path) if hosts == 1 else "")
        style = prompt_style(base.tokenizer.prompt_style)
        options = {"chunk": chunk, "chunks": chunks, "overlap": overlap, "distractors": distractors}
        config, network = _recipe(base, style.name, how, effort or "default", ratio, hyper, options)
        seconds = None if minutes is None else 60 * minutes
        tokens = check_text(base, text, style, any_length=how != "distill")
        if not first:  # the first process holds the bank, and all of them compute
            if agreed(True):
                write_text(base, text, style, config, seconds=seconds)
            return
        opened = open_bank(bank_path, create=True, base_id=base.id, base_name=base.name)
        with opened as bank, writing_bar(name) as progress:
            agreed(bank.find_key(text_meta(base, text, style, config).key, namespace) is None)
            how_so: dict[str, Any] = {"namespace": namespace, "seconds": seconds, "hyper": network, "progress": progress}
            entry, written = add_text(base, bank, text, name, style, config, **how_so)
    took = time.perf_counter() - began
    cost: dict[str, Any] = {}
    if hosts == 1 and written is not None and isinstance(written.artefact, Buffer):
        read = reading_seconds(base, style, text, written.artefact)
        cost = {"seconds_ask_text": read[0], "seconds_ask_buffer": read[1], "break_even": break_even(took, *read)}
    if as_json:
        emit(
            {
                "name": entry.name,
                "id": entry.id,
                "new": written is not None,
                "tokens": tokens,
                "bytes": entry.bytes,
                "seconds": took,
                "metrics": written.metrics if written else {},
                **cost,
            }
        )
    elif written is None:
        out.print(f"{entry.name}: this text is in the bank already ({entry.id[:12]})")
    else:
        out.print(
            f"{entry.name}: {tokens} tokens written in {took:.0f} s, {_losses(written.metrics)}, "
            f"{entry.bytes / 2**20:.1f} MiB, id {entry.id[:12]}"
        )
    if cost and not as_json:
        token = f"first token in {1000 * cost['seconds_ask_buffer']:.0f} ms"
        if cost["seconds_ask_text"] is None:
            out.print(f"{token}; the base cannot read the text at once")
            return
        times = f"{token} instead of {1000 * cost['seconds_ask_text']:.0f}"
        paid = (
            f"paid for after {cost['break_even']:,} questions" if cost["break_even"] else "no faster than the text itself"
        )
        out.print(f"{times}: {paid}")


def _losses(metrics: Mapping[str, float]) -> str:
    """How well it was written, in nats per token."""
    if "recompressed" in metrics:
        cut = f", cut from rank {metrics['rank']:.0f} with error {metrics['recompressed']:.3f}"
        return f"{metrics['chunks']:.0f} chunks in {metrics['seconds_pass']:.1f} s{cut if metrics['recompressed'] else ''}"
    if "slots" not in metrics:
        return f"loss {metrics.get('kl_read', float('nan')):.3f} nats"
    asked = f"questions {metrics['held_out_kl_asked']:.3f}, " if "held_out_kl_asked" in metrics else ""
    chunks = f" by {metrics['chunks']:.0f} chunks" if "chunks" in metrics else ""
    return (
        f"{metrics['context']:.0f} of them in {metrics['slots']:.0f} slots{chunks}, loss held out in nats: {asked}text "
        f"{metrics['held_out_kl_recon']:.3f}, general prompts {metrics['held_out_kl_query']:.3f}"
    )


def _recipe(
    base: Base, style: str, how: str, effort: str, ratio: float | None, hyper: str | None, options: Mapping[str, Any]
) -> tuple[Any, Hyper | None]:
    """(the config of a writer, the network that internalize reads): its recipe, with the options that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    if how == "internalize":
        from memjax.write.hypernet.files import load_hyper, shipped_hyper
        from memjax.write.hypernet.internalize import InternalizeConfig

        network = load_hyper(hyper or shipped_hyper(base.name, "world"), base)
        chunk = {"max_chunk": given.pop("chunk")} if "chunk" in given else {}
        return InternalizeConfig(network.id, **chunk, **given), network
    if how == "compile":
        from memjax.write import compile as compiling

        own = compiling.recipe(effort, ratio or 16.0, style, base.config.window)
        return dataclasses.replace(own, **given), None
    from memjax.write import distill as distilling

    return distilling.recipe(effort, style), None


def _check_hosts(base_name: str | None, how: str, distractors: int | None) -> None:
    """InputError for what several processes cannot write together."""
    if not base_name:
        raise InputError("several processes write with one base, and only the first may see the bank; name it with --base")
    if how == "internalize" or distractors:
        what = "--how internalize takes seconds" if how == "internalize" else "--distractors reads the bank's buffers"
        raise InputError(f"{what}, and is for one process; start it without MEMJAX_COORDINATOR")
    if not os.environ.get("MEMJAX_MESH"):
        raise InputError("several processes share one mesh; set MEMJAX_MESH to data x fsdp x tensor, such as 1x4x2")


def _bank_base(path: str) -> str:
    """The name of the base that an existing bank was made with, so that `--base` need not be said twice."""
    from memjax.bank.store import INDEX, open_bank

    if not (Path(path) / INDEX).exists():
        return ""
    with open_bank(path) as bank:
        return bank.base_name
