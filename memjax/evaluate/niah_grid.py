"""The needle experiment: exact match by depth decile and length bin, of any subjects (Doc-to-LoRA, arXiv 2602.15902)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from memjax.errors import ConfigError
from memjax.evaluate import niah
from memjax.evaluate.metrics import contains, exact_match, rouge_l
from memjax.evaluate.qa import Scores, first_line
from memjax.evaluate.ruler_evict import EvictRuler, Item, answers
from memjax.evaluate.subjects import Answers, Query, Subject
from memjax.models.base import Base

ANSWER_TOKENS = 16
TIMES = (4, 16, 64)  # lengths beyond the window that have a key of their own, in windows
ROOM = 64  # tokens of the window that question, template and answer may take
Bin = tuple[int, int]
Ask = Callable[[Sequence[Query]], Mapping[str, Answers]]


def window_bins(window: int) -> tuple[Bin, ...]:
    """The paper's test bins that fit a window; for a short window its training bins and the rest of it in two halves."""
    last = window - ROOM
    if last >= niah.TEST_BINS[0][1]:
        return tuple(b for b in niah.TEST_BINS if b[1] <= last)
    top = niah.TRAIN_BINS[-1][1]
    if last < top:
        raise ConfigError(f"a window of {window} tokens is too short for needles; name --bins such as 32-128")
    middle = (top + last) // 2
    return niah.TRAIN_BINS if last - top < 100 else (*niah.TRAIN_BINS, (top, middle), (middle, last))


def internalize_bins(window: int) -> tuple[Bin, ...]:
    """Bins for a subject that knows no window: those that fit it, then just below 4 and 16 times its length."""
    return (*window_bins(window), *((31 * times * window // 32, times * window) for times in TIMES[:2]))


def mark_of(tokens: Bin, window: int, prose: bool) -> str | None:
    """The key that a bin of internalised needles counts for: `niah_native` within the window, `niah_4x` and so on where it
    ends at so many windows, behind them `_prose` for a haystack that is given; None for other lengths."""
    times = next((times for times in TIMES if tokens[1] == times * window), None)
    if tokens[1] > window and times is None:
        return None
    return f"niah_{'native' if times is None else f'{times}x'}{'_prose' if prose else ''}"


def parse_bins(text: str) -> tuple[Bin, ...]:
    """Bins from "32-128,128-256"; ConfigError where it says something else."""
    made = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
            raise ConfigError(f"length bin {part.strip()!r}: write it as LOW-HIGH in tokens, for example 32-128,128-256")
        made.append((int(low), int(high)))
    return tuple(made)


def bin_name(tokens: Bin) -> str:
    """How a bin is written in keys and pictures."""
    return f"{tokens[0]}-{tokens[1]}"


def ask_subjects(subjects: Sequence[Subject]) -> Ask:
    """A function queries -> {name of a subject: its answers}."""
    return lambda queries: {subject.name: subject.answers(queries, ANSWER_TOKENS) for subject in subjects}


def ask_evicted(base: Base, config: EvictRuler, progress: Callable[[str, int, int], None]) -> Ask:
    """A function queries -> {full, "policy/share": its answers}: contexts are read once, then cut by every policy."""

    def ask(queries: Sequence[Query]) -> dict[str, Answers]:
        items = [Item(query, (), ANSWER_TOKENS) for query in queries]
        made = answers(base, items, config, lambda done: progress("needles", done, len(items)))
        return {name: Answers(texts) for name, texts in made.items()}

    return ask


def niah_item_scores(
    ask: Ask,
    count_tokens: Callable[[str], int],
    bins: Sequence[Bin],
    seed: int,
    per_bin: int = 50,
    filler: Sequence[str] | None = None,
    window: int = 0,
) -> tuple[Scores, int]:
    """({key: score of each needle}, contexts cut) for `per_bin` needles in every length bin, deciles taking turns.

    ask: queries -> {name: answers}, of all that is compared. Keys: `exact_match/NAME`, `contains/NAME` (the number stands
    in the answer's first line), `rouge_l/NAME` (the paper's metric; numbers have no stem) over all;
    `exact_match/NAME/BIN/decile_D` for each cell of the heat map; and `mark_of` each bin, of the subject `internalize`, by
    the base's window.
    """
    if per_bin < niah.DECILES:
        raise ConfigError(
            f"--limit {per_bin}: every length bin needs at least {niah.DECILES} needles, one per depth decile"
        )
    drawn: list[tuple[Bin, niah.Needle]] = []
    for tokens in bins:
        lines = niah.line_counts(count_tokens, *tokens, filler or (niah.GRASS,))
        for index in range(per_bin):
            drawn.append((tokens, niah.needle(lines, index, seed=niah.SEED + seed, filler=filler or (niah.GRASS,))))
    made: Scores = {}
    truncated = 0
    for name, told in ask([Query(n.question, n.context) for _, n in drawn]).items():
        truncated += told.truncated
        for text, (tokens, n) in zip(told.texts, drawn, strict=True):
            said = first_line(text)
            exact = exact_match(said, [n.answer])
            made.setdefault(f"exact_match/{name}", []).append(exact)
            made.setdefault(f"contains/{name}", []).append(contains(said, [n.answer]))
            made.setdefault(f"rouge_l/{name}", []).append(rouge_l(said, [n.answer]).f1)
            made.setdefault(cell_key(name, tokens, n.decile), []).append(exact)
            mark = mark_of(tokens, window, filler is not None) if name == "internalize" else None
            if mark:
                made.setdefault(mark, []).append(exact)
    return made, truncated


def cell_key(subject: str, tokens: Bin, decile: int) -> str:
    """The key of one cell of the heat map."""
    return f"exact_match/{subject}/{bin_name(tokens)}/decile_{decile}"


def cells(numbers: dict[str, float], subject: str, bins: Sequence[Bin]) -> np.ndarray:
    """Exact match [deciles, bins] of a subject from a result's numbers."""
    return np.asarray([[numbers[cell_key(subject, b, d)] for b in bins] for d in range(niah.DECILES)])
