"""The tasks that a buffer is compiled on: continuing its context, general prompts, and questions about the context.

Each is a prompt and an answer with the teacher's most likely tokens: the base that has read the whole context (arXiv
2602.21221 section 3). General prompts, which have nothing to do with it, are by default answered without the context,
whose presence already harms them. Questions that the base asks itself are not the paper's (Cartridges, arXiv 2506.06266,
train on such): a small base continues a text and answers from it in different ways, and reads slots so that have met both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from memjax.errors import InputError
from memjax.kernels.segment_attention import Segment
from memjax.models.base import Base
from memjax.models.buffers import buffer_prefix
from memjax.models.generate import Prefix, Sampling, bucket, generate_all, read_prefix, read_prompts
from memjax.write.compile_config import CompileConfig
from memjax.write.distill import general_questions
from memjax.write.packing import Packed, log_norms, read_hidden, top_k_logp
from memjax.write.questions import Question
from memjax.write.reading import Split
from memjax.write.teacher import BLOCK, Array, TeachConfig, answer_all, blend

_FEW = 3  # windows below which there is nothing to hold out
LEAST_WINDOW = 8  # tokens of the shortest window that is worth reading
_SEAM = 4  # tokens that a cue may take more than it has in its text
_HELD_TASKS = 24  # of a kind held out at most
KINDS = ("recon", "query", "asked")  # continuing the context; general prompts; questions about the context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tasks:
    """n tasks of up to T tokens: prompts behind the context, with their answers.

    inputs int32 [n, T]: the prompt and all but the last answer token; offset int32 [n, T]: places counted from the first
    token behind the context, -1 for padding; target int32, logp float32 [n, T, k]: the teacher's most likely next tokens;
    weight float32 [n, T]: 1 where an answer token is predicted. norm float32 [n, T]:
    the teacher's log-sum-exp, where logits are to be compared and not their probabilities.
    """

    inputs: Array
    offset: Array
    target: Array
    logp: Array
    weight: Array
    norm: Array | None = None

    def take(self, index: np.ndarray) -> Tasks:
        """The tasks of these numbers, in their order."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def make_tasks(
    base: Base,
    split: Split,
    config: CompileConfig,
    questions: Sequence[Question] = (),
    general: Tasks | None = None,
    before: Prefix | None = None,
) -> tuple[dict[str, Tasks], dict[str, Tasks]]:
    """({kind: tasks to train on}, {kind: tasks held out}), answered by the base; kinds as in `KINDS`.

    questions: about the context, from `write.distill.make_questions`; none, no tasks of that kind. general: what
    `general_tasks` gave for this base, style and config, for callers that compile several texts. before: what the base
    has read before the context, in the header's place. InputError for a text that is too short or too long.
    """
    cues, windows = _windows(base, split, config, before)
    seen = read_context(base, split, before)
    if config.query_teacher == "context":
        general = _general(base, split, config, seen)
    elif general is None:
        general = general_tasks(base, split, config)
    made = {"recon": _scored(base, cues, windows, seen, config), "query": general}
    if questions:
        made["asked"] = _asked(base, split, config, questions, seen)
    rng = np.random.default_rng(config.seed)
    trained, held = {}, {}
    for kind, tasks in made.items():
        count = len(tasks.inputs)
        out = np.sort(rng.permutation(count)[: min(_HELD_TASKS, max(1, round(config.held_out * count)))])
        trained[kind] = tasks.take(np.setdiff1d(np.arange(count), out))
        held[kind] = dataclasses.replace(tasks.take(out), norm=None)
    return trained, held


def read_context(base: Base, split: Split, before: Prefix | None = None) -> Prefix:
    """The base's cache up to the end of the context, behind the header or what stands in its place."""
    if before is None:
        return read_prefix(base.model, base.params, [*split.header, *split.context])
    own = read_own(base, split, before)
    return buffer_prefix(before.segment, own, int(before.length) + len(split.context))


def read_own(base: Base, split: Split, before: Prefix) -> Segment:
    """The base's cache of the context alone, read behind `before`."""
    _, cache, _ = read_prompts(base.model, base.params, [split.context], 0, before)
    return Segment(cache.k, cache.v, cache.position)


def general_tasks(base: Base, split: Split, config: CompileConfig) -> Tasks:
    """General prompts with what the base answers that has read no context: the same for every text of a base and style."""
    return _general(base, split, config, read_prefix(base.model, base.params, split.header))


