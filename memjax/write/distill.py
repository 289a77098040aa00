"""Context distillation with a shared base cache: a text becomes a low-rank adapter (arXiv 2605.28889, section 3)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import SITES, Adapter, as_slots, init_adapter
from memjax.models.base import Base
from memjax.models.decoder import Model, Params, forward, site_shapes, unembed
from memjax.train.fit import FitConfig, fit
from memjax.train.optimizer import OptimizerConfig
from memjax.write.prompts import PromptStyle, general_prompts
from memjax.write.questions import Question, asked_questions, at_most, cloze_questions, continuations, turned_questions
from memjax.write.teacher import Lesson, TeachConfig, join, teach


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The recipe of one distillation. What it was chosen by is in configs/distill.md.

    `asked`, `turned`, `cloze`, `continued` and `general` bound the questions of each kind (`asked`: what the base is
    told to write, a third of which is sound); no answer is asked for more than `repeats` times in one form. Every step
    draws `batch` answers, a share `keep` of them general replay. `marker` prompt tokens are read with the adapter on,
    the rest by the base alone.
    """

    rank: int = 16
    alpha: float = 32.0
    sites: tuple[str, ...] = SITES
    marker: int = 1
    answer_tokens: int = 8
    top_k: int = 32
    trust: float = 0.7
    asked: int = 32
    turned: int = 48
    cloze: int = 8
    continued: int = 12
    general: int = 96
    held_out: float = 0.1
    repeats: int = 3
    steps: int = 46
    batch: int = 12
    keep: float = 0.42
    learning_rate: float = 3e-3
    warmup: int = 4
    remat: bool = False
    seed: int = 0


def recipe(effort: str = "default") -> DistillConfig:
    """The recipe of an effort: `fast`, `default` or `thorough` (measured in configs/distill.md)."""
    if effort == "fast":
        return DistillConfig(steps=24, asked=0, turned=28, continued=8)
    if effort == "thorough":
        return DistillConfig(steps=140, asked=64, turned=96, cloze=32, continued=48)
    return DistillConfig()


@dataclasses.dataclass(frozen=True)
class Written:
    """What a writer hands to the bank: the adapter, the held-out questions (never trained on), and how it went."""

    adapter: Adapter
    held_out: tuple[Question, ...]
    metrics: dict[str, float]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Student:
    """All that the loss reads and that is not trained: the frozen base, the lesson, the adapter's scale.

    A pytree, so that one compiled step serves every document of a base: only shapes are static.
    """

    params: Params
    lesson: Lesson
    scale: jax.Array
    model: Model = dataclasses.field(metadata={"static": True})
    remat: bool = dataclasses.field(metadata={"static": True})


