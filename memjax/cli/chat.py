"""`memjax chat`: a conversation with a bank, or about one text through a bounded cache, turn by turn."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import click

from memjax.cli.ask import open_text, text_summary
from memjax.cli.common import (
    base_option,
    budget_option,
    check_source,
    console,
    emit,
    indexer_option,
    json_option,
    latent_option,
    load_base,
    namespace_option,
    policy_option,
    some_bank_option,
    text_option,
)
from memjax.errors import MemjaxError

if TYPE_CHECKING:
    from memjax.serve.chat import Chat
    from memjax.serve.engine import Answer
    from memjax.serve.text import TextChat

TEXT_HELP = "/new starts anew, /quit ends"
HELP = "/memory NAME reads from one memory, /auto lets the bank choose, /new starts anew, /quit ends"


@click.command(
    epilog='Example: memjax chat --bank ./bank   or   printf "Who owns the oven?\\n" | memjax chat --bank ./bank   or '
    "  memjax chat --file novel.txt --budget 512"
)
@some_bank_option
@text_option
@budget_option
@policy_option
@indexer_option
@latent_option
@click.option("--memory", metavar="NAME", help="Read from this memory until /auto or /memory says otherwise.")
@click.option("--no-gate", is_flag=True, help="Read from the best candidate, however unsure it is.")
@click.option("--candidates", default=4, show_default=True, help="Memories to probe per turn.")
@click.option("--max-tokens", default=96, show_default=True, help="Stop an answer after this many tokens.")
@base_option
@namespace_option
@json_option
def chat(
    bank_path: str | None,
    path: str | None,
    budget: str | None,
    policy_name: str | None,
    indexer: str | None,
    latent: str | None,
    memory: str | None,
    no_gate: bool,
    candidates: int,
    max_tokens: int,
    base_name: str | None,
    namespace: str,
    as_json: bool,
) -> None:
    """Talk with the bank: each turn is answered from the memory that fits it, or by the base alone.

    Questions are lines of standard input. In a turn, /memory NAME, /auto, /new and /quit change what happens next. The
    base reads each word of the conversation once. With --json there is one object per conversation, at the end.
    With --file and --budget the base reads that text once, in blocks, and what is said competes with it for the budget.
    """
    from memjax.bank.store import open_bank
    from memjax.models.encoder import available_encoder
    from memjax.serve.chat import Chat
    from memjax.serve.engine import Engine, EngineConfig
    from memjax.write.prompts import prompt_style

    check_source(path, budget, policy_name, bank_path)
    if path:
        _about_text(open_text(path, budget, policy_name, indexer, latent, base_name), budget, max_tokens, as_json)
        return
    assert bank_path is not None
    with open_bank(bank_path) as bank:
        base = load_base(base_name, bank.base_name)
        bank.bind_base(base.id, base.name)
        if memory is not None:
            bank.get(memory, namespace)
        encoder = available_encoder()
        style = prompt_style(base.tokenizer.prompt_style)
        engine = Engine(base, bank, style, EngineConfig(candidates=candidates), namespace, encoder)
        talk = Chat(engine, memory=memory, gate=not no_gate)
        told: list[dict[str, Any]] = []
        typed = sys.stdin.isatty() and not as_json
        if typed:
            console().print(f"[dim]{HELP}[/dim]")
        for line in _lines(typed):
            if line.startswith("/"):
                if line == "/quit":
                    break
                _command(talk, line, as_json)
                continue
            if (answer := _answered(talk, line, max_tokens, typed, as_json)) is None:
                continue
            told.append(_row(line, answer))
            if not as_json:
                _summary(answer)
    if as_json:
        emit({"turns": told})


def _about_text(talk: TextChat, budget: str | None, max_tokens: int, as_json: bool) -> None:
    told: list[dict[str, Any]] = []
    typed = sys.stdin.isatty() and not as_json
    if typed:
        console().print(f"[dim]{TEXT_HELP}[/dim]")
    for line in _lines(typed):
        if line == "/quit":
            break
        if line == "/new":
            talk.reset()
            continue
        if line.startswith("/"):
            console(as_json).print(f"[yellow]{line} is no command here; {TEXT_HELP}[/yellow]")
            continue
        if (answer := _answered(talk, line, max_tokens, typed, as_json)) is None:
            continue
        told.append({"question": line, **dataclasses.asdict(answer)})
        if not as_json:
            console().print(f"[dim]{text_summary(answer, talk.policy.name)}[/dim]")
    if as_json:
        emit({"turns": told, "budget": budget, "policy": talk.policy.name, "base": talk.base.name})


def _answered(talk: Any, line: str, max_tokens: int, typed: bool, as_json: bool) -> Any:
    """What a `Chat` or a `TextChat` answers, shown as it comes; None where a person typed what it refuses, told why."""
    from memjax.models.generate import Sampling

    try:
        show = None if as_json else (lambda piece: click.echo(piece, nl=False))
        answer = talk.ask(line, sampling=Sampling(max_tokens=max_tokens), on_text=show)
    except MemjaxError as error:
        if not typed:
            raise
        console(True).print(f"[red]{error}[/red]")
        return None
    if not as_json:
        click.echo()
    return answer


def _lines(typed: bool):
    """Questions, one a line, until standard input ends; a prompt is shown where a person types them."""
    while True:
        if typed:
            click.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _command(talk: Chat, line: str, as_json: bool) -> None:
    name, _, value = line.partition(" ")
    out = console(as_json)
    if name == "/memory" and value.strip():
        talk.engine.bank.get(value.strip(), talk.engine.namespace)
        talk.memory = value.strip()
    elif name == "/auto":
        talk.memory = None
    elif name == "/new":
        talk.reset()
    else:
        out.print(f"[yellow]{line} is no command here; {HELP}[/yellow]")


def _row(question: str, answer: Answer) -> dict[str, Any]:
    choice = answer.choice
    return {
        "question": question,
        "answer": answer.text,
        "memory": choice.memory,
        "reason": choice.reason,
        "prompt_tokens": answer.prompt_tokens,
        "first_token": answer.seconds["first_token"],
    }


def _summary(answer: Answer) -> None:
    choice = answer.choice
    source = f"memory [bold]{choice.memory}[/bold]" if choice.memory else "the base alone"
    console().print(f"[dim]from {source}: {choice.reason}; first token {answer.seconds['first_token']:.2f} s[/dim]")
    for name in choice.damaged:
        console().print(f"[yellow]memory {name!r} is unreadable and left out; name it, or run memjax bank verify[/yellow]")
