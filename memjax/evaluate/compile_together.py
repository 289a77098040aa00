"""The composition figure of `memjax eval compile`: questions about one text with the buffers of several loaded.

Of every question's text the buffer is there, among those of others and anywhere among them; with buffers that were
trained alone and with those that were trained beside others (arXiv 2606.04557; arXiv 2602.21221 loads one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from memjax.bank.store import Bank
from memjax.evaluate.corpora import Item
from memjax.memory.buffer import Buffer
from memjax.memory.files import read_artefact
from memjax.models.base import Base
from memjax.models.generate import Sampling, generate_all, read_prefix
from memjax.models.weights import SITE_MODULES
from memjax.serve.together import JOINS, buffers_prefix
from memjax.write.prompts import PromptStyle
from memjax.write.reading import header_tokens, tail_tokens

COUNTS = (1, 2, 4, 8)
TOGETHER = ("compiled", "distractors")  # the methods whose buffers are loaded together


def ask_together(
    base: Base,
    style: PromptStyle,
    bank: Bank,
    items: Sequence[Item],
    names: Sequence[str],
    count: int,
    join: str,
    max_tokens: int,
    seed: int = 0,
) -> list[str]:
    """What the base says to each item behind the buffers of its own text and of `count` - 1 others of `names`.

    Which ones, and where the own one stands, is drawn from the seed: the same for every join and method.
    """
    header = read_prefix(base.model, base.params, header_tokens(base.tokenizer, style)).segment
    buffers = {name: bank_buffer(base, bank, name) for name in names}
    said = [""] * len(items)
    for name in names:
        members = [i for i, item in enumerate(items) if item.name == name]
        if not members:
            continue
        loaded = [buffers[one] for one in companions(names, name, count, seed)]
        prefix = buffers_prefix(base.config, header, loaded, next(way for way in JOINS if way == join))
        tails = [tail_tokens(base.tokenizer, style, items[i].question) for i in members]
        sampling = Sampling(max_tokens=max_tokens)
        made = generate_all(base.model, base.params, tails, base.tokenizer.eos_ids, sampling, prefix=prefix)
        for i, tokens in zip(members, made, strict=True):
            said[i] = base.tokenizer.decode(tokens).strip()
    return said


def companions(names: Sequence[str], own: str, count: int, seed: int) -> list[str]:
    """`count` names, `own` among them at any place; those of fewer are among those of more."""
    rng = Random(f"together/{seed}/{own}")
    others = [name for name in names if name != own]
    chosen = rng.sample(others, len(others))[: count - 1]
    place = rng.random()
    chosen.insert(int(place * count), own)
    return chosen


def bank_buffer(base: Base, bank: Bank, name: str) -> Buffer:
    """The buffer of this name, from its files."""
    config = base.config
    heads = (config.num_kv_heads, config.head_size)
    folder = bank.folder(bank.get(name).id)
    return Buffer(*read_artefact(folder, {}, config.num_layers, SITE_MODULES, base.id, heads).artefact)


def together_columns(methods: Sequence[str], counts: Sequence[int]) -> dict[str, tuple[str, str, int]]:
    """{column: (method, join, count)}; the columns of `compiled` are not named after it."""
    return {
        f"{'' if method == 'compiled' else f'{method}-'}{join}-{count}": (method, join, count)
        for method in methods
        if method in TOGETHER
        for join in JOINS
        for count in counts
    }


def draw_together(path: Path, numbers: Mapping[str, float], columns: Mapping[str, tuple[str, str, int]]) -> Path:
    """Draws accuracy by how many buffers are loaded, a line for each way, into the PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for column, (method, join, count) in columns.items():
        label = f"{'trained alone' if method == 'compiled' else 'trained beside others'}, {join}"
        lines.setdefault(label, []).append((count, numbers[f"together/{column}"]))
    for label, points in lines.items():
        axes.plot([count for count, _ in points], [right for _, right in points], marker="o", label=label)
    for column, style, label in (("full", "--", "the text in the prompt"), ("none", ":", "no context")):
        axes.axhline(numbers[f"right/{column}"], linestyle=style, color="gray", label=label)
    counts = sorted({count for _, _, count in columns.values()})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("buffers loaded")
    axes.set_ylabel("exact match")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    return path
