"""`memjax train`: what memjax trains itself."""

from __future__ import annotations

from pathlib import Path

import click

from memjax.cli.common import console, emit, json_option


@click.group(epilog="Example: memjax train base configs/tiny_base.yaml --out runs/tiny")
def train() -> None:
    """Train what memjax ships or learns: the tiny base."""


@train.command(epilog="Example: memjax train base configs/tiny_base.yaml --out runs/tiny optimizer.learning_rate=3e-3")
@click.argument("config", type=click.Path(), required=False)
@click.argument("overrides", nargs=-1)
@click.option("--out", type=click.Path(), required=True, help="Folder for checkpoints, metrics, the curve and the base.")
@click.option("--resume", is_flag=True, help="Continue from the newest complete checkpoint in the folder.")
@json_option
def base(config: str | None, overrides: tuple[str, ...], out: str, resume: bool, as_json: bool) -> None:
    """Train the tiny base on the invented world; CONFIG is a YAML file, OVERRIDES are key=value pairs."""
    from memjax.config import load_config
    from memjax.evaluate.tiny import TinyConfig, train_tiny

    if config is not None and "=" in config and not Path(config).exists():
        overrides, config = (config, *overrides), None
    settings = load_config(TinyConfig, config, overrides)
    fitted = train_tiny(settings, out, resume=resume)
    result = {"step": fitted.step, "base": str(Path(out) / "base"), **fitted.metrics}
    if as_json:
        emit(result)
        return
    scores = {k.removeprefix("eval/"): v for k, v in fitted.metrics.items() if k.startswith("eval/")}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
    console().print(f"trained {fitted.step} steps; the base is in {result['base']}\nvalidation world: {shown}")
