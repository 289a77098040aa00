"""`memjax bench`: speed and memory as ratios, on random weights of smollm2-135m's shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import click
from rich.table import Table

from memjax.cli.common import console, emit, json_option, whole_numbers


@click.group()
def bench() -> None:
    """Speed and memory, always as ratios against something, on random weights of smollm2-135m's shape.

    Bytes are what XLA expects its programs to move: estimates. Seconds are medians of calls that alternate, ratios of
    seconds medians of the rounds' own.
    """


def _options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option("--out", metavar="DIR", help="Write result.json here."),
        click.option("--times", type=click.IntRange(1), default=9, show_default=True, help="Calls of each, after two."),
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _rows(count: int) -> Callable[..., Any]:
    return click.option("--rows", type=click.IntRange(1), default=count, show_default=True, help="Rows at once.")


_prefix = click.option("--prefix", type=click.IntRange(16), default=2048, show_default=True, help="Tokens of the prefix.")
_layers = click.option("--layers", type=click.IntRange(1), help="Layers of the model; all 30 by default.")


@bench.command(epilog="Example: memjax bench attention --out results/attention")
@_rows(32)
@_prefix
@_options
def attention(rows: int, prefix: int, out: str | None, times: int, as_json: bool) -> None:
    """One layer's attention over one shared prefix, against a copy of it in every row's cache."""
    from memjax.bench.attention import shared_segment

    _show(
        lambda: shared_segment(rows=rows, prefix=prefix, times=times), out, as_json, rows=rows, prefix=prefix, times=times
    )


@bench.command(epilog="Example: memjax bench lora --out results/lora")
@_rows(8)
@click.option("--resident", type=click.IntRange(1), default=1024, show_default=True, help="Adapters that are resident.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Their rank.")
@_layers
@_options
def lora(rows: int, resident: int, rank: int, layers: int | None, out: str | None, times: int, as_json: bool) -> None:
    """A decode step with another adapter in every row, against the base; 1,024 adapters take 5 GB."""
    from memjax.bench.lora import adapters

    config = _shape(layers)
    told = {"rows": rows, "resident": resident, "rank": rank, "times": times}
    _show(lambda: adapters(config, **told), out, as_json, layers=config.num_layers, **told)


@bench.command(epilog="Example: memjax bench decode --out results/decode")
@_rows(32)
@_prefix
@_layers
@_options
def decode(rows: int, prefix: int, layers: int | None, out: str | None, times: int, as_json: bool) -> None:
    """A decode step over one shared prefix, against a copy in every row's cache (3 GB); and memory that is not used."""
    from memjax.bench.decode import shared_prefix, unused_same_program

    config = _shape(layers)
    told = {"rows": rows, "prefix": prefix, "times": times}
    run = lambda: {**shared_prefix(config, **told), **unused_same_program(config)}
    _show(run, out, as_json, layers=config.num_layers, **told)


@bench.command(epilog="Example: memjax bench evict --out results/evict")
@_rows(4)
@click.option("--tokens", type=click.IntRange(32), default=8192, show_default=True, help="Tokens of each row's text.")
@click.option("--budget", type=click.IntRange(8), default=512, show_default=True, help="Tokens that the cache keeps.")
@click.option("--policy", "policy_name", default="snapkv", show_default=True, help="What it keeps.")
@_layers
@click.option(
    "--timed-layers", type=click.IntRange(1), default=8, show_default=True, help="Layers of the model whose seconds count."
)
@_options
def evict(
    rows: int,
    tokens: int,
    budget: int,
    policy_name: str,
    layers: int | None,
    timed_layers: int,
    out: str | None,
    times: int,
    as_json: bool,
) -> None:
    """A bounded cache against a full one: bytes that block prefill allocates, seconds of a decode step.

    Bytes are the compiler's for the program of one block of all --layers, without the parameters. To the bounded step's
    seconds belongs its part of taking generated tokens in. indexer_overhead is what an untrained indexer adds to a block
    of prefill. Seconds are of a model of --timed-layers, which holds a cache of 0.4 GB where all 30 layers' hold 1.5: the
    vocabulary's part weighs more in it, so the ratio of all layers' steps is lower than decode_ratio.
    """
    from memjax.bench.evict import decode_time, indexer_overhead, prefill_memory
    from memjax.errors import ConfigError
    from memjax.evict.policies import policy_named

    if budget >= tokens:
        raise ConfigError(
            f"--budget {budget}: a budget that holds all of {tokens} tokens evicts nothing; name a smaller one"
        )
    config, policy = _shape(layers), policy_named(policy_name)
    timed = _shape(min(timed_layers, config.num_layers))
    told = {"rows": rows, "tokens": tokens, "budget": budget}

    def run() -> dict[str, float]:
        numbers = {**prefill_memory(config, **told, policy=policy)}
        numbers |= decode_time(timed, **told, times=times, policy=policy)
        # A block of prefill takes as long as a hundred steps: three rounds are enough.
        return {**numbers, **indexer_overhead(timed, **told, times=min(times, 3))}

    _show(
        run, out, as_json, layers=config.num_layers, timed_layers=timed.num_layers, **told, policy=policy.name, times=times
    )


