"""The teacher: the base with the text in its prompt. It scores answers and leaves top-k log-probabilities behind."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.cache import Cache
from memjax.models.base import Base
from memjax.models.decoder import Model, Params, empty_cache, forward
from memjax.models.generate import Prefix, Sampling, bucket, common_prefix, generate_all, read_prefix
from memjax.sharding import fetch
from memjax.write.packing import Packed, read_hidden, read_keys, top_k_logp, top_logp
from memjax.write.prompts import UNLIKE, PromptStyle, answer_text, ask_tokens, read_tokens
from memjax.write.questions import Question, at_most, plain_words, reword, split_sentences

Array = jax.Array | np.ndarray
BLOCK = 32  # answers that are made or read at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the student is trained on: n answers of up to T tokens, each over the base's own cache of its prompt.

    header: the tokens that all prompts begin with, read once; k, v [L, n, P, K, H] and place int32 [n, P]: the rest of
    each prompt but its last `marker` tokens; inputs, positions int32 [n, T]: those last tokens, then the answer;
    (or, once `entered`, their hidden states [n, T, D] behind the layers that no adapter changes, and L counts the others);
    target [n, T, k] int32 and logp [n, T, k] float32: the teacher's most likely next tokens; weight [n, T]: 1 where an
    answer token is predicted, end-of-answer included.
    """

    header: Segment
    k: Array
    v: Array
    place: Array
    inputs: Array
    positions: Array
    target: Array
    logp: Array
    weight: Array


@dataclasses.dataclass(frozen=True)
class TeachConfig:
    """marker: prompt tokens read with the adapter on; answer_tokens, top_k: T and k of a lesson; trust: see `teach`;
    alike: how many questions of a kind may have the teacher's same answer, 0 for any number; reworded: how many times
    those that it answers are asked in other words, drawn by `seed`.
    """

    marker: int = 1
    answer_tokens: int = 8
    top_k: int = 32
    trust: float = 0.0
    alike: int = 0
    reworded: int = 0
    seed: int = 0


def teach(
    base: Base,
    text: str,
    questions: Sequence[Question],
    style: PromptStyle,
    config: TeachConfig,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Lesson, list[Question]]:
    """(lesson, the questions in it with their answers) from the base reading `text`.

    The text is encoded once, and every prompt once with and once without it (arXiv 2605.28889 section 3.2, the two
    caches). A question with a given answer is scored on it, and `trust` of the target's probability is put on the given
    tokens: they are the text's own words, and a small teacher misreads. A question without one is answered by the
    teacher, and left out where that answer does not agree with its `span`. These are then asked in other words as well,
    and kept where the answer is the same: a memory that was asked in few forms knows few.
    """
    reads = [read_tokens(base.tokenizer, style, text, q.text) for q in questions]
    shared = min(common_prefix(reads), min(len(r) for r in reads) - config.marker)
    prefix = read_prefix(base.model, base.params, reads[0][:shared])

    def tail_of(question: str) -> list[int] | None:
        """Its prompt behind the prefix. Few questions may begin with the same word, which is then read with the text."""
        read = read_tokens(base.tokenizer, style, text, question)
        fits = len(read) >= shared + config.marker and read[:shared] == reads[0][:shared]
        return read[shared:] if fits else None

    tails = [read[shared:] for read in reads]
    questions, tails, answers = answer_all(base, text, questions, tails, tail_of, prefix, style, config)
    asks = [ask_tokens(base.tokenizer, style, q.text) for q in questions]
    kept = list(answers)
    progress(0.2)
    scored = _score(base, [tails[i] for i in kept], [answers[i] for i in kept], prefix, config)
    for row, i in enumerate(kept):
        if questions[i].answer is not None and config.trust:
            at = slice(config.marker - 1, config.marker - 1 + len(answers[i]))
            found = blend(scored["target"][row, at], scored["logp"][row, at], answers[i], config.trust)
            scored["target"][row, at], scored["logp"][row, at] = found
    progress(0.6)
    header, k, v, place, starts = _read_asks(base, [asks[i] for i in kept], header_length(base, style), config.marker)
    offset = scored.pop("offset")
    positions = np.where(offset >= 0, offset + starts[:, None], -1).astype(np.int32)
    progress(1.0)
    answered = [dataclasses.replace(questions[i], answer=said_text(base, answers[i])) for i in kept]
    return Lesson(header, k, v, place, positions=positions, **scored), answered


