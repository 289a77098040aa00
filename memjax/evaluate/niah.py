"""Needle in a haystack as in Doc-to-LoRA (arXiv 2602.15902, section 4.1): one number among lines of filler.

A document is `lines` lines joined by newlines, all the same filler but the needle. Its place is uniform inside a depth
decile, deciles take turns, and the number of lines is drawn so that the bare document falls into a length bin of the
reader's tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from memjax.errors import ConfigError, DataError
from memjax.evaluate.world.lines import GRASS, NEEDLE, NEEDLE_QUESTION
from memjax.evaluate.world.names import draw_number

SEED = 42
DECILES = 10
# Length bins in tokens, [low, high): training, and the test bins of the paper up to 128K.
TRAIN_BINS = ((32, 128), (128, 256))
TEST_BINS = (
    (32, 1024),
    *((low, low + 1024) for low in range(1024, 16 * 1024, 1024)),
    *((low, low + 4096) for low in range(16 * 1024, 32 * 1024, 4096)),
    *((low, low + 8192) for low in range(32 * 1024, 128 * 1024, 8192)),
)


@dataclass(frozen=True)
class Needle:
    """A document, its question and the four digits of the answer. `decile` 0 … 9 says where the needle was put."""

    context: str
    question: str
    answer: str
    decile: int
    lines: int
    position: int


def line_counts(count_tokens: Callable[[str], int], low: int, high: int, filler: Sequence[str] = (GRASS,)) -> range:
    """The numbers of lines whose document has low ≤ tokens < high; at least two lines (one of them the needle).

    Raises ConfigError if no number of lines falls into the bin.
    """

    def tokens(lines: int) -> int:
        return count_tokens(_document(lines, 0, "0000", filler, 0))

    def least(limit: int) -> int:
        """The smallest number of lines with at least `limit` tokens."""
        top = 2
        while tokens(top) < limit:
            top *= 2
        bottom = max(top // 2, 1)
        while top - bottom > 1:
            middle = (top + bottom) // 2
            bottom, top = (bottom, middle) if tokens(middle) >= limit else (middle, top)
        return top

    counts = range(least(low), least(high))
    if not counts:
        raise ConfigError(f"no document of whole lines has {low} to {high - 1} tokens; widen the bin")
    return counts


def needle(
    counts: Sequence[int],
    index: int,
    *,
    seed: int = SEED,
    filler: Sequence[str] = (GRASS,),
    split: str | None = None,
    decile: int | None = None,
) -> Needle:
    """Document number `index`: deciles and line counts take turns, so every ten documents fill the ten deciles equally.

    counts: possible numbers of lines, see `line_counts`; filler: the lines of the haystack in turn, from a random start
    (one line repeated is the paper's); split: draw the number from those of one split of the world instead of from all
    0000 … 9999.
    """
    rng = Random(f"niah/{seed}/{index}")
    if decile is None:
        decile = index % DECILES
    lines = counts[index // DECILES % len(counts)]
    first = lines * decile // DECILES
    position = rng.randint(first, max(first, lines * (decile + 1) // DECILES - 1))
    number = draw_number(rng, split, 4, zeros=True) if split else f"{rng.randrange(10_000):04d}"
    text = _document(lines, position, number, filler, rng.randrange(len(filler)))
    return Needle(text, NEEDLE_QUESTION, number, decile, lines, position)


def _document(lines: int, position: int, number: str, filler: Sequence[str], start: int) -> str:
    text = [filler[(start + i) % len(filler)] for i in range(lines - 1)]
    text.insert(position, NEEDLE.format(v=number))
    return "\n".join(text)


def prose_lines(text: str, tokens_per_line: int = 25) -> list[str]:
    """Lines of whole sentences of about `tokens_per_line` words, from any prose: a haystack that cannot be memorised.

    Raises DataError if the text has no sentence.
    """
    lines: list[str] = []
    current: list[str] = []
    for sentence in sentences(text):
        current.append(sentence)
        if sum(len(part.split()) for part in current) >= tokens_per_line * 3 // 4:
            lines.append(" ".join(current))
            current = []
    if current:
        lines.append(" ".join(current))
    if not lines:
        raise DataError("the haystack text is empty; give a file of prose")
    return lines


def sentences(text: str) -> list[str]:
    """The sentences of a text, split after . ! or ? and white space; single spaces inside."""
    return [part for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if part]
