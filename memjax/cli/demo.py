"""`memjax demo`: the main job end to end, with a table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from memjax.cli.common import base_option, console, emit, json_option, load_base, read_text, writing_bar
from memjax.errors import InputError


@click.command(epilog="Example: memjax demo my1.txt my2.txt --questions q.jsonl")
@click.argument("files", nargs=-1, type=click.Path())
@click.option(
    "--questions", metavar="FILE", help="JSON lines with question, document (file name without .txt) and answers."
)
@click.option("--bank", "bank_path", metavar="DIR", help="Keep the bank here, to ask it more; a temporary one by default.")
@click.option("--fast", "effort", flag_value="fast", help="Fewer steps per document.")
@click.option("--thorough", "effort", flag_value="thorough", help="More questions and steps per document.")
@base_option
@json_option
def demo(
    files: tuple[str, ...],
    questions: str | None,
    bank_path: str | None,
    effort: str | None,
    base_name: str | None,
    as_json: bool,
) -> None:
    """Write documents into memories and answer from them, beside the base alone and the base with the text in its prompt.

    Without FILES the documents that ship with memjax are used: invented facts that no base can know.
    """
    if bool(files) != bool(questions):
        raise InputError("own documents need own questions and the other way round; give files and --questions together")
    from memjax.evaluate.demo import parse_questions, run_demo, shipped
    from memjax.write.distill import recipe
    from memjax.write.prompts import prompt_style

    out = console(as_json)
    if files and questions:
        texts = {Path(f).stem: read_text(f) for f in files}
        asked = parse_questions(read_text(questions), questions)
    out.print("loading the base (fetched and converted once; compiled programs are kept as well)")
    base = load_base(base_name)
    style = prompt_style(base.tokenizer.prompt_style)
    if not files:
        texts, asked = shipped(style)
    result = run_demo(
        base,
        style,
        texts,
        asked,
        recipe(effort or "default", style.name),
        folder=bank_path,
        say=lambda line: out.print(line),
        bar=lambda name: writing_bar(f"writing {name}"),
    )
    if as_json:
        emit(result)
    else:
        show(result, out)


def show(result: dict[str, Any], out: Any) -> None:
    """The table of answers and the totals."""
    table = Table(
        "question",
        "right is",
        "base alone",
        "base + text",
        "memjax",
        "memory",
        "gate",
        "prompt tokens",
        show_lines=True,
    )
    for row in result["rows"]:
        mark = lambda who, row=row: _cell(row[who], row.get(f"{who}_right"))
        gate = "-" if row["gate"] is None else f"{row['gate']:.2f}"
        tokens = f"{row['prompt_tokens']} / {row['memjax_tokens']}"
        gold = row["gold"][0] if row["gold"] else "(unrelated)"
        table.add_row(
            row["question"], gold, mark("base"), mark("prompt"), mark("memjax"), row["memory"] or "(base)", gate, tokens
        )
    out.print(table)
    n, u = result["questions"], result["unrelated"]
    totals = Table("", "base alone", "base + text", "memjax", title="totals")
    totals.add_row(f"right answers of {n}", *(str(result[f"right_{w}"]) for w in ("base", "prompt", "memjax")))
    totals.add_row(
        "loss of the right answer, nats per token",
        *(f"{result[f'loss_{w}']:.2f}" for w in ("base", "prompt", "memjax")),
    )
    out.print(totals)
    out.print(
        f"{result['gated_off']} of {u} unrelated questions left to the base; {result['leaked']} leaked; "
        f"{result['prompt_tokens_saved']} prompt tokens saved (example turns not counted); "
        f"{result['seconds']:.0f} s; {result['peak_mib']:.0f} MiB at most"
    )


def _cell(text: str, right: bool | None) -> str:
    line = text.replace("\n", " ").replace("[", "\\[")
    line = line if len(line) < 70 else f"{line[:67]}..."
    return line if right is None else f"[{'green' if right else 'red'}]{line}[/]"