def echo(base: Base, questions: Sequence[Question], style: PromptStyle, config: TeachConfig) -> Lesson:
    """General replay: how the base's own greedy answers begin, `answer_tokens` of them, without any text.

    Reader and teacher see the same prompt here, so it is read once, and decoding gives the teacher's distributions too.
    A prompt that the base answers with nothing is left out; InputError where none is left.
    """
    asks = [ask_tokens(base.tokenizer, style, q.text) for q in questions]
    header, k, v, place, starts = _read_asks(base, asks, header_length(base, style), config.marker)
    ends = np.array([a[-config.marker :] for a in asks], np.int32)
    found = []
    for part, short in _blocks(len(asks)):
        fed, at = np.pad(ends[part], ((0, short), (0, 0))), np.pad(starts[part], (0, short))
        prompt = _prompts(k[:, part], v[:, part], place[part], short)
        found.append([x[: len(fed) - short] for x in _go_on(base, fed, at, header, prompt, config)])
    inputs, target, logp = (np.concatenate(one) for one in zip(*found, strict=True))
    first = config.marker - 1
    stopped = np.isin(target[:, first:, 0], list(base.tokenizer.eos_ids))
    said: np.ndarray = np.cumsum(stopped, axis=1) - stopped == 0  # up to the end-of-answer token, which counts
    kept = np.flatnonzero(~stopped[:, 0])
    if not len(kept):
        raise InputError("the base answers none of the general prompts; use another base, or no replay (general=0)")
    weight = np.pad(said, ((0, 0), (first, 0))).astype(np.float32)
    used: np.ndarray = np.pad(said, ((0, 0), (first, 0)), constant_values=True)
    positions = np.where(used, starts[:, None] + np.arange(inputs.shape[1]), -1).astype(np.int32)
    flat = (x[kept] for x in (place, inputs, positions, target, logp, weight))
    return Lesson(header, k[:, kept], v[:, kept], *flat)


