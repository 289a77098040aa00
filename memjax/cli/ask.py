"""`memjax ask`: a question to the bank, or to one text through a bounded cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from memjax.cli.common import (
    base_option,
    bounded_by,
    budget_option,
    check_source,
    console,
    emit,
    indexer_option,
    json_option,
    latent_option,
    learned_by,
    load_base,
    namespace_option,
    policy_option,
    read_text,
    retrieve_option,
    some_bank_option,
    text_option,
)

if TYPE_CHECKING:
    from memjax.serve.choose import Candidate, Choice
    from memjax.serve.compose import Composed
    from memjax.serve.engine import Answer
    from memjax.serve.text import TextAnswer, TextChat


@click.command(
    epilog='Example: memjax ask "When does the ferry leave?" --bank ./bank --explain, or from a text of which 512 tokens '
    'stay in the cache: memjax ask "Who is the captain?" --file novel.txt --budget 512'
)
@click.argument("question")
@some_bank_option
@text_option
@budget_option
@policy_option
@indexer_option
@latent_option
@click.option(
    "--memory", "memories", metavar="NAME", multiple=True, help="Read from this memory, whatever retrieval and gate say."
)
@click.option(
    "--compose",
    type=click.Choice(["vote", "mix", "shift", "raw"]),
    default="vote",
    show_default=True,
    help="With several --memory: the commonest of their answers, the mean of their next-token distributions, or, of "
    "buffers, all read at once: shift, each at places of its own; raw, each where it lies when alone. Without --memory "
    "shift and raw read the --candidates best buffers.",
)
@click.option("--no-gate", is_flag=True, help="Read from the best candidate, however unsure it is.")
@click.option("--explain", is_flag=True, help="Show candidates, entropies and times, beside the base's own time.")
@click.option("--candidates", default=4, show_default=True, help="Memories to probe.")
@retrieve_option
@click.option("--max-tokens", default=48, show_default=True, help="Stop after this many new tokens.")
@base_option
@namespace_option
@json_option
def ask(
    question: str,
    bank_path: str | None,
    path: str | None,
    budget: str | None,
    policy_name: str | None,
    indexer: str | None,
    latent: str | None,
    memories: tuple[str, ...],
    compose: str,
    no_gate: bool,
    explain: bool,
    candidates: int,
    retrieve: str,
    max_tokens: int,
    base_name: str | None,
    namespace: str,
    as_json: bool,
) -> None:
    """Answer QUESTION from the bank's memories, or from the base alone where none is fit for it.

    With --file and --budget the base reads that text in blocks through a cache that stays so small, and then the question.
    """
    from memjax.bank.store import open_bank
    from memjax.models.encoder import available_encoder
    from memjax.models.generate import Sampling
    from memjax.serve.compose import compose as composed
    from memjax.serve.engine import Engine, EngineConfig, base_first_token
    from memjax.serve.engine import as_json as plain
    from memjax.serve.together import JOINS, nearest_buffers
    from memjax.write.prompts import prompt_style

    check_source(path, budget, policy_name, bank_path)
    if path:
        talk = open_text(path, budget, policy_name, indexer, latent, base_name)
        _from_text(talk, question, budget, max_tokens, as_json)
        return
    assert bank_path is not None
    with open_bank(bank_path) as bank:
        base = load_base(base_name, bank.base_name)
        bank.bind_base(base.id, base.name)
        style = prompt_style(base.tokenizer.prompt_style)
        # Named memories need no retrieval.
        encoder = None if memories else available_encoder(retrieve)
        resident = max(16, len(memories))
        config = EngineConfig(candidates=max(candidates, len(memories)), resident=resident, retrieve=retrieve)
        engine = Engine(base, bank, style, config, namespace, encoder)
        if not memories and compose in JOINS:
            memories = nearest_buffers(engine, question)
        if len(memories) > 1:
            _composed(composed(engine, question, memories, compose, Sampling(max_tokens)), as_json)
            return
        memory = memories[0] if memories else None
        put = functools.partial(engine.ask, question, memory=memory, gate=not no_gate, sampling=Sampling(max_tokens))
        alone = None
        if explain:
            # Compiled programs first, so that both times are those of reading and not of compiling.
            put()
            alone = base_first_token(base, style, question)
        show = not as_json
        answer = put(on_text=(lambda t: click.echo(t, nl=False)) if show else None)
    if as_json:
        emit({**plain(answer), **({} if alone is None else {"base_first_token": alone})})
        return
    click.echo()
    _summary(answer, console())
    if explain:
        _explain(answer, alone)


def _from_text(talk: TextChat, question: str, budget: str | None, max_tokens: int, as_json: bool) -> None:
    from memjax.models.generate import Sampling

    show = None if as_json else (lambda piece: click.echo(piece, nl=False))
    answer = talk.ask(question, sampling=Sampling(max_tokens), on_text=show)
    if as_json:
        emit({**dataclasses.asdict(answer), "budget": budget, "policy": talk.policy.name, "base": talk.base.name})
        return
    click.echo()
    console().print(f"[dim]{text_summary(answer, talk.policy.name)}[/dim]")


def open_text(
    path: str, budget: str | None, policy_name: str | None, indexer: str | None, latent: str | None, base_name: str | None
) -> TextChat:
    """A conversation about the text of a file, read through a cache of the budget."""
    from memjax.serve.text import TextChat
    from memjax.write.prompts import prompt_style

    limit, policy, *folders = bounded_by(budget, policy_name, indexer, latent, base_name)
    assert limit is not None
    text = read_text(path)
    base = load_base(base_name)
    return TextChat(base, prompt_style(base.tokenizer.prompt_style), text, policy, limit, learned_by(base, *folders))


def text_summary(answer: TextAnswer, policy: str) -> str:
    """What an answer from a bounded cache was read from, and how long it took, in one line."""
    held = f"{answer.kept_tokens:.0f} of {answer.prompt_tokens} prompt tokens, kept by {policy}"
    times = f"first token {answer.seconds['first_token']:.2f} s, all {answer.seconds['total']:.2f} s"
    return f"from {held} ({answer.cache_bytes / 2**20:.1f} MiB); {times}"


def _composed(made: Composed, as_json: bool) -> None:
    if as_json:
        emit(dataclasses.asdict(made))
        return
    click.echo(made.text)
    out = console()
    if made.share is not None:
        for name, said in zip(made.memories, made.said, strict=True):
            out.print(f"[dim]{name}: {escape(said)}[/dim]")
    share = "" if made.share is None else f", {made.share:.0%} of them for it"
    how = f"by a {made.how} of" if made.how in ("vote", "mix") else f"read at once ({made.how}):"
    out.print(f"[dim]{how} {', '.join(made.memories)}{share}[/dim]")


def _summary(answer: Answer, out) -> None:
    choice = answer.choice
    source = f"memory [bold]{choice.memory}[/bold]" if choice.memory else "the base alone"
    found = choice.entropy if choice.value is None else choice.value
    value = "" if found is None else f", gate {found:.2f}"
    value += "" if choice.threshold is None else f" (opens below {choice.threshold:.2f})"
    times = f"first token {answer.seconds['first_token']:.2f} s, all {answer.seconds['total']:.2f} s"
    out.print(f"[dim]from {source}: {choice.reason}{value}; {answer.prompt_tokens} prompt tokens; {times}[/dim]")
    for name in choice.damaged:
        out.print(f"[yellow]memory {name!r} is unreadable and left out; name it, or run memjax bank verify[/yellow]")


def _explain(answer: Answer, alone: float | None) -> None:
    out, choice = console(), answer.choice
    table = Table("memory", "retrieval", "entropy", "KL to the base", "gate", title="candidates")
    for c in choice.candidates:
        table.add_row(c.name, f"{c.score:.2f}", f"{c.entropy:.2f}", f"{c.kl:.2f}", gate_cell(choice, c))
    table.add_row("(base)", "", f"{choice.base_entropy:.2f}", "", "")
    out.print(table)
    times = Table("step", "seconds", title="times")
    for step, value in answer.seconds.items():
        times.add_row(step, f"{value:.3f}")
    if alone is not None:
        times.add_row("base alone, first token", f"{alone:.3f}")
        times.add_row("ratio of first tokens", f"{answer.seconds['first_token'] / alone:.2f}")
    out.print(times)


def gate_cell(choice: Choice, candidate: Candidate) -> str:
    """What the gate would say of a candidate: open or closed with its value, - where it has none."""
    if choice.threshold is None or candidate.value is None:
        return "-"
    return f"{'open' if candidate.value < choice.threshold else 'closed'} {candidate.value:.2f}"
