"""`memjax eval`: experiments that print a table and write result.json and, where people would rather look, a picture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memjax.cli.common import (
    counting_bar,
    load_base,
    read_text,
)
from memjax.cli.eval_common import (
    Options,
    eval_options,
    evicting,
    finish,
    folder_of,
    opened,
    over_seeds,
    refuse_evicting,
)
from memjax.cli.eval_memory import bank, compile_, internalize
from memjax.errors import ConfigError

if TYPE_CHECKING:
    from memjax.evaluate.niah_grid import Ask
    from memjax.evaluate.ruler import Sources
    from memjax.models.base import Base

    Needles = tuple[Base, tuple[str, ...], Ask, dict[str, Any]]


@click.group(name="eval", commands=[bank, compile_, internalize])
def evaluate() -> None:
    """Measure a base, and what it knows with a text in its prompt, with text retrieval, or from its memories.

    SUBJECTS are columns of one table: in_context, no_context, retrieval, bank, internalize. Every number comes with its
    95 % interval: over seeds, or over items (bootstrap) where there is one seed.
    """


@evaluate.command(epilog="Example: memjax eval qa --base tiny --out results/qa --seeds 0,1,2")
@eval_options(240, "Questions of each kind", "in_context,no_context")
@click.option("--data", metavar="FILE", help="A SQuAD json, v1.1 or v2; the invented world's test split by default.")
@click.option("--max-tokens", default=32, show_default=True, help="Longest answer to questions of --data, in tokens.")
def qa(options: Options, data: str | None, max_tokens: int) -> None:
    """Questions with short answers: exact match and F1.

    The invented world's keys without a subject's name are a base's marks: with documents of 200 tokens in the prompt
    one_hop, two_hop, list, yes_no, not_stated (exact match), repeat (token accuracy of the document repeated freely),
    common_with_document, needle_450 (the worst depth decile); without a document common and closed_book_over_chance.
    """
    from memjax.evaluate.qa import ALL, MARKS, squad_item_scores, world_item_scores
    from memjax.evaluate.report import score_table
    from memjax.evaluate.squad import read_articles

    articles = read_articles(data) if data else None
    with opened(options) as (base, subjects):
        if articles is None:
            run = lambda seed: world_item_scores(subjects, base.tokenizer.encode, seed, options.limit or ALL)
        else:
            run = lambda seed: squad_item_scores(subjects, articles, seed, options.limit, max_tokens)
        result = over_seeds(options, base, run, data=data or "invented world, test split")
    numbers = result["numbers"]
    others = [name for name in options.subjects if f"one_hop/{name}" in numbers]
    if articles is None:
        tables = [score_table("invented world", numbers, MARKS)]
        tables += [score_table("other subjects", numbers, MARKS, others)] if others else []
    else:
        rows = ("exact_match", "f1", "exact_match_answerable", "exact_match_unanswerable")
        tables = [score_table(Path(data or "").name, numbers, rows, options.subjects)]
    finish(options, result, tables)


@evaluate.command(epilog="Example: memjax eval choice --data dev_rand_split.jsonl --limit 500 --out results/choice")
@eval_options(0, "Questions")
@click.option("--data", metavar="FILE", help="CommonsenseQA JSON lines; the world's common knowledge by default.")
def choice(options: Options, data: str | None) -> None:
    """Multiple choice by log-likelihood: the summed log-probability of each choice, and the same per token."""
    from memjax.evaluate.choice import choice_item_scores, common_choices, drawn, read_choices
    from memjax.evaluate.report import score_table
    from memjax.write.prompts import prompt_style

    asked = read_choices(data) if data else None
    with counting_bar() as bar:
        base = load_base(options.base_name)
        style = prompt_style(base.tokenizer.prompt_style)

        def run(seed: int) -> tuple[dict[str, list[float]], int]:
            questions = common_choices(seed, options.limit) if asked is None else drawn(asked, seed, options.limit)
            total = sum(len(q.choices) for q in questions)
            return choice_item_scores(base, style, questions, progress=lambda done: bar("choices", done, total)), 0

        result = over_seeds(options, base, run, data=data or "common knowledge of the invented world")
    rows = ("accuracy", "accuracy_per_token", "chance")
    finish(options, result, [score_table("multiple choice", result["numbers"], rows)])


@evaluate.command(epilog="Example: memjax eval niah --base tiny --policies snapkv,indexer,indexmem --out results/niah")
@eval_options(50, "Needles per length bin.", "in_context", generated=True, learnt="niah", evict=".75")
@click.option(
    "--bins",
    help="Length bins in tokens, LOW-HIGH with commas; by default those that fit the base's window, with internalize alone "
    "or --truncate also 4 and 16 times it.",
)
@click.option("--haystack", metavar="FILE", help="Prose to hide needles in; lines of the same filler by default.")
def niah(options: Options, bins: str | None, haystack: str | None) -> None:
    """A number in a haystack (Doc-to-LoRA's generator), by depth decile and length bin; OUT/niah.png is the heat map.

    With --how internalize the keys niah_native (within the window), niah_4x, niah_16x and niah_64x (just below so many
    windows), and niah_4x_prose for a --haystack, are what the hypernetwork's adapter answers. With --policies every
    context is read once, then cut by every policy, and the question reads what is left: a map for each.
    """
    from memjax.evaluate.niah import DECILES, prose_lines
    from memjax.evaluate.niah_grid import bin_name, cells, internalize_bins, niah_item_scores, parse_bins, window_bins
    from memjax.evaluate.report import heat_map, score_table

    filler = prose_lines(read_text(haystack)) if haystack else None
    chosen = parse_bins(bins) if bins else None
    with (_needles_evicted if options.policies else _needles_asked)(options) as (base, names, ask, told):
        window = base.config.max_positions
        longer = "internalize" in options.subjects and (options.truncate or len(options.subjects) == 1)
        chosen = chosen or (internalize_bins if longer else window_bins)(window)
        count = lambda text: len(base.tokenizer.encode(text))
        run = lambda seed: niah_item_scores(ask, count, chosen, seed, options.limit or 50, filler, window)
        haystack = haystack or "filler lines"
        result = over_seeds(options, base, run, bins=[bin_name(b) for b in chosen], haystack=haystack, **told)
    numbers = result["numbers"]
    panels = {name: cells(numbers, name, chosen) for name in names}
    for name, values in panels.items():
        numbers[f"worst_decile/{name}"] = float(values.mean(axis=1).min())
        numbers[f"worst_cell/{name}"] = float(values.min())
    if options.out:
        depths = [f"{10 * d}-{10 * d + 10} %" for d in range(DECILES)]
        heat_map(folder_of(options) / "niah.png", panels, depths, [bin_name(b) for b in chosen])
    finish(options, result, [score_table("needles", numbers, ("exact_match", "contains", "rouge_l"), names)])


@contextlib.contextmanager
def _needles_asked(options: Options) -> Iterator[Needles]:
    """(base, columns, how they are asked, what the setting tells) of the subjects."""
    from memjax.evaluate.niah_grid import ask_subjects

    with opened(options, pooled=False) as (base, subjects):
        yield base, options.subjects, ask_subjects(subjects), {}


@contextlib.contextmanager
def _needles_evicted(options: Options) -> Iterator[Needles]:
    """(base, columns, how they are asked, what the setting tells) of the full cache and every policy at every share."""
    from memjax.evaluate.niah_grid import ask_evicted
    from memjax.evaluate.ruler_evict import FULL

    with evicting(options) as (base, config, bar):
        told = {"policies": [policy.name for policy in config.policies], "shares": config.shares}
        yield base, (FULL, *config.columns), ask_evicted(base, config, bar), told


@evaluate.command(
    epilog="Example: memjax eval ruler --length 4096 --essay essays.txt --squad dev-v2.0.json --out results/ruler, or what "
    "eviction costs: memjax eval ruler --base tiny --length 450 --policies all --limit 25 --out results/evict"
)
@eval_options(20, "Samples per task.", "in_context", generated=True, evict="0,.25,.5,.75,.9")
@click.option("--length", type=click.IntRange(64), required=True, help="Tokens of prompt and answer together.")
@click.option("--tasks", help="Which of the 13, with commas; by default all whose files are given and that fit.")
@click.option("--essay", metavar="FILE", help="Prose, for the tasks that hide needles in an essay.")
@click.option("--squad", metavar="FILE", help="A SQuAD json, for qa_1.")
@click.option("--hotpot", metavar="FILE", help="A HotpotQA json, for qa_2.")
@click.option("--compress-question", type=click.Choice(["no", "yes"]), help="Cut after the question.  [default: no]")
def ruler(
    options: Options,
    length: int,
    tasks: str | None,
    essay: str | None,
    squad: str | None,
    hotpot: str | None,
    compress_question: str | None,
) -> None:
    """RULER's tasks at any length, scored by string match (0 … 1); OUT/ruler.png shows them as bars.

    With --policies every context is read once, then cut by every policy to every share, and the question reads what is
    left; means are over the tasks that the full cache solves to 0.85, and OUT/ruler.png shows score by share removed.
    Tasks may then also be needle and one_hop, of the test world, for a base that does not know RULER's prompts.
    """
    from memjax.evaluate.report import bars, score_table
    from memjax.evaluate.ruler import Sources, read_hotpot, read_squad
    from memjax.evaluate.ruler_evict import fitting_tasks
    from memjax.evaluate.ruler_run import available_tasks, ruler_item_scores, sample_length

    sources = Sources(
        essay=read_text(essay) if essay else "",
        squad=read_squad(squad) if squad else None,
        hotpot=read_hotpot(hotpot) if hotpot else None,
    )
    named = tuple(t.strip() for t in tasks.split(",")) if tasks else None
    wanted = named or available_tasks(sources)
    files = {"essay": essay, "squad": squad, "hotpot": hotpot}
    fit = lambda base, tokens: wanted if named else fitting_tasks(base, wanted, tokens, sources)
    if options.policies:
        told = {"length": length, "tasks": wanted, "files": files}
        _ruler_evicted(options, sources, compress_question == "yes", told, fit)
        return
    refuse_evicting(compress_question)
    with opened(options, pooled=False) as (base, subjects):
        fitting = sample_length(base, length)
        chosen = fit(base, fitting)
        count = lambda text: len(base.tokenizer.encode(text))
        run = lambda seed: ruler_item_scores(subjects, chosen, fitting, options.limit or 20, count, sources, seed)
        result = over_seeds(options, base, run, length=length, sample_length=fitting, tasks=chosen, files=files)
    rows = (*chosen, "mean")
    title = f"RULER, {length} tokens{_left_out(wanted, chosen)}"
    if options.out:
        picture = folder_of(options) / "ruler.png"
        bars(picture, result["numbers"], rows, options.subjects, f"RULER, {length} tokens, {base.name}")
    finish(options, result, [score_table(title, result["numbers"], rows, options.subjects)])


def _left_out(wanted: Sequence[str], chosen: Sequence[str]) -> str:
    """What a title says of the tasks that did not fit."""
    long = [task for task in wanted if task not in chosen]
    return f", too few for {', '.join(long)}" if long else ""


def _ruler_evicted(
    options: Options,
    sources: Sources,
    inside: bool,
    told: dict[str, Any],
    fit: Callable[[Base, int], tuple[str, ...]],
) -> None:
    """RULER by policy and share removed; fit: which tasks fit a base in so many tokens."""
    from memjax.evaluate.report import setting
    from memjax.evaluate.ruler_evict import item_scores, numbers_of, picture, places, table
    from memjax.evaluate.ruler_run import sample_length

    began, count = time.perf_counter(), options.limit or 20
    with evicting(options, inside=inside) as (base, config, bar):
        fitting = sample_length(base, told["length"])
        tasks = fit(base, fitting)
        runs = [item_scores(base, config, tasks, fitting, count, sources, seed, bar) for seed in options.seeds]
    numbers, solved = numbers_of(runs, config, tasks)
    numbers |= {**places(config, fitting, base), "truncated": 0, "seconds": time.perf_counter() - began}
    title = f"{base.name}, {told['length']} tokens{_left_out(told['tasks'], tasks)}"
    told |= {"tasks": tasks, "sample_length": fitting, "seeds": options.seeds, "limit": count, "shares": config.shares}
    told |= {"policies": [policy.name for policy in config.policies], "question_compressed": inside}
    told |= {"solved": solved, "solved_from": config.solved}
    if options.out and solved:
        counted = f"{base.name}, {told['length']} tokens, {len(solved)} of {len(tasks)} tasks"
        picture(folder_of(options) / "ruler.png", config, numbers, counted)
    finish(options, {"numbers": numbers, "setting": setting(base, **told)}, [table(config, numbers, solved, tasks, title)])


@evaluate.command(epilog="Example: memjax eval longbench LongBench/data --sets qasper,hotpotqa --truncate --out results/lb")
@click.argument("folder", type=click.Path())
@eval_options(50, "Examples of each set", "in_context", seeds=False)
@click.option("--sets", help="Which sets, with commas; all whose files are in FOLDER by default.")
def longbench(options: Options, folder: str, sets: str | None) -> None:
    """LongBench's sets from the jsonl files in FOLDER, with its prompts and metrics (0 … 1).

    Code similarity uses difflib's ratio in place of fuzzywuzzy. Chinese sets need the package jieba.
    """
    from memjax.evaluate.longbench import find_sets, longbench_item_scores, read_set
    from memjax.evaluate.report import bars, score_table

    found = find_sets(folder)
    wanted = [name.strip() for name in sets.split(",")] if sets else list(found)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ConfigError(f"{folder}: holds no set {missing[0]!r}; it has {', '.join(found)}")
    examples = {name: read_set(found[name]) for name in wanted}
    with opened(options, pooled=False) as (base, subjects):
        run = lambda seed: longbench_item_scores(subjects, examples, limit=options.limit)
        result = over_seeds(options, base, run, sets=wanted)
    rows = (*wanted, "mean")
    if options.out:
        bars(folder_of(options) / "longbench.png", result["numbers"], rows, options.subjects, f"LongBench, {base.name}")
    finish(options, result, [score_table("LongBench", result["numbers"], rows, options.subjects)])