def distill_loss(
    student: Student, trained: dict[str, Any], batch: dict[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean forward KL(teacher || student) in nats per answer token of the rows batch["rows"] [B].

    The student reads the last `marker` prompt tokens and the answer with the adapter on, over the base's own cache of the
    prompt, which is not differentiated (arXiv 2605.28889 sections 3.1 and 3.3). The teacher's tail beyond its top k is
    one class of its own, so the value is a lower bound of the full KL and zero only where the two agree.
    """
    lesson, rows = student.lesson, batch["rows"]
    segments = [lesson.header, Segment(lesson.k[:, rows], lesson.v[:, rows], lesson.place[rows])]
    adapter = Adapter(trained["a"], trained["b"], student.scale)
    out = forward(
        student.model,
        student.params,
        lesson.inputs[rows],
        lesson.positions[rows],
        segments=segments,
        slots=as_slots(adapter),
        remat=student.remat,
    )
    logits = unembed(student.model, student.params, out.hidden)
    logq = jnp.take_along_axis(logits, lesson.target[rows], axis=-1)
    logq = logq - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    kl = divergence(lesson.logp[rows], logq)
    weight = lesson.weight[rows]
    read = lesson.read[rows][:, None].astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    metrics = {
        "kl_read": (kl * weight * read).sum() / jnp.maximum((weight * read).sum(), 1.0),
        "kl_keep": (kl * weight * (1 - read)).sum() / jnp.maximum((weight * (1 - read)).sum(), 1.0),
    }
    return (kl * weight).sum() / total, metrics


def divergence(logp: jax.Array, logq: jax.Array) -> jax.Array:
    """KL(p || q) [...] in nats over k classes and one for the rest, from log-probabilities [..., k], float32."""
    p, q = jnp.exp(logp), jnp.exp(logq)
    p_rest, q_rest = (jnp.clip(1 - x.sum(axis=-1), 1e-6, 1.0) for x in (p, q))
    return (p * (logp - logq)).sum(axis=-1) + p_rest * (jnp.log(p_rest) - jnp.log(q_rest))


def make_questions(base: Base, text: str, config: DistillConfig) -> list[Question]:
    """The training questions of a text, of all kinds that the config asks for."""
    rng = np.random.default_rng(config.seed)

    def some(questions: Sequence[Question], limit: int) -> list[Question]:
        if len(questions) <= limit:
            return list(questions)
        return [questions[i] for i in sorted(rng.permutation(len(questions))[:limit])]

    return [
        *(asked_questions(base, text, config.asked, config.seed) if config.asked else []),
        *some(at_most(turned_questions(text), config.repeats), config.turned),
        *some(at_most(cloze_questions(text), config.repeats), config.cloze),
        *some(continuations(text), config.continued),
    ]


def general_questions(count: int, *, calibration: bool = False) -> list[Question]:
    """`count` general prompts: every third is kept for calibrating gates, the others are for replay, and never swap."""
    prompts = [p for i, p in enumerate(general_prompts()) if (i % 3 == 0) == calibration]
    step = max(1, len(prompts) // max(count, 1))
    return [Question(p, "general") for p in prompts[::step][:count]]


def batches(lesson: Lesson, config: DistillConfig) -> Iterator[dict[str, np.ndarray]]:
    """Rows of each step: a share `keep` from general replay, the rest from the text, each pool reshuffled when used up."""
    rng = np.random.default_rng(config.seed)
    read = np.asarray(lesson.read)
    pools = [np.flatnonzero(read), np.flatnonzero(~read)]
    keep = round(config.batch * config.keep) if len(pools[1]) else 0
    streams = [_shuffled(pool, rng) for pool in pools if len(pool)]
    for _ in range(config.steps):
        rows = [next(streams[0]) for _ in range(config.batch - keep)]
        rows += [next(streams[1]) for _ in range(keep)]
        yield {"rows": np.asarray(rows, np.int32)}


def _shuffled(pool: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from (int(i) for i in rng.permutation(pool))


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
    questions = make_questions(base, text, config)
    if not questions:
        raise InputError("this text has no sentence to learn from; give it a text in sentences")
    asked = [q for q in questions if q.kind in ("asked", "turned")]
    held = asked[:: max(1, round(1 / config.held_out))] if config.held_out and len(asked) > 3 else []
    trained = [q for q in questions if q not in held]
    asked_at = time.monotonic()
    knobs = _knobs(config)
    lesson, kept = teach(base, text, trained, style, knobs, progress=lambda share: progress("teacher", 0.8 * share, {}))
    if config.keep and config.general:
        lesson = join([lesson, replay or replay_lesson(base, style, config)])
    taught_at = time.monotonic()
    adapter, metrics = train_adapter(base, lesson, config, progress=lambda share, m: progress("train", share, m))
    counts = {
        f"questions_{kind}": float(sum(q.kind == kind for q in kept)) for kind in ("asked", "turned", "cloze", "continue")
    }
    metrics |= {
        **counts,
        "seconds_questions": asked_at - began,
        "seconds_teacher": taught_at - asked_at,
        "seconds_train": time.monotonic() - taught_at,
    }
    return Written(adapter, tuple(held), metrics)


def replay_lesson(base: Base, style: PromptStyle, config: DistillConfig) -> Lesson:
    """General prompts with the base's own answers: what keeps an adapter from leaking into everything else."""
    return teach(base, None, general_questions(config.general), style, _knobs(config))[0]


def _knobs(config: DistillConfig) -> TeachConfig:
    return TeachConfig(config.marker, config.answer_tokens, config.top_k, config.trust)


def train_adapter(
    base: Base,
    lesson: Lesson,
    config: DistillConfig,
    *,
    progress: Callable[[float, dict[str, float]], None] = lambda share, metrics: None,
) -> tuple[Adapter, dict[str, float]]:
    """(the adapter trained on a lesson, its last metrics)."""
    sites = {site: shape for site, shape in site_shapes(base.config).items() if site in config.sites}
    scale = config.alpha / config.rank
    fresh = init_adapter(sites, base.config.num_layers, config.rank, scale, jax.random.key(config.seed))
    lesson = jax.tree.map(jnp.asarray, lesson)
    student = Student(base.params, lesson, jnp.float32(scale), model=base.model, remat=config.remat)
    last: dict[str, float] = {}

    def on_log(step: int, metrics: dict[str, float]) -> bool:
        last.update({k: float(v) for k, v in metrics.items() if np.ndim(v) == 0})
        progress(step / config.steps, last)
        return False

    fitted = fit(
        jax.tree_util.Partial(distill_loss, student),
        {"a": fresh.a, "b": fresh.b},
        batches(lesson, config),
        FitConfig(
            steps=config.steps,
            log_every=5,
            seed=config.seed,
            optimizer=OptimizerConfig(
                learning_rate=config.learning_rate, warmup=min(config.warmup, config.steps // 4), final=0.05
            ),
        ),
        on_log=on_log,
    )
    return Adapter(fitted.params["a"], fitted.params["b"], jnp.float32(scale)), last
