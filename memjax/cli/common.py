"""What all commands share: options, loading, progress, and output for people or for machines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from memjax.errors import ConfigError, InputError

if TYPE_CHECKING:
    from memjax.evict.compact import Budget
    from memjax.evict.learned import Learned
    from memjax.evict.policies import Policy
    from memjax.models.base import Base

F = TypeVar("F", bound=Callable[..., Any])
BINARY_SAMPLE = 8192

base_option = click.option(
    "--base", "base_name", metavar="PATH|NAME", help="The base: a folder, a GGUF file, a hub name or an embedded name."
)
bank_option = click.option("--bank", "bank_path", metavar="DIR", required=True, help="The bank's folder.")
some_bank_option = click.option("--bank", "bank_path", metavar="DIR", help="The bank's folder; or give a --file.")
text_option = click.option(
    "--file", "path", metavar="FILE", help="Answer from this text instead of a bank, --budget tokens of it in the cache."
)
namespace_option = click.option("--namespace", default="default", show_default=True, help="The bank's namespace.")
retrieve_option = click.option(
    "--retrieve",
    type=click.Choice(["auto", "bm25", "dense", "fusion"]),
    default="auto",
    show_default=True,
    help="Find candidates by words (bm25), by meaning (dense, fetches an encoder once) or both; auto: both once fetched.",
)
budget_option = click.option(
    "--budget",
    metavar="TOKENS|SHARE",
    help="Read in blocks and keep that many tokens, such as 512, or that share of the text, such as 25%, rounded down.",
)
policy_option = click.option(
    "--policy",
    "policy_name",
    metavar="NAME",
    help="What --budget keeps: snapkv (default), h2o, tova, pyramidkv, adakv, keydiff, expected_attention, streaming, "
    "lagkv, knorm, random, or, where what they read ships for the base or is named by --indexer and --latent, "
    "indexer, indexmem, snapkv+latent.",
)
indexer_option = click.option(
    "--indexer", metavar="DIR", help="Another indexer for --policy indexer than the one that ships for the base."
)
latent_option = click.option(
    "--latent", metavar="DIR", help="Another latent memory for --policy indexmem than the one that ships for the base."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, to stdout.")


def emit(value: Any) -> None:
    """Print a JSON value to stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def console(as_json: bool = False) -> Console:
    """Where people read: stdout, or stderr where stdout carries JSON."""
    return Console(stderr=as_json, highlight=False)


def load_base(name: str | None, bank_base: str = "") -> Any:
    """The base of this name, else the bank's own, else the embedded default; with the compilation cache switched on.

    It lies on the mesh that the environment names in MEMJAX_MESH, and with it all that is written and answered.
    """
    use_compilation_cache()
    from memjax.models.base import DEFAULT_BASE
    from memjax.sharding import mesh_from
    from memjax.train.base import load

    return load(name or bank_base or DEFAULT_BASE, mesh=mesh_from(os.environ))


