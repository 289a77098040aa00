"""SnapKV's tokens of a text beside a buffer of it: as many keys and values, of the text's own (arXiv 2404.14469)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from memjax.evaluate.corpora import Item
from memjax.evict.compact import Budget, Kept
from memjax.evict.once import cut, read_dense
from memjax.evict.policies.snapkv import SnapKV
from memjax.models.base import Base
from memjax.models.generate import Sampling, generate_all
from memjax.write.prompts import PromptStyle
from memjax.write.reading import split_prompts


def kept_tokens(base: Base, style: PromptStyle, text: str, ratio: float, policy: SnapKV = SnapKV()) -> Kept:
    """What SnapKV keeps of a text for the bytes of its buffer: ceil(n / ratio) places of every head, and the prompt's
    beginning, which a buffer's reader has in full too.

    The text is read whole and cut once, without sight of any question: what observes are the text's own last `window`
    tokens, which stay; half as many as are kept, where that is fewer. Later tokens go on from the text's true length.
    """
    split = split_prompts(base.tokenizer, style, text)
    slots, header = math.ceil(len(split.context) / ratio), len(split.header)
    dense = read_dense(base.model, base.params, [[*split.header, *split.context]], policy.queries)
    return cut(base.model, dense, policy, Budget(tokens=header + slots), sinks=header)


def ask_kept(
    base: Base,
    style: PromptStyle,
    texts: Mapping[str, str],
    items: Sequence[Item],
    ratio: float,
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """What the base says to each item behind the `kept_tokens` of its text; progress is told how many are answered."""
    said, done = [""] * len(items), 0
    for name, text in texts.items():
        members = [i for i, item in enumerate(items) if item.name == name]
        if not members:
            continue
        split = split_prompts(base.tokenizer, style, text)
        prefix = kept_tokens(base, style, text, ratio).prefix()
        tails = [split.tail(items[i].question) for i in members]
        made = generate_all(
            base.model, base.params, tails, base.tokenizer.eos_ids, Sampling(max_tokens=max_tokens), prefix=prefix
        )
        for i, tokens in zip(members, made, strict=True):
            said[i] = base.tokenizer.decode(tokens).strip()
        done += len(members)
        progress(done)
    return said
