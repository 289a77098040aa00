"""The tasks that a buffer is compiled on: continuing its context, and general prompts that have nothing to do with it.

Each is a prompt and an answer with the teacher's most likely tokens: the base that has read the whole context (arXiv
2602.21221 section 3; the second kind by default without the context, whose presence already harms general answers).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from memjax.errors import InputError
from memjax.models.base import Base
from memjax.models.generate import Prefix, Sampling, bucket, generate_all, read_prefix
from memjax.write.distill import general_questions
from memjax.write.packing import Packed, read_hidden, top_k_logp
from memjax.write.reading import Split
from memjax.write.teacher import BLOCK, Array

if TYPE_CHECKING:
    from memjax.write.compile import CompileConfig

_FEW = 3  # windows below which there is nothing to hold out
_LEAST = 8  # tokens of the shortest window that is worth reading
_SEAM = 4  # tokens that a cue may take more than it has in its text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tasks:
    """n tasks of up to T tokens: prompts behind the context, with their answers.

    inputs int32 [n, T]: the prompt and all but the last answer token; offset int32 [n, T]: places counted from the first
    token behind the context, -1 for padding; target int32, logp float32 [n, T, k]: the teacher's most likely next tokens;
    weight float32 [n, T]: 1 where an answer token is predicted; recon bool [n]: it continues the context.
    """

    inputs: Array
    offset: Array
    target: Array
    logp: Array
    weight: Array
    recon: Array

    def take(self, index: np.ndarray) -> Tasks:
        """The tasks of these numbers, in their order."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def make_tasks(base: Base, split: Split, config: CompileConfig) -> tuple[Tasks, Tasks]:
    """(tasks to train on, tasks held out), answered by the base. InputError for a text that is too short or too long."""
    cues, windows = _windows(base, split, config)
    seen = [*split.header, *split.context]
    tails = [split.tail(question.text) for question in general_questions(split.style, config.general)]
    prefix = read_prefix(base.model, base.params, seen if config.query_teacher == "context" else split.header)
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
    with_context = prefix if config.query_teacher == "context" else read_prefix(base.model, base.params, seen)
    parts = [
        scored(base, cues, windows, with_context, config.top_k),
        scored(base, tails, ends, prefix, config.top_k),
    ]
    width = max(part.inputs.shape[1] for part in parts)
    tasks: Tasks = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(_widen(part, width) for part in parts))
    tasks = dataclasses.replace(tasks, recon=np.arange(len(tasks.inputs)) < len(windows))
    rng = np.random.default_rng(config.seed)
    out: list[int] = []
    for chosen in (np.flatnonzero(tasks.recon), np.flatnonzero(~np.asarray(tasks.recon))):
        out += [int(i) for i in rng.permutation(chosen)[: max(1, round(config.held_out * len(chosen)))]]
    trained = np.setdiff1d(np.arange(len(tasks.inputs)), out)
    return tasks.take(trained), tasks.take(np.array(sorted(out)))


def _windows(base: Base, split: Split, config: CompileConfig) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, answers) that continue the context after a cue, and the one that repeats it from its beginning.

    Windows are as long as the config says, or as the base's window leaves room for.
    """
    style, context = split.style, list(split.context)
    longest = len(split.tail(style.resume.format(cue=""))) + config.cue + _SEAM
    slots = math.ceil(len(context) / config.ratio) if config.layout == "in_place" else 0
    room = base.config.max_positions - len(split.header) - len(context) - slots - longest
    if room < _LEAST:
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


def scored(
    base: Base, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], prefix: Prefix, top_k: int
) -> Tasks:
    """Tasks with the teacher's most likely tokens, where the teacher has read `prefix` before the prompt."""
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
    return Tasks(inputs, offset, target, logp, weight, np.zeros(len(fed), bool))


def _widen(tasks: Tasks, width: int) -> Tasks:
    more = width - tasks.inputs.shape[1]
    pad = lambda leaf, value=0: np.pad(leaf, ((0, 0), (0, more), *[(0, 0)] * (leaf.ndim - 2)), constant_values=value)
    return Tasks(
        pad(tasks.inputs), pad(tasks.offset, -1), pad(tasks.target), pad(tasks.logp), pad(tasks.weight), tasks.recon
    )
