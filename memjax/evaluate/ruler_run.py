"""RULER with any subjects: the 13 tasks of `ruler.py` put to a base, the answer prefix kept, scored by string match."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memjax.errors import ConfigError
from memjax.evaluate import ruler
from memjax.evaluate.qa import Scores
from memjax.evaluate.subjects import PLAIN, Query, Subject, query_tokens
from memjax.models.base import Base

ESSAY_TASKS = tuple(task for task, spec in ruler.NIAH_TASKS.items() if spec.haystack == "essay")


def available_tasks(sources: ruler.Sources) -> tuple[str, ...]:
    """The tasks for which the sources have what they need."""
    missing = set() if sources.essay.strip() else set(ESSAY_TASKS)
    missing |= set() if sources.squad else {"qa_1"}
    missing |= set() if sources.hotpot else {"qa_2"}
    return tuple(task for task in ruler.TASKS if task not in missing)


def as_query(sample: ruler.Sample) -> Query:
    """A sample as a query: the base reads exactly its prompt as a user turn, and its answer goes on from the prefix."""
    return Query(sample.question, sample.context, gap=sample.gap, prefix=sample.prefix)


def template_tokens(base: Base) -> int:
    """Tokens that the base's chat template adds to a prompt."""
    return len(query_tokens(base, PLAIN, Query("?", gap=""))) - len(base.tokenizer.encode("?"))


def sample_length(base: Base, length: int) -> int:
    """The length to generate samples for, so that the template fits the window too; ConfigError where none is left."""
    room = base.config.max_positions - template_tokens(base)
    if length > base.config.max_positions or room < 1:
        raise ConfigError(
            f"--length {length}: the base reads at most {base.config.max_positions} tokens; name a smaller length"
        )
    return min(length, room)


def ruler_item_scores(
    subjects: Sequence[Subject],
    tasks: Sequence[str],
    length: int,
    count: int,
    count_tokens: Callable[[str], int],
    sources: ruler.Sources,
    seed: int,
) -> tuple[Scores, int]:
    """({key: score of each sample}, contexts cut) of `count` samples per task; keys `TASK/SUBJECT` and `mean/SUBJECT`.

    Scores are in 0 … 1 (the reference prints hundredths); `mean` holds one number per task: their plain mean. ConfigError
    for a task that is unknown or does not fit, DataError where a source is missing, before anything is answered.
    """
    made: Scores = {}
    truncated = 0
    every = {task: ruler.samples(task, length, count, count_tokens, sources, seed=ruler.SEED + seed) for task in tasks}
    for task, drawn in every.items():
        for subject in subjects:
            answers = subject.answers([as_query(sample) for sample in drawn], ruler.TASKS[task])
            truncated += answers.truncated
            scores = [ruler.score(task, text, s.answers) for text, s in zip(answers.texts, drawn, strict=True)]
            made[f"{task}/{subject.name}"] = scores
            made.setdefault(f"mean/{subject.name}", []).append(sum(scores) / len(scores))
    return made, truncated
