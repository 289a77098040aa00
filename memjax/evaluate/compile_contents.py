"""Contents of the ratio sweep of `memjax eval compile`: the world's facts as prose, as lists and as numbers.

Numbers and tables are what compression is known to lose first (arXiv 2606.04557), so ratios are reported by content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

from memjax.evaluate import world
from memjax.evaluate.world.documents import MAX_TOKENS, tell
from memjax.evaluate.world.relations import NUMBER

CONTENTS = ("prose", "lists", "numbers")
RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_LARGER = 8  # times the length of the document whose facts are drawn from: a third of all kinds have one number each


def content_document(
    content: str, seed: int, index: int, tokens: int, size: Callable[[str], int], split: str = "test"
) -> world.Document:
    """A document of at most (and nearly) `tokens` tokens, as `size` counts them.

    prose: as it is; lists: a line for each fact, which names the relation, the subject and the object, and nothing else;
    numbers: sentences that each tell a number. Facts of lists and numbers come from a larger document.
    """
    if content == "prose":
        return world.document(split, seed, index, tokens)
    source = world.document(split, seed, index, min(MAX_TOKENS, _LARGER * tokens))
    facts = list(source.facts)
    if content == "numbers":
        rng = Random(f"numbers/{seed}/{index}")
        units = [(tell(rng, split, [fact]), fact) for fact in facts if fact.relation.object == NUMBER]
        gap = " "
    else:
        order = {fact.subject: place for place, fact in reversed(list(enumerate(facts)))}
        facts.sort(key=lambda fact: order[fact.subject])  # a subject's facts stand together
        units = [(f"{fact.relation.noun} of {fact.subject}: {fact.object}.", fact) for fact in facts]
        gap = "\n"
    kept: list[tuple[str, world.Fact]] = []
    total = 0
    for text, fact in units:
        total += size(f"{gap}{text}")
        if total > tokens:
            break
        kept.append((text, fact))
    told = tuple(fact for _, fact in kept)
    mentioned = {fact.subject for fact in told} | {fact.object for fact in told}
    kinds = {name: kind for name, kind in source.kinds.items() if name in mentioned}
    sentences = tuple(text for text, _ in kept)
    whole = gap.join(sentences)
    return dataclasses.replace(
        source, text=whole, facts=told, sentences=sentences, kinds=kinds, tokens=size(whole), varied=False
    )


def draw_contents(path: Path, numbers: Mapping[str, float], ratios: Sequence[float]) -> Path:
    """Draws the share of the full context's accuracy by ratio, a line for each content, into the PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for content in CONTENTS:
        shares = [numbers[f"retain_{ratio:g}x_{content}"] for ratio in ratios]
        axes.plot(list(ratios), shares, marker="o", label=content)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ratios), [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("context tokens per slot")
    axes.set_ylabel("share of the full context's exact match")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    return path
