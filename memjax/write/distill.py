"""Context distillation with a shared base cache: a text becomes a low-rank adapter (arXiv 2605.28889, section 3)."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import ConfigError, InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import SITES, Adapter, as_slots, init_adapter
from memjax.memory.buffer import Buffer
from memjax.models.base import Base
from memjax.models.config import ModelConfig
from memjax.models.decoder import Model, Params, forward, site_shapes, unembed, upper_layers
from memjax.train.fit import FitConfig, fit
from memjax.train.optimizer import OptimizerConfig
from memjax.write.pack_answers import Batch, Packer
from memjax.write.prompts import PromptStyle, general_prompts
from memjax.write.questions import (
    Question,
    asked_questions,
    at_most,
    cloze_questions,
    continuations,
    invited_questions,
    split_sentences,
    turned_questions,
)
from memjax.write.teacher import Lesson, TeachConfig, echo, entered, teach

_NOTHING = "this text has no sentence to learn from; give it a text in sentences"


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The recipe of one distillation. What it was chosen by is in configs/distill.md.

    `asked`, `turned`, `cloze` and `continued` bound the questions of each kind (`asked`: what the base is told to
    write, a third of which is sound); `strangers`: of what else it writes, how many are tried that name what the text
    does not, and kept where the teacher abstains, for styles that know how to; `reworded`: how many times those asked and
    turned are asked in other words as well. No answer is asked for more than `repeats` times in one form, nor found
    by the teacher for more than `alike` questions of a kind (0: any number). Every step has room for `rows` rows of
    `row_tokens` answer tokens: `keep_batch` replay answers come first, then as many about the text, of up to
    `answer_tokens` tokens each, as still fit. Of the answers to the `general` replay prompts only the first
    `keep_tokens` tokens are kept: a leak begins there, and many short answers hold more than few long ones. `keep` is
    the weight of replay in the loss. `marker` prompt tokens are read with the adapter on, the rest by the base alone.
    The lowest layers, a share `frozen` of all, have no adapter: what they make of the answers is read once and not per
    step.
    """

    rank: int = 16
    alpha: float = 32.0
    sites: tuple[str, ...] = SITES
    frozen: float = 0.3
    marker: int = 1
    answer_tokens: int = 8
    top_k: int = 32
    trust: float = 0.7
    asked: int = 24
    strangers: int = 0
    reworded: int = 0
    turned: int = 48
    cloze: int = 8
    continued: int = 12
    held_out: float = 0.1
    repeats: int = 3
    alike: int = 0
    steps: int = 46
    rows: int = 8
    row_tokens: int = 12
    general: int = 240
    keep: float = 0.55
    keep_batch: int = 14
    keep_tokens: int = 4
    learning_rate: float = 3e-3
    warmup: int = 4
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.frozen < 1.0:
            raise ConfigError(f"frozen is {self.frozen}; give the share of layers without adapter, from 0 to below 1")
        longest = self.marker - 1 + max(self.answer_tokens, self.keep_tokens)
        kept = self.keep_batch if self.keep and self.general else 0
        held = self.row_tokens // (self.marker - 1 + self.keep_tokens)
        if longest > self.row_tokens or -(-kept // max(held, 1)) >= self.rows:
            raise ConfigError(
                f"{self.rows} rows of {self.row_tokens} tokens have no room for {kept} replay answers and one of {longest} "
                "tokens about the text; raise rows or row_tokens"
            )


def recipe(effort: str = "default", style: str = "chat") -> DistillConfig:
    """The recipe of an effort, `fast`, `default` or `thorough`, for a prompt style (measured in configs/distill.md).

    A base of the plain style asks questions itself, and answers those that rules for English make.
    """
    if style == "plain":
        asked, reworded, steps = {"fast": (400, 400, 80), "thorough": (1600, 3200, 900)}.get(effort, (800, 1600, 450))
        own = DistillConfig(asked=asked, reworded=reworded, alike=60, cloze=0, continued=0, trust=0.0, steps=steps)
        return dataclasses.replace(own, strangers=60, rows=16, general=160, frozen=0.0, learning_rate=8e-3)
    if effort == "fast":
        return DistillConfig(steps=24, asked=0, turned=28, continued=8)
    if effort == "thorough":
        return DistillConfig(steps=140, asked=64, turned=96, cloze=32, continued=48)
    return DistillConfig()


@dataclasses.dataclass(frozen=True)
class Written:
    """What a writer hands to the bank: the memory, the held-out questions (never trained on), and how it went."""

    artefact: Adapter | Buffer
    held_out: tuple[Question, ...]
    metrics: dict[str, float]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Student:
    """What the loss reads beside the batch, and is not trained: the frozen base (the layers with an adapter), the scale of
    the adapter, the share of replay in the loss. A pytree, so that one compiled step serves every document of a base.
    """

    params: Params
    scale: jax.Array
    keep: jax.Array
    model: Model = dataclasses.field(metadata={"static": True})
    remat: bool = dataclasses.field(metadata={"static": True})


def distill_loss(
    student: Student, trained: dict[str, Any], batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(1 - keep) x the KL of answers about the text + keep x that of general replay, float32; each alone as a metric.

    Forward KL(teacher || student), the mean over answer tokens in nats. The student reads the last `marker` prompt tokens
    and the answer with the adapter on, over the base's own cache of the prompt, which is not differentiated (arXiv
    2605.28889 sections 3.1 and 3.3). The teacher's tail beyond its top k is one class of its own, so the value is a lower
    bound of the full KL and zero only where the two agree. Without replay in the batch its share goes to the text.
    """
    arrays: Any = jax.tree.map(jnp.asarray, batch)  # a Batch of JAX's, where the packer filled one of NumPy's
    own = arrays.owner[:, :, None] == arrays.holder[:, None, :]
    out = forward(
        student.model,
        student.params,
        arrays.inputs,
        arrays.positions,
        visible=arrays.owner,
        segments=[arrays.header, Segment(arrays.k, arrays.v, arrays.place, own)],
        slots=as_slots(Adapter(trained["a"], trained["b"], student.scale)),
        remat=student.remat,
    )
    logits = unembed(student.model, student.params, out.hidden)
    logq = jnp.take_along_axis(logits, arrays.target, axis=-1)
    logq = logq - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    kl = divergence(arrays.logp, logq)
    read, kept = (jnp.where(chosen, arrays.weight, 0.0) for chosen in (arrays.read, ~arrays.read))
    kl_read, kl_keep = ((kl * weight).sum() / jnp.maximum(weight.sum(), 1.0) for weight in (read, kept))
    keep = jnp.where(kept.sum() > 0, student.keep, 0.0)
    return (1 - keep) * kl_read + keep * kl_keep, {"kl_read": kl_read, "kl_keep": kl_keep}


def divergence(logp: jax.Array, logq: jax.Array) -> jax.Array:
    """KL(p || q) [...] in nats over k classes and one for the rest, from log-probabilities [..., k], float32."""
    p, q = jnp.exp(logp), jnp.exp(logq)
    p_rest, q_rest = (jnp.clip(1 - x.sum(axis=-1), 1e-6, 1.0) for x in (p, q))
    return (p * (logp - logq)).sum(axis=-1) + p_rest * (jnp.log(p_rest) - jnp.log(q_rest))


def make_questions(base: Base, text: str, style: PromptStyle, config: DistillConfig) -> list[Question]:
    """The training questions of a text, of all kinds that the config asks for.

    Those about a span bring it along as their answer, unless no trust is put in the text's own words: then the teacher is
    to answer them too, in agreement with the span. Continuations always bring theirs.
    """
    rng = np.random.default_rng(config.seed)
    asked: list[Question] = []
    if config.asked and style.invite:
        asked = invited_questions(base, text, style, config.asked, config.strangers, config.seed)
    elif config.asked:
        asked = asked_questions(base, text, config.asked, config.seed)

    def some(questions: Sequence[Question], limit: int) -> list[Question]:
        if len(questions) <= limit:
            return list(questions)
        return [questions[i] for i in sorted(rng.permutation(len(questions))[:limit])]

    answer = lambda question: question.answer or question.text
    made = [
        *asked,
        *some(at_most(turned_questions(text), config.repeats, answer), config.turned),
        *some(at_most(cloze_questions(text), config.repeats, answer), config.cloze),
    ]
    if not config.trust:
        made = [dataclasses.replace(question, answer=None) for question in made]
    return [*made, *some(continuations(text), config.continued)]


def probe_questions(base: Base, text: str, style: PromptStyle, count: int, seed: int = 0) -> list[Question]:
    """Questions about the text by the cheapest way that the style has, for gates; other writers train on none of them."""
    asked, turned = (count, 0) if style.invite else (0, count)
    wanted = DistillConfig(asked=asked, turned=turned, cloze=0, continued=0, seed=seed)
    return make_questions(base, text, style, wanted) if count else []


def general_questions(style: PromptStyle, count: int, *, calibration: bool = False) -> list[Question]:
    """`count` general prompts of a style: every third is for calibrating gates, the others for replay; they never swap."""
    prompts = [p for i, p in enumerate(general_prompts(style)) if (i % 3 == 0) == calibration]
    step = max(1, len(prompts) // max(count, 1))
    return [Question(p, "general") for p in prompts[::step][:count]]


def batches(lesson: Lesson, replay: Lesson | None, config: DistillConfig) -> Iterator[Batch]:
    """The batch of each step: `keep_batch` answers of the replay, then answers of the lesson while there is room for them.

    A pool is reshuffled when it is used up. The shapes are the config's, whatever the number of questions and the length
    of their answers: every text is trained by the same program.
    """
    rng = np.random.default_rng(config.seed)
    read = shuffled(len(lesson.inputs), rng)
    kept = None if replay is None else shuffled(len(replay.inputs), rng)
    upcoming = next(read)
    for _ in range(config.steps):
        packer = Packer(lesson, replay, config.rows, config.row_tokens)
        if replay is not None and kept is not None:
            for _ in range(config.keep_batch):
                packer.add(replay, next(kept))
        while packer.add(lesson, upcoming):
            upcoming = next(read)
        yield packer.batch()


def shuffled(size: int, rng: np.random.Generator) -> Iterator[int]:
    """0 ... size - 1 without end, in a new order each time round."""
    while True:
        yield from (int(i) for i in rng.permutation(size))


def distill(
    base: Base,
    text: str,
    style: PromptStyle,
    config: DistillConfig = DistillConfig(),
    *,
    replay: Lesson | None = None,
    progress: Callable[[str, float, dict[str, float]], None] = lambda stage, share, metrics: None,
) -> Written:
    """Write `text` into an adapter of the frozen base. InputError where the text has nothing to ask about.

    replay: `replay_lesson` of this base, style and config, for callers that write several texts.

    progress(stage, share done, metrics) is called as work goes on; stages are `questions`, `teacher`, `train`.
    """
    began = time.monotonic()
    progress("questions", 0.0, {})
    if not split_sentences(text):  # said before the replay is made, which takes a while
        raise InputError(_NOTHING)
    if replay is None and config.keep and config.general:
        replay = replay_lesson(base, style, config)
    with compiling(base, replay, config):
        questions = make_questions(base, text, style, config)
        if not questions:
            raise InputError(_NOTHING)
        asked = [q for q in questions if q.kind in ("asked", "turned")]
        held = asked[:: max(1, round(1 / config.held_out))] if config.held_out and len(asked) > 3 else []
        trained = [q for q in questions if q not in held]
        asked_at = time.monotonic()
        knobs = TeachConfig(
            config.marker, config.answer_tokens, config.top_k, config.trust, config.alike, config.reworded, config.seed
        )
        tell = lambda share: progress("teacher", 0.5 * share, {})
        lesson, kept = teach(base, text, trained, style, knobs, progress=tell)
    taught_at = time.monotonic()
    adapter, metrics = train_adapter(base, lesson, replay, config, progress=lambda share, m: progress("train", share, m))
    counts = {
        f"questions_{kind}": float(sum(q.kind == kind for q in kept))
        for kind in ("asked", "reworded", "stranger", "turned", "cloze", "continue")
    }
    metrics |= {
        **counts,
        "seconds_questions": asked_at - began,
        "seconds_teacher": taught_at - asked_at,
        "seconds_train": time.monotonic() - taught_at,
    }
    return Written(adapter, tuple(held), metrics)


def replay_lesson(base: Base, style: PromptStyle, config: DistillConfig) -> Lesson:
    """General prompts with how the base's own answers begin: what keeps an adapter from leaking into everything else.

    Already `entered` behind the layers that the config freezes, so that writers of several texts share that too.
    """
    knobs = TeachConfig(config.marker, config.keep_tokens, config.top_k)
    replay = echo(base, general_questions(style, config.general), style, knobs)
    return entered(base, replay, frozen_layers(base.config, config))


def frozen_layers(base: ModelConfig, config: DistillConfig) -> int:
    """How many of the base's lowest layers have no adapter."""
    return int(base.num_layers * config.frozen)


@contextlib.contextmanager
def compiling(base: Base, replay: Lesson | None, config: DistillConfig) -> Iterator[None]:
    """Compiles the training step in a thread while the body runs: making questions leaves cores idle now and then.

    A lesson's shapes are the config's, so one step on the replay alone compiles the step of every text. A failure here is
    left to the training itself, which meets it again. Not where several processes compute together: two threads would send
    what they exchange in another order in each.
    """
    if replay is None or jax.process_count() > 1:
        yield
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(_train, base, replay, replay, config, lambda step, metrics: True)
        yield


def train_adapter(
    base: Base,
    lesson: Lesson,
    replay: Lesson | None,
    config: DistillConfig,
    *,
    progress: Callable[[float, dict[str, float]], None] = lambda share, metrics: None,
) -> tuple[Adapter, dict[str, float]]:
    """(the adapter trained on a lesson and on `replay`, a `replay_lesson` if there is one; its last metrics)."""
    last: dict[str, float] = {}

    def on_log(step: int, metrics: Mapping[str, Any]) -> bool:
        last.update({k: float(v) for k, v in metrics.items() if np.ndim(v) == 0})
        progress(step / config.steps, last)
        return False

    return _train(base, entered(base, lesson, frozen_layers(base.config, config)), replay, config, on_log), last


def _train(
    base: Base,
    lesson: Lesson,
    replay: Lesson | None,
    config: DistillConfig,
    on_log: Callable[[int, Mapping[str, Any]], bool],
) -> Adapter:
    """The adapter trained on lessons that are `entered` already, until `on_log` says so."""
    student = make_student(base.model, base.params, config)
    fitted = fit(
        jax.tree_util.Partial(distill_loss, student),
        fresh_tree(student.model.config, config),
        batches(lesson, replay, config),
        fit_config(config),
        on_log=on_log,
        progress=False,  # callers show one bar for questions, teacher and training
    )
    begin = frozen_layers(base.config, config)
    a, b = (jax.tree.map(lambda x: jnp.pad(x, ((begin, 0), (0, 0), (0, 0))), fitted.params[name]) for name in ("a", "b"))
    return Adapter(a, b, student.scale)


def make_student(model: Model, params: Params, config: DistillConfig) -> Student:
    """What the loss reads of a base; traceable, for plans of a base that is only described."""
    upper, params = upper_layers(model, params, frozen_layers(model.config, config))
    scale = jnp.float32(config.alpha / config.rank)
    return Student(params, scale, jnp.float32(config.keep), model=upper, remat=config.remat)


def fresh_tree(upper: ModelConfig, config: DistillConfig) -> dict[str, Any]:
    """What is trained, before the first step: factors that change nothing, for the layers of the student."""
    sites = {site: shape for site, shape in site_shapes(upper).items() if site in config.sites}
    fresh = init_adapter(sites, upper.num_layers, config.rank, 1.0, jax.random.key(config.seed))
    return {"a": fresh.a, "b": fresh.b}


def fit_config(config: DistillConfig) -> FitConfig:
    """How the adapter of a recipe is trained."""
    warmup = min(config.warmup, config.steps // 4)
    optimizer = OptimizerConfig(learning_rate=config.learning_rate, warmup=warmup, final=0.05)
    return FitConfig(steps=config.steps, log_every=5, seed=config.seed, optimizer=optimizer)