def use_compilation_cache() -> None:
    """Keep compiled programs under the cache folder, so that a second run of a command starts at once."""
    import jax

    from memjax.models.fetch import cache_dir

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compilations"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def read_text(path: str | Path) -> str:
    """The text of a file; InputError, in one line, where it is missing, a folder, empty, binary or not UTF-8."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; give the path of a text file")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the path of a text file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if b"\0" in data[:BINARY_SAMPLE]:
        raise InputError(f"{path} is a binary file; give a plain text file in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); convert it, for example with iconv"
        ) from error
    if not text.strip():
        raise InputError(f"{path} is empty; give a file with some text")
    return text


class Bounds(NamedTuple):
    """What a bounded cache goes by: its size, its policy, and the folders of what that reads."""

    budget: Budget | None
    policy: Policy
    indexer: str | Path | None
    latent: str | Path | None


def bounded_by(
    budget: str | None, policy_name: str | None, indexer: str | None, latent: str | None, base_name: str | None
) -> Bounds:
    """What --budget, --policy, --indexer and --latent say, or what is the default and ships for the base; InputError.

    Says what does not go together before a base is loaded; `learned_by` then reads the files.
    """
    from memjax.evict.compact import Budget
    from memjax.evict.policies import DEFAULT_POLICY, policy_named

    if policy_name and not budget:
        raise InputError(
            f"--policy {policy_name} says what a bounded cache keeps; give its size too, for example --budget 512"
        )
    policy = policy_named(policy_name or DEFAULT_POLICY)
    for given, reads, option, other in (
        (indexer, policy.judged, "--indexer", "indexer or indexmem"),
        (latent, policy.remembers, "--latent", "indexmem or snapkv+latent"),
    ):
        if given and not reads:
            raise InputError(f"{option} is read by --policy {other}, not by {policy.name}; name that one or leave it out")
    folders = learned_folders((policy,), indexer, latent, base_name)
    return Bounds(Budget.parse(budget) if budget else None, policy, *folders)


def learned_folder(kind: str, given: str | None, base_name: str | None) -> str | Path | None:
    """The folder of an `INDEXER` or `LATENT`: the one that is given, else the one that ships for the base, if one does."""
    from memjax.evict.files import shipped
    from memjax.models.base import DEFAULT_BASE

    return given or shipped(kind, base_name or DEFAULT_BASE)


def learned_folders(
    policies: Collection[Policy], indexer: str | None, latent: str | None, base_name: str | None
) -> tuple[str | Path | None, str | Path | None]:
    """(the indexer's folder, the latent memory's) that these policies read: those that are given, else those that ship for
    the base, None for what no policy reads. InputError where there is none that one of them reads."""
    from memjax.evict.files import INDEXER, LATENT
    from memjax.models.base import DEFAULT_BASE

    found: list[str | Path | None] = []
    for kind, given in ((INDEXER, indexer), (LATENT, latent)):
        reader = next((p for p in policies if (p.judged if kind == INDEXER else p.remembers)), None)
        folder = learned_folder(kind, given, base_name) if reader else None
        if reader and not folder:
            raise InputError(
                f"policy {reader.name} reads what was trained for a base; for {base_name or DEFAULT_BASE} nothing ships: "
                f"train it (memjax train {kind}) and name its folder: --{kind} DIR"
            )
        found.append(folder)
    return found[0], found[1]


def learned_by(base: Base, indexer: str | Path | None, latent: str | Path | None) -> Learned:
    """What was trained for this base, from an indexer's and a latent memory's folder. ArtefactError, BaseMismatchError."""
    from memjax.evict.files import load_learned

    return load_learned(base, indexer, latent)


# What --file goes with.
ANY_SOURCE = frozenset(("--file", "--budget", "--policy", "--indexer", "--latent", "--base", "--max-tokens", "--json"))


def _given() -> list[str]:
    """The options that stand on the command line."""
    context = click.get_current_context()
    said = lambda name: context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    return [p.opts[0] for p in context.command.params if isinstance(p, click.Option) and p.name and said(p.name)]


def check_source(path: str | None, budget: str | None, policy_name: str | None, bank_path: str | None) -> None:
    """InputError unless there is a bank, or a file with a budget and no other option of the command: they want a bank."""
    given = [option for option in _given() if option not in ANY_SOURCE]
    if path and given:
        raise InputError(f"--file is read by the base alone, without a bank; leave {given[0]} out")
    if path and not budget:
        raise InputError("--file is read through a bounded cache; say how much of it stays, for example --budget 512")
    if not path and (budget or policy_name):
        option = "--budget" if budget else "--policy"
        raise InputError(f"{option} bounds the cache of a text, and memories need none; give the text with --file")
    if not path and not bank_path:
        raise InputError("nothing to answer from; give a bank with --bank DIR, or a text with --file FILE --budget 512")


@contextlib.contextmanager
def writing_bar(name: str) -> Iterator[Callable[[str, float, dict[str, float]], None]]:
    """A progress bar for one write, with stage, loss and time left; silent where stderr is no terminal."""
    stages = {"questions": (0.0, 0.1), "teacher": (0.1, 0.3), "train": (0.3, 0.95), "calibrate": (0.95, 1.0)}
    with _bar() as bar:
        task = bar.add_task(name, total=1.0, note="")

        def progress(stage: str, share: float, metrics: dict[str, float]) -> None:
            begin, end = stages[stage]
            note = f"loss {metrics['loss']:.3f}" if "loss" in metrics else stage
            if "held_out_kl_recon" in metrics:
                found = {"questions": "asked", "text": "recon", "general": "query"}
                told = (
                    f"{name} {metrics[f'held_out_kl_{kind}']:.2f}"
                    for name, kind in found.items()
                    if f"held_out_kl_{kind}" in metrics
                )
                note = f"held out: {', '.join(told)} nats"
            bar.update(task, completed=begin + share * (end - begin), note=note)

        yield progress


@contextlib.contextmanager
def counting_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for (what, done, total) that starts anew with each `what`; silent where stderr is no terminal."""
    with _bar() as bar:
        task = bar.add_task("", total=None, note="")
        shown = [("", 0)]

        def progress(what: str, done: int, total: int) -> None:
            if what != shown[0][0] or done < shown[0][1]:
                bar.reset(task, total=total, description=what)
            shown[0] = (what, done)
            bar.update(task, completed=done, note=f"{done} of {total}")

        yield progress


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


def whole_numbers(text: str, option: str, least: int = 0) -> tuple[int, ...]:
    """The different whole numbers, none below `least`, that an option lists with commas. ConfigError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) >= least for part in parts) or len(set(parts)) < len(parts):
        example = ",".join(str(least + n) for n in range(3))
        raise ConfigError(f"{option} {text}: write different whole numbers with commas, for example {example}")
    return tuple(int(part) for part in parts)
