"""`memjax train`: what memjax trains itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from memjax.cli.common import base_option, console, counting_bar, emit, json_option, load_base, namespace_option

if TYPE_CHECKING:
    from memjax.train.fit import Fitted


@click.group(epilog="Example: memjax train base configs/tiny_base.yaml --out runs/tiny")
def train() -> None:
    """Train what memjax ships or learns: the tiny base, a hypernetwork, an indexer, a latent memory, a bank's router."""


@train.command(epilog="Example: memjax train base configs/tiny_base.yaml --out runs/tiny optimizer.learning_rate=3e-3")
@click.argument("config", type=click.Path(), required=False)
@click.argument("overrides", nargs=-1)
@click.option("--out", type=click.Path(), required=True, help="Folder for checkpoints, metrics, the curve and the base.")
@click.option("--resume", is_flag=True, help="Continue from the newest complete checkpoint in the folder.")
@json_option
def base(config: str | None, overrides: tuple[str, ...], out: str, resume: bool, as_json: bool) -> None:
    """Train the tiny base on the invented world; CONFIG is a YAML file, OVERRIDES are key=value pairs.

    On several devices set mesh, such as `mesh.data=4`. On several hosts start it on each with MEMJAX_COORDINATOR=HOST:PORT
    of the first, MEMJAX_PROCESSES and MEMJAX_PROCESS (from 0), and an --out that all can reach; when one is lost all stop,
    with exit status 75, and --resume continues.
    """
    from memjax.config import load_config
    from memjax.distributed import joined
    from memjax.evaluate.tiny import TinyConfig, train_tiny

    settings = load_config(TinyConfig, *file_and_overrides(config, overrides))
    with joined() as first:
        fitted = train_tiny(settings, out, resume=resume)
    if not first:
        return
    _tell(fitted, {"base": str(Path(out) / "base")}, "the base is in", "validation world", as_json, digits=2)


@train.command(epilog="Example: memjax train hypernet configs/hypernet_tiny_niah.yaml --out runs/niah fit.steps=2000")
@click.argument("config", type=click.Path(), required=False)
@click.argument("overrides", nargs=-1)
@click.option("--out", type=click.Path(), required=True, help="Folder for checkpoints, metrics, the curve and the network.")
@click.option("--resume", is_flag=True, help="Continue from the newest complete checkpoint in the folder.")
@json_option
def hypernet(config: str | None, overrides: tuple[str, ...], out: str, resume: bool, as_json: bool) -> None:
    """Train a hypernetwork, which makes an adapter of a document in one pass, on needles in a haystack.

    CONFIG is a YAML file, OVERRIDES are key=value pairs. OUT/hyper is then for
    `memjax write --how internalize`. On several devices set mesh, such as `mesh.data=4`, and as many shape.groups; on
    several hosts start it as `memjax train base`.
    """
    from memjax.cli.common import use_compilation_cache
    from memjax.config import load_config
    from memjax.distributed import joined
    from memjax.evaluate.hypernet import HYPER, HypernetConfig, train_hypernet

    use_compilation_cache()
    settings = load_config(HypernetConfig, *file_and_overrides(config, overrides))
    with joined() as first:
        fitted = train_hypernet(settings, out, resume=resume)
    if not first:
        return
    _tell(fitted, {"hyper": str(Path(out) / HYPER)}, "the hypernetwork is in", "validation needles", as_json)


@train.command(epilog="Example: memjax train indexer configs/indexer_tiny.yaml --base tiny --out runs/indexer fit.steps=9")
@click.argument("config", type=click.Path(), required=False)
@click.argument("overrides", nargs=-1)
@base_option
@click.option("--out", type=click.Path(), required=True, help="Folder for checkpoints, metrics, the curve and the indexer.")
@click.option("--resume", is_flag=True, help="Continue from the newest complete checkpoint in the folder.")
@json_option
def indexer(
    config: str | None, overrides: tuple[str, ...], base_name: str | None, out: str, resume: bool, as_json: bool
) -> None:
    """Train an indexer, which judges what a bounded cache keeps, on what the frozen base itself attends to.

    Texts are documents of the invented world with questions, and the files that data.texts names, with how they go on; no
    benchmark's. CONFIG is a YAML file, OVERRIDES are key=value pairs. OUT/indexer is then for
    `memjax generate|ask|chat --budget 512 --policy indexer --indexer OUT/indexer`, and `memjax eval ruler`. On several
    devices set mesh, such as `mesh.data=4`; on several hosts start it as `memjax train base`.
    """
    from memjax.cli.common import use_compilation_cache
    from memjax.config import load_config
    from memjax.distributed import joined
    from memjax.evaluate.indexer import IndexerTraining, train_indexer
    from memjax.evict.files import INDEXER

    use_compilation_cache()
    settings = load_config(IndexerTraining, *file_and_overrides(config, overrides))
    settings = dataclasses.replace(settings, base=base_name or settings.base)
    with joined() as first:
        fitted = train_indexer(settings, out, resume=resume)
    if not first:
        return
    _tell(fitted, {"indexer": str(Path(out) / INDEXER)}, "the indexer is in", "validation world", as_json)