def _go_on(
    base: Base, ids: np.ndarray, starts: np.ndarray, header: Segment, prompt: Segment, config: TeachConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs [B, T], target, logp [B, T, k]) of greedy tokens after ids [B, marker]; T as in `Lesson`."""
    rows, marker = ids.shape
    cache = empty_cache(base.config, rows, marker - 1 + config.answer_tokens, base.params["embed"])
    tokens, at = jnp.asarray(ids), jnp.asarray(starts)[:, None] + jnp.arange(marker)
    made = []
    # One call per token: within one program, a scan over tokens around that over layers is three times slower on CPU.
    for _ in range(config.answer_tokens):
        cache, best, values = _next(base.model, base.params, tokens, at, cache, header, prompt, top_k=config.top_k)
        made.append((tokens, best, values))
        tokens, at = best[:, -1:, 0], at[:, -1:] + 1
    inputs, target, logp = (np.concatenate(fetch(one), axis=1) for one in zip(*made, strict=True))
    return inputs, target, logp


@functools.partial(jax.jit, static_argnums=0, static_argnames=("top_k",), donate_argnums=4)
def _next(
    model: Model,
    params: Params,
    tokens: jax.Array,
    at: jax.Array,
    cache: Cache,
    header: Segment,
    prompt: Segment,
    *,
    top_k: int,
) -> tuple[Cache, jax.Array, jax.Array]:
    out = forward(model, params, tokens, at, cache, segments=(header, prompt))
    assert out.cache is not None
    return out.cache, *top_logp(model, params, out.hidden, top_k=top_k)


def entered(base: Base, lesson: Lesson, begin: int) -> Lesson:
    """The lesson behind the first `begin` layers: a student that leaves them as they are reads them once, not per step."""
    if not begin:
        return lesson
    hidden = []
    for part, short in _blocks(len(lesson.inputs)):
        ids = np.pad(lesson.inputs[part], ((0, short), (0, 0)))
        positions = np.pad(lesson.positions[part], ((0, short), (0, 0)), constant_values=-1)
        prompt = _prompts(lesson.k[:begin, part], lesson.v[:begin, part], lesson.place[part], short)
        states = _enter(base.model, base.params, ids, positions, lesson.header, prompt, begin=begin)
        hidden.append(fetch(states)[: len(ids) - short])
    header = dataclasses.replace(lesson.header, k=lesson.header.k[begin:], v=lesson.header.v[begin:])
    inputs = np.concatenate(hidden)
    return dataclasses.replace(lesson, header=header, k=lesson.k[begin:], v=lesson.v[begin:], inputs=inputs)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("begin",))
def _enter(
    model: Model, params: Params, ids: jax.Array, positions: jax.Array, header: Segment, prompt: Segment, *, begin: int
) -> jax.Array:
    return forward(model, params, ids, positions, segments=(header, prompt), layers=begin).hidden


def _blocks(count: int) -> Iterator[tuple[slice, int]]:
    """(slice, rows missing at its end) of blocks of equal height, so that one program reads them all."""
    rows = min(BLOCK, bucket(count))
    for at in range(0, count, rows):
        yield slice(at, at + rows), max(0, at + rows - count)


def _prompts(k: Array, v: Array, place: Array, short: int) -> Segment:
    """Cached prompts as a segment, with `short` empty rows more."""
    k, v = (np.pad(x, ((0, 0), (0, short), (0, 0), (0, 0), (0, 0))) for x in (k, v))
    place = np.pad(place, ((0, short), (0, 0)), constant_values=-1)
    return Segment(jnp.asarray(k), jnp.asarray(v), jnp.asarray(place))


def in_other_words(
    base: Base,
    text: str,
    questions: Sequence[Question],
    answers: Mapping[int, Sequence[int]],
    style: PromptStyle,
    config: TeachConfig,
) -> list[Question]:
    """`config.reworded` questions that the teacher answered, in words of all of them and of the text, to be answered alike.

    In turns all that the base or a rule for English asked; those where the teacher abstained are not among them: of a
    question that it does not understand, it says the same.
    """
    rng = random.Random(config.seed)
    said = {i: said_text(base, tokens) for i, tokens in answers.items()}
    own = [i for i in answers if questions[i].kind in ("asked", "turned") and said[i] and said[i] != style.abstain]
    words = plain_words([*(questions[i].text for i in own), *split_sentences(text)])
    if not own or not words:
        return []
    rng.shuffle(own)
    made: dict[str, Question] = {}
    for i in itertools.islice(itertools.cycle(own), config.reworded):
        other = reword(questions[i].text, words, rng)
        made.setdefault(other.lower(), Question(other, "reworded", span=said[i]))
    known = {question.text.lower() for question in questions}
    return [question for text, question in made.items() if text not in known]


def answer_all(
    base: Base,
    text: str,
    questions: Sequence[Question],
    tails: list[list[int]],
    tail_of: Callable[[str], list[int] | None],
    prefix: Prefix,
    style: PromptStyle,
    config: TeachConfig,
) -> tuple[list[Question], list[list[int]], dict[int, list[int]]]:
    """(questions, their prompts behind `prefix`, {number of a question: its answer tokens}) with some in other words too.

    text: what they are about; tails: the prompts of the questions; tail_of: that of another one, None where it cannot be
    asked behind `prefix`. As `answer_questions` otherwise.
    """
    answers = answer_questions(base, questions, tails, prefix, style, config)
    reworded = in_other_words(base, text, questions, answers, style, config) if config.reworded else []
    asked = [(question, tail) for question in reworded if (tail := tail_of(question.text)) is not None]
    again, more = [question for question, _ in asked], [tail for _, tail in asked]
    same = _answered(base, again, more, prefix, style, config) if again else {}
    answers |= {len(questions) + i: answer for i, answer in same.items()}
    return [*questions, *again], [*tails, *more], answers


def answer_questions(
    base: Base,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    prefix: Prefix,
    style: PromptStyle,
    config: TeachConfig,
) -> dict[int, list[int]]:
    """{number of a question: its answer tokens}, end-of-answer included where the answer ends.

    Left out is what the teacher, the base that has read `prefix` before each prompt, misread or gave for an answer more
    than `alike` times to questions of one kind. InputError where nothing is left.
    """
    answers = _answered(base, questions, prompts, prefix, style, config)
    if not answers:
        raise InputError("the base could answer none of its own questions about this text; give it a text in sentences")
    return answers


def said_text(base: Base, answer: Sequence[int]) -> str:
    """An answer's tokens as text, without its end."""
    return base.tokenizer.decode([token for token in answer if token not in base.tokenizer.eos_ids]).strip()


