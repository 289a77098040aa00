"""What a gold answer costs behind a buffer, the whole text, or nothing: finer than whether a greedy answer holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from memjax.evaluate.corpora import Item
from memjax.memory.buffer import Buffer
from memjax.models.base import Base
from memjax.models.buffers import buffer_prefix, read_buffer
from memjax.models.generate import Prefix, bucket, read_prefix
from memjax.serve.engine import next_token_losses
from memjax.write.prompts import PromptStyle, answer_text, ask_tokens
from memjax.write.reading import header_tokens, split_prompts, tail_tokens


def answer_loss(base: Base, prefix: Prefix, tail: Sequence[int], gold: Sequence[int]) -> float:
    """Mean negative log-likelihood, nats per token, of the tokens `gold` behind a prefix and a prompt's `tail`."""
    fed = [*tail, *gold]
    ids = np.zeros((1, bucket(len(fed))), np.int32)
    positions = np.full(ids.shape, -1, np.int32)
    ids[0, : len(fed)], positions[0, : len(fed)] = fed, int(prefix.length) + np.arange(len(fed))
    each = next_token_losses(base.model, base.params, ids, positions, prefix.segment)
    return float(np.asarray(each)[0, len(tail) - 1 : len(fed) - 1].mean())


def gold_losses(
    base: Base,
    style: PromptStyle,
    items: Sequence[Item],
    texts: Mapping[str, str],
    buffers: Mapping[str, Buffer] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """The loss of each item's first answer, in nats per token: behind the buffer of its document, with its text in the
    prompt where `buffers` are not given, or behind the bare question where neither has it."""
    tokenizer, made, held = base.tokenizer, [], {}
    for item in items:
        if item.name not in held:
            held[item.name] = _prefix(base, style, texts.get(item.name), (buffers or {}).get(item.name))
        prefix = held[item.name]
        gold = tokenizer.encode(answer_text(tokenizer, style, item.answers[0]))
        if prefix is None:
            asked = ask_tokens(tokenizer, style, item.question)
            made.append(answer_loss(base, read_prefix(base.model, base.params, asked[:-1]), asked[-1:], gold))
        else:
            made.append(answer_loss(base, prefix, tail_tokens(tokenizer, style, item.question), gold))
        progress(len(made))
    return made


def _prefix(base: Base, style: PromptStyle, text: str | None, buffer: Buffer | None) -> Prefix | None:
    """What questions about a document are read behind; None for nothing."""
    if buffer is not None:
        header = read_prefix(base.model, base.params, header_tokens(base.tokenizer, style))
        return buffer_prefix(header.segment, *read_buffer(base.config, buffer))
    if text is None:
        return None
    split = split_prompts(base.tokenizer, style, text)
    return read_prefix(base.model, base.params, [*split.header, *split.context])
