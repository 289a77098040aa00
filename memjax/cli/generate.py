"""`memjax generate`: the plain base, streaming, over a full cache or a bounded one."""

from __future__ import annotations

import time
from typing import Any

import click

from memjax.cli.common import (
    base_option,
    bounded_by,
    budget_option,
    emit,
    indexer_option,
    json_option,
    latent_option,
    learned_by,
    load_base,
    policy_option,
    read_text,
)


@click.command(
    epilog='Example: memjax generate "Once upon a time" --max-tokens 60, or of a long text, keeping 512 tokens of it in '
    'the cache: memjax generate "In short:" --file novel.txt --budget 512 --policy snapkv'
)
@click.argument("prompt")
@base_option
@click.option("--max-tokens", default=128, show_default=True, help="Stop after this many new tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the likeliest tokens of this much probability.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draw.")
@click.option("--chat", is_flag=True, help="Put the prompt through the base's chat template.")
@click.option("--file", "path", metavar="FILE", help="A text file that is read before PROMPT.")
@budget_option
@policy_option
@indexer_option
@latent_option
@json_option
def generate(
    prompt: str,
    base_name: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    path: str | None,
    budget: str | None,
    policy_name: str | None,
    indexer: str | None,
    latent: str | None,
    as_json: bool,
) -> None:
    """Continue PROMPT with the base alone; the text streams to stdout.

    With --budget the cache stays that small however long the text is. Kept tokens stand at their places in the text, so
    prompt and new tokens together must still fit the base's window.
    """
    from memjax.evict.bounded import Reading
    from memjax.evict.bounded import stream as bounded_stream
    from memjax.models.generate import Sampling, stream

    limit, policy, *folders = bounded_by(budget, policy_name, indexer, latent, base_name)
    if path:
        prompt = f"{read_text(path)}\n{prompt}"
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    base = load_base(base_name)
    learned = learned_by(base, *folders)
    tokenizer = base.tokenizer
    if chat:
        tokens = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    else:
        tokens = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
    began = time.perf_counter()
    decoder, text, made = tokenizer.stream_decoder(), "" if chat else prompt, 0
    if not as_json:
        click.echo(text, nl=False)
    report: dict[str, Any] = {"budget": budget, "policy": policy.name, "kept_tokens": len(tokens)}

    def on_read(reading: Reading) -> None:
        report.update(kept_tokens=float(reading.kept.tokens()[0]), cache_bytes=reading.kept.bytes)

    args = (base.model, base.params, [tokens], tokenizer.eos_ids, sampling)
    if limit is None:
        pieces = stream(*args, every=4)
    else:
        pieces = bounded_stream(*args, policy=policy, budget=limit, learned=learned, every=4, on_read=on_read)
    for new in pieces:
        piece = "".join(decoder.push(token) for token in new[0])
        made += len(new[0])
        text += piece
        if not as_json:
            click.echo(piece, nl=False)
    rest = decoder.flush()
    if as_json:
        seconds = time.perf_counter() - began
        shown: dict[str, Any] = {
            "text": text + rest,
            "prompt_tokens": len(tokens),
            "new_tokens": made,
            "seconds": seconds,
            "base": base.name,
        }
        if limit is not None:
            shown |= report
        emit(shown)
    else:
        click.echo(rest)