@bench.command(name="compile", epilog="Example: memjax bench compile --out results/bench-compile")
@_rows(8)
@click.option("--tokens", type=click.IntRange(64), default=1024, show_default=True, help="Tokens of the context.")
@click.option("--ratio", type=click.FloatRange(min=1), default=16.0, show_default=True, help="Of them per slot.")
@click.option("--task", type=click.IntRange(8), default=96, show_default=True, help="Tokens of a row that a step reads.")
@_layers
@_options
def compile_(
    rows: int, tokens: int, ratio: float, task: int, layers: int | None, out: str | None, times: int, as_json: bool
) -> None:
    """Compiling in two passes against one masked sequence, and the first token behind a buffer against the whole prompt.

    step_speedup is a training step's time as one sequence over that with the context's cache, the adapter on the slots
    alone in both; --rows are the tasks of a step. ttft_ratio is the time to the first token behind a buffer over that with
    the context in the prompt.
    """
    from memjax.bench.compile import first_token, step_speedup

    config = _shape(layers)
    told: dict[str, Any] = {"tokens": tokens, "ratio": ratio, "times": times}
    run = lambda: {**step_speedup(config, **told, rows=rows, task=task), **first_token(config, **told)}
    _show(run, out, as_json, layers=config.num_layers, rows=rows, tokens=tokens, ratio=ratio, task=task, times=times)


@bench.command(epilog="Example: memjax bench internalize --out results/bench-internalize")
@click.option("--lengths", default="512,2048,8192", show_default=True, help="Tokens of the documents, with commas.")
@click.option("--chunk", type=click.IntRange(16), default=512, show_default=True, help="Tokens of a chunk.")
@_layers
@_options
def internalize(lengths: str, chunk: int, layers: int | None, out: str | None, times: int, as_json: bool) -> None:
    """One pass of a hypernetwork by the document's length, all layers at once (batched) and one by one (iterative).

    peak_bytes are the compiler's for the program that reads eight chunks, without parameters; adapter_bytes and
    cache_bytes count two bytes a number: all factors of the adapter, and the keys and values that it stands for.
    """
    from memjax.bench.internalize import pass_cost

    config, tokens = _shape(layers), whole_numbers(lengths, "--lengths", 1)
    run = lambda: pass_cost(config, tokens, chunk, times)
    _show(run, out, as_json, layers=config.num_layers, lengths=lengths, chunk=chunk, times=times)


def _shape(layers: int | None) -> Any:
    import dataclasses

    from memjax.bench.timing import SMOLLM2_SHAPE

    return dataclasses.replace(SMOLLM2_SHAPE, num_layers=layers or SMOLLM2_SHAPE.num_layers)


def _show(run: Callable[[], Mapping[str, float]], out: str | None, as_json: bool, **told: Any) -> None:
    """Measures, writes result.json, and shows a table or one JSON object."""
    from memjax.evaluate.report import setting, write_result

    began = time.perf_counter()
    numbers = {**run(), "seconds": time.perf_counter() - began}
    said = setting(shape="smollm2-135m, random float32 weights", **told)
    path = write_result(out, numbers, said) if out else None
    if as_json:
        emit({**numbers, "setting": said})
        return
    table = Table("", "value", title=", ".join(f"{name} {value}" for name, value in told.items()))
    for key, value in numbers.items():
        table.add_row(key, f"{value:.4g}")
    screen = console()
    screen.print(table)
    screen.print(f"written to {path}" if path else "give --out DIR to keep the numbers", soft_wrap=True)