def _answered(
    base: Base,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    prefix: Prefix,
    style: PromptStyle,
    config: TeachConfig,
) -> dict[int, list[int]]:
    """`answer_questions`, which may be none."""
    stop = list(base.tokenizer.eos_ids[:1])
    answers: list[list[int]] = []
    for question in questions:
        ends = [] if question.kind == "continue" else stop
        given = question.answer
        tokens = [] if given is None else base.tokenizer.encode(answer_text(base.tokenizer, style, given))
        answers.append([*tokens, *ends][: config.answer_tokens] if tokens else [])
    open_ = [i for i, q in enumerate(questions) if q.answer is None]
    sampling = Sampling(max_tokens=config.answer_tokens)
    asked = [prompts[i] for i in open_]
    drafts = generate_all(base.model, base.params, asked, base.tokenizer.eos_ids, sampling, prefix=prefix, rows=BLOCK)
    for i, draft in zip(open_, drafts, strict=True):
        span = questions[i].span
        if draft and (span is None or agrees(base.tokenizer.decode(draft), span)):
            answers[i] = [*draft, *stop][: config.answer_tokens]
    kept = [i for i, answer in enumerate(answers) if answer]
    if config.alike:  # what the teacher says to many questions; a given answer is the text's own, and stays
        kept = at_most(kept, config.alike, lambda i: (questions[i].kind, *answers[i]) if questions[i].answer is None else i)
    return {i: answers[i] for i in kept}


def _score(
    base: Base, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], prefix: Prefix, config: TeachConfig
) -> dict[str, np.ndarray]:
    """{inputs, offset, weight, target, logp} of the answers after their prompts, which continue `prefix`."""
    marker, length = config.marker, config.marker - 1 + config.answer_tokens
    packed = Packed.of([[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)])
    hidden = read_hidden(base.model, base.params, packed, prefix)
    shape = (len(prompts), length)
    inputs, offset = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    weight = np.zeros(shape, np.float32)
    states = np.zeros((*shape, hidden.shape[-1]), hidden.dtype)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        fed = [*prompt[-marker:], *answer[:-1]]
        inputs[i, : len(fed)] = fed
        offset[i, : len(fed)] = np.arange(len(fed))
        weight[i, marker - 1 : len(fed)] = 1
        states[i, : len(fed)] = packed.take(hidden, i)[len(prompt) - marker :]
    target, logp = top_k_logp(base.model, base.params, states, config.top_k)
    return {"inputs": inputs, "offset": offset, "weight": weight, "target": target, "logp": logp}


def _read_asks(
    base: Base, asks: Sequence[Sequence[int]], shared: int, marker: int
) -> tuple[Segment, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(header, k, v [L, n, P, K, H], place [n, P], position of each prompt's first marker token): the student's caches."""
    header = read_prefix(base.model, base.params, asks[0][:shared])
    bodies = [a[shared : len(a) - marker] for a in asks]
    packed = Packed.of(bodies)
    # One width for all, so that lessons of one base share the compiled step whatever their questions.
    width = max(32, bucket(max(len(b) for b in bodies)))
    k, v = read_keys(base.model, base.params, packed, header, width)
    place = np.full((len(bodies), width), -1, np.int32)
    for i, body in enumerate(bodies):
        place[i, : len(body)] = shared + np.arange(len(body))
    starts = np.array([len(a) - marker for a in asks], np.int32)
    return header.segment, k, v, place, starts


def blend(target: np.ndarray, logp: np.ndarray, tokens: Sequence[int], trust: float) -> tuple[np.ndarray, np.ndarray]:
    """(target, logp [T, k]) of (1 - trust) x the teacher's distribution + trust x the given tokens [T].

    A token that the teacher's top k lacks takes the place of the least likely one.
    """
    given = np.asarray(tokens)[:, None]
    missing = ~(target == given).any(axis=1)
    target, p = target.copy(), np.exp(logp)
    target[missing, -1] = given[missing, 0]
    p[missing, -1] = 0.0
    p = (1 - trust) * p + trust * (target == given)
    return target, np.log(np.maximum(p, 1e-9)).astype(np.float32)


def header_length(base: Base, style: PromptStyle) -> int:
    """How many tokens every reader prompt of this style begins with, whatever is asked."""
    return common_prefix([ask_tokens(base.tokenizer, style, text) for text in UNLIKE])


def agrees(answer: str, span: str) -> bool:
    """Whether the teacher's answer holds the span that the question was made for, or lies within it."""
    left, right = _plain(answer), _plain(span)
    return bool(left) and (f" {right} " in f" {left} " or f" {left} " in f" {right} ")


def _plain(text: str) -> str:
    return " ".join("".join(c.lower() if c.isalnum() else " " for c in text).split())