@train.command(epilog="Example: memjax train latent configs/latent_tiny.yaml --indexer runs/i/indexer --out runs/latent")
@click.argument("config", type=click.Path(), required=False)
@click.argument("overrides", nargs=-1)
@base_option
@click.option("--indexer", metavar="DIR", help="The trained indexer whose evicted tokens it learns to hold.")
@click.option("--out", type=click.Path(), required=True, help="Folder for checkpoints, metrics, the curve and the memory.")
@click.option("--resume", is_flag=True, help="Continue from the newest complete checkpoint in the folder.")
@json_option
def latent(
    config: str | None,
    overrides: tuple[str, ...],
    base_name: str | None,
    indexer: str | None,
    out: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Train a latent memory, which takes in what a bounded cache evicts, on what attention loses with it.

    The base and the indexer are frozen; texts are those of `memjax train indexer`. CONFIG is a YAML file, OVERRIDES are
    key=value pairs. OUT/latent is then for `--policy indexmem --indexer DIR --latent OUT/latent` wherever a --policy is. On
    several devices set mesh, such as `mesh.data=4`; on several hosts start it as `memjax train base`.
    """
    from memjax.cli.common import use_compilation_cache
    from memjax.config import load_config
    from memjax.distributed import joined
    from memjax.evaluate.latent import LatentTraining, train_latent
    from memjax.evict.files import LATENT

    use_compilation_cache()
    path, changes = file_and_overrides(config, overrides)
    # Before the file is read as a whole: a run of this policy is not one without its indexer.
    named = (f"indexer={indexer}",) if indexer else ()
    settings = load_config(LatentTraining, path, (*changes, *named))
    settings = dataclasses.replace(settings, base=base_name or settings.base)
    with joined() as first:
        fitted = train_latent(settings, out, resume=resume)
    if not first:
        return
    _tell(fitted, {"latent": str(Path(out) / LATENT)}, "the memory is in", "validation world", as_json)


@train.command(epilog="Example: memjax train router ./bank --gate entropy none=true")
@click.argument("bank", type=click.Path())
@click.argument("config", type=click.Path(), required=False)
@click.argument("overrides", nargs=-1)
@click.option(
    "--gate",
    "rule",
    metavar="RULE",
    help="Calibrate the gate on the same questions, after the router's picks: entropy, difference, kl, probe, "
    "mean_entropy, logistic or none.",
)
@click.option("--out", type=click.Path(), help="Folder for metrics and checkpoints of the training run.")
@base_option
@namespace_option
@json_option
def router(
    bank: str,
    config: str | None,
    overrides: tuple[str, ...],
    rule: str | None,
    out: str | None,
    base_name: str | None,
    namespace: str,
    as_json: bool,
) -> None:
    """Train BANK's router, which chooses among the candidates that retrieval finds; `memjax ask` then uses it.

    It learns from the questions that were held out when the memories were written, and from no others. It is for one base
    and serves memories that are added later; once a memory is deleted it is stale and no longer used until it is trained
    again. One that finds no more of them than retrieval does is not kept. CONFIG is a YAML file, OVERRIDES are key=value
    pairs.
    """
    from memjax.bank.gate import check_rule
    from memjax.bank.route import RouterConfig
    from memjax.bank.store import open_bank
    from memjax.config import load_config
    from memjax.models.encoder import available_encoder
    from memjax.serve.engine import Engine, EngineConfig
    from memjax.serve.learn import learn_gate, learn_router, learned, see_questions
    from memjax.write.prompts import prompt_style

    if rule:
        check_rule(rule)
    settings = load_config(RouterConfig, *file_and_overrides(config, overrides))
    with open_bank(bank) as opened, counting_bar() as bar:
        base = load_base(base_name, opened.base_name)
        opened.bind_base(base.id, base.name)
        encoder = available_encoder()
        how = EngineConfig(candidates=settings.candidates, route="retrieval")
        engine = Engine(base, opened, prompt_style(base.tokenizer.prompt_style), how, namespace, encoder)
        seen = see_questions(engine, progress=lambda done, total: bar("questions", done, total))
        trained = learn_router(engine, settings, seen, out=out)
        gate = learn_gate(engine, rule, seen, trained if trained.helps else None) if rule else None
    result = learned(trained, gate)
    if as_json:
        emit(result)
        return
    told = trained.metrics
    share = f"{told['accuracy']:.0%}, by retrieval alone in {told['accuracy_retrieval']:.0%}"
    console().print(
        f"trained on {told['questions']:.0f} held-out questions; on {told['validation_questions']:.0f} of others the "
        f"right one is first in {share}"
    )
    if not trained.helps:
        console().print("that is no better, so none is kept: the bank goes on with retrieval alone")
    if gate is not None:
        console().print(
            f"gate {gate.rule}: opens below {gate.threshold:.3f}, balanced accuracy {gate.balanced_accuracy:.0%}"
        )


def _tell(fitted: Fitted, made: dict[str, str], where: str, checked: str, as_json: bool, digits: int = 3) -> None:
    """Says what a run made, {key: path}, and what its last evaluation found on what was `checked`."""
    if as_json:
        emit({"step": fitted.step, **made, **fitted.metrics})
        return
    shown = ", ".join(f"{name} {value:.{digits}f}" for name, value in fitted.scores.items())
    (path,) = made.values()
    console().print(f"trained {fitted.step} steps; {where} {path}\n{checked}: {shown}")


def file_and_overrides(config: str | None, overrides: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """(config file or None, overrides) of arguments whose first may be either."""
    if config is not None and "=" in config and not Path(config).exists():
        return None, (config, *overrides)
    return config, overrides