def _general(base: Base, split: Split, config: CompileConfig, prefix: Prefix) -> Tasks:
    tails = [split.tail(question.text) for question in general_questions(split.style, config.general)]
    answers = generate_all(
        base.model,
        base.params,
        tails,
        base.tokenizer.eos_ids,
        Sampling(max_tokens=config.answer_tokens),
        prefix=prefix,
        rows=BLOCK,
    )
    stop = list(base.tokenizer.eos_ids[:1])
    ends = [a if len(a) == config.answer_tokens else [*a, *stop] for a in answers]
    return _scored(base, tails, ends, prefix, config)


def _asked(base: Base, split: Split, config: CompileConfig, questions: Sequence[Question], prefix: Prefix) -> Tasks:
    """Questions with the answers that they bring along, or that the base gives which has read the context."""
    knobs = TeachConfig(
        answer_tokens=config.answer_tokens,
        top_k=config.top_k,
        trust=config.trust,
        alike=config.alike,
        reworded=config.reworded,
        seed=config.seed,
    )
    tails = [split.tail(question.text) for question in questions]
    text = base.tokenizer.decode(split.context)
    questions, tails, answers = answer_all(base, text, questions, tails, split.tail, prefix, split.style, knobs)
    tasks = _scored(base, [tails[i] for i in answers], list(answers.values()), prefix, config)
    for row, i in enumerate(answers):
        if questions[i].answer is not None and config.trust:
            at = np.flatnonzero(tasks.weight[row])
            target, logp = (np.asarray(x)[row, at] for x in (tasks.target, tasks.logp))
            tasks.target[row, at], tasks.logp[row, at] = blend(target, logp, answers[i], config.trust)
    return tasks


def longest_cue(split: Split, config: CompileConfig) -> int:
    """Tokens of the longest prompt that asks to continue the context after a cue."""
    return len(split.tail(split.style.resume.format(cue=""))) + config.cue + _SEAM


def window_room(base: Base, split: Split, config: CompileConfig, before: Prefix | None = None) -> int:
    """Tokens of the base's window that are left behind context, slots and cue for what continues the context."""
    slots = math.ceil(len(split.context) / config.ratio) if config.layout == "in_place" else 0
    start = len(split.header) if before is None else int(before.length)
    return base.config.max_positions - start - len(split.context) - slots - longest_cue(split, config)


def _windows(
    base: Base, split: Split, config: CompileConfig, before: Prefix | None
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, answers) that continue the context after a cue, and the one that repeats it from its beginning.

    Windows are as long as the config says, or as the base's window leaves room for.
    """
    style, context = split.style, list(split.context)
    longest, room = longest_cue(split, config), window_room(base, split, config, before)
    if room < LEAST_WINDOW:
        raise InputError(
            f"the text has {len(context)} tokens and the base reads {base.config.max_positions} at once, which "
            "leaves too few to learn from; compile a shorter text"
        )
    size = min(config.window, room)
    starts = list(range(config.cue, len(context) - size // 2, max(1, size // 4)))
    if len(starts) < _FEW:
        raise InputError(f"the text has {len(context)} tokens, too few to compile; distill it, or give a longer one")
    prompts, answers = [split.tail(style.repeat)], [context[:size]]
    for begin in starts:
        cue = base.tokenizer.decode(context[begin - config.cue : begin]).strip()
        prompts.append(split.tail(style.resume.format(cue=cue))[-longest:])
        answers.append(context[begin : begin + size])
    return prompts, answers


def _scored(
    base: Base,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    prefix: Prefix,
    config: CompileConfig,
) -> Tasks:
    return scored(base, prompts, answers, prefix, config.classes, config.loss == "mse")


def scored(
    base: Base,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    prefix: Prefix,
    top_k: int,
    logits: bool = False,
) -> Tasks:
    """Tasks with the teacher's `top_k` (0: all) likeliest tokens, where the teacher has read `prefix` before the prompt;
    logits: with the `norm` of their log-probabilities."""
    fed = [[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)]
    packed = Packed.of(fed)
    hidden = read_hidden(base.model, base.params, packed, prefix)
    shape = (len(fed), bucket(max(map(len, fed))))
    inputs, offset = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    weight, states = np.zeros(shape, np.float32), np.zeros((*shape, hidden.shape[-1]), hidden.dtype)
    for i, (prompt, tokens) in enumerate(zip(prompts, fed, strict=True)):
        inputs[i, : len(tokens)], offset[i, : len(tokens)] = tokens, np.arange(len(tokens))
        weight[i, len(prompt) - 1 : len(tokens)] = 1
        states[i, : len(tokens)] = packed.take(hidden, i)
    target, logp = top_k_logp(base.model, base.params, states, top_k or base.config.vocab_size)
    norm = log_norms(base.model, base.params, states) if logits else None
    return Tasks(inputs, offset, target, logp, weight, norm)
