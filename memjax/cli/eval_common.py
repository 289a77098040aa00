"""What `memjax eval` commands share: their options, subjects, runs over seeds, and how results are told."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
    whole_numbers,
)
from memjax.errors import ConfigError

if TYPE_CHECKING:
    from memjax.evaluate.ruler_evict import EvictRuler
    from memjax.evaluate.subjects import Subject
    from memjax.models.base import Base


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
    policies: str | None = None
    indexer: str | None = None
    latent: str | None = None
    shares: str = ""


def eval_options(
    limit: int,
    limit_help: str,
    subjects: str = "",
    *,
    seeds: bool = True,
    generated: bool = False,
    learnt: str = "world",
    evict: str = "",
) -> Callable[..., Any]:
    """Adds the common options to a command and hands them over as its first argument, `Options`.

    generated: the items are made as they are needed, so there is no "all of them". learnt: what the hypernetwork was
    trained on that is taken where none is named. evict: contexts may also be evicted, by default to these shares.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            names = {f.name for f in dataclasses.fields(Options)}
            common = {key: given.pop(key) for key in list(given) if key in names}
            common["limit"] = common["limit"] or None
            common["seeds"] = whole_numbers(common.get("seeds", "0"), "--seeds")
            if "subjects" in common:
                named = tuple(name.strip() for name in common["subjects"].split(",") if name.strip())
                how = common["how"]
                common["subjects"] = named if how is None or how in named else (*named, how)
            if evict:
                if not common["policies"]:
                    refuse_evicting(*(common[name] for name in ("shares", "indexer", "latent")))
                common["shares"] = common["shares"] or evict
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
        if evict:
            of_those_shipped = "for --policies than the one that ships for the base."
            wrap += [
                click.option("--policies", metavar="NAMES|all", help="Measure eviction by these policies, with commas."),
                click.option("--indexer", metavar="DIR", help=f"Another indexer {of_those_shipped}"),
                click.option("--latent", metavar="DIR", help=f"Another latent memory {of_those_shipped}"),
                click.option("--shares", metavar="SHARES", help=f"Shares of the context they remove.  [default: {evict}]"),
            ]
        for option in reversed(wrap):
            run = option(run)
        return run

    return decorate


@contextlib.contextmanager
def opened(options: Options, *, pooled: bool = True) -> Iterator[tuple[Base, list[Subject]]]:
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


def refuse_evicting(*given: str | None) -> None:
    """ConfigError where something is given that only evaluations with --policies read."""
    if any(given):
        raise ConfigError("--shares, --indexer, --latent and --compress-question say what --policies does; give that too")


@contextlib.contextmanager
def evicting(
    options: Options, *, inside: bool = False
) -> Iterator[tuple[Base, EvictRuler, Callable[[str, int, int], None]]]:
    """(the base, what is evicted and how, a progress bar), for an evaluation whose contexts are read once and then cut."""
    from memjax.evaluate.ruler_evict import shares_of

    if options.subjects != ("in_context",) or options.bank_path or options.truncate:
        raise ConfigError("--policies reads the whole prompt; leave --subjects, --bank and --truncate out")
    given = (options.base_name, options.indexer, options.latent)
    ready = evict_by(options.policies or "", shares_of(options.shares), *given, inside=inside)
    with counting_bar() as bar:
        base = load_base(options.base_name)
        yield base, ready(base), bar


def evict_by(
    policies: str,
    shares: Sequence[float],
    name: str | None,
    indexer: str | None = None,
    latent: str | None = None,
    *,
    inside: bool = False,
) -> Callable[[Base], EvictRuler]:
    """A function base -> what --policies evicts, to these shares; errors of what is named come before a base is loaded."""
    from memjax.evaluate.ruler_evict import EvictRuler, policies_of
    from memjax.evict.files import INDEXER, LATENT
    from memjax.evict.policies import Policy

    held = (learned_folder(INDEXER, indexer, name), learned_folder(LATENT, latent, name))
    config = EvictRuler(policies_of(policies, *map(bool, held)), tuple(shares), inside=inside)
    folders = learned_folders([p for p in config.policies if isinstance(p, Policy)], indexer, latent, name)
    return lambda base: dataclasses.replace(config, learned=learned_by(base, *folders))


def over_seeds(
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


def finish(options: Options, result: Mapping[str, Any], tables: Sequence[Any]) -> None:
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


def folder_of(options: Options) -> Path:
    folder = Path(options.out or ".")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def parts_of(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The parts that --parts names. ConfigError for one that is not among the known, or none."""
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    if not chosen or set(chosen) - set(known):
        raise ConfigError(f"--parts {text}: use some of {', '.join(known)}")
    return chosen
