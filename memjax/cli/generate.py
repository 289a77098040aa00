"""`memjax generate`: the plain base, streaming."""

from __future__ import annotations

import time

import click

from memjax.cli.common import base_option, emit, json_option, load_base


@click.command(epilog='Example: memjax generate "Once upon a time" --max-tokens 60 --temperature 0.7')
@click.argument("prompt")
@base_option
@click.option("--max-tokens", default=128, show_default=True, help="Stop after this many new tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the likeliest tokens of this much probability.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draw.")
@click.option("--chat", is_flag=True, help="Put the prompt through the base's chat template.")
@json_option
def generate(
    prompt: str,
    base_name: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    as_json: bool,
) -> None:
    """Continue PROMPT with the base alone; the text streams to stdout."""
    from memjax.models.generate import Sampling, stream

    sampling = Sampling(max_tokens, temperature, top_p, seed)
    base = load_base(base_name)
    tokenizer = base.tokenizer
    if chat:
        tokens = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    else:
        tokens = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
    began = time.perf_counter()
    decoder, text, made = tokenizer.stream_decoder(), "" if chat else prompt, 0
    if not as_json:
        click.echo(text, nl=False)
    for new in stream(base.model, base.params, [tokens], tokenizer.eos_ids, sampling, every=4):
        piece = "".join(decoder.push(token) for token in new[0])
        made += len(new[0])
        text += piece
        if not as_json:
            click.echo(piece, nl=False)
    rest = decoder.flush()
    if as_json:
        seconds = time.perf_counter() - began
        emit(
            {
                "text": text + rest,
                "prompt_tokens": len(tokens),
                "new_tokens": made,
                "seconds": seconds,
                "base": base.name,
            }
        )
    else:
        click.echo(rest)
