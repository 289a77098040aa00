"""Latent Context Compilation: a context becomes key/value slots that the untouched base reads (arXiv 2602.21221).

A step reads `[header | context | slots]` with a disposable adapter on context and slots, keeps the slots' keys and values,
and lets the frozen base read `[header | slots | prompt | answer]`: the prompt and the answer see the context through the
slots alone. What is left in the end are the slots of one last pass; adapter and context are thrown away. The paper's
controls, which train something else by the same losses, are `through` and `coupled` of the recipe.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.distributed import agreed
from memjax.errors import InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Adapter, Slots, as_slots, init_adapter
from memjax.memory.buffer import Buffer
from memjax.memory.layout import Layout, places
from memjax.models.base import Base
from memjax.models.buffers import check_reach, rotate_layers
from memjax.models.decoder import Model, Params, embed, forward, site_shapes, unembed
from memjax.models.generate import Prefix, read_prefix
from memjax.sharding import fetch, mesh_of, readable
from memjax.train.fit import FitConfig, fit
from memjax.train.optimizer import OptimizerConfig
from memjax.write.chunks import Chunks, chunk_texts, join_chunks, split_chunks
from memjax.write.compile_config import CompileConfig as CompileConfig
from memjax.write.compile_config import recipe as recipe
from memjax.write.distill import DistillConfig, Written, divergence, make_questions, probe_questions, shuffled
from memjax.write.distractors import Beside, Others, all_beside, draw_beside, make_others, place_beside
from memjax.write.pack_tasks import PackedTasks, pack_tasks, room_for
from memjax.write.prompts import PromptStyle
from memjax.write.questions import Question
from memjax.write.reading import Split, split_prompts
from memjax.write.tasks import Tasks, general_tasks, make_tasks, read_own

Progress = Callable[[str, float, dict[str, float]], None]
STEP = 64  # tokens up to a multiple of which contexts are filled up: texts of like lengths share a program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compiler:
    """What a compilation reads and never trains. A pytree: texts of like lengths and one recipe share one compiled step.

    params: the frozen base; header: its cache of the prompt before the context; context int32 [n]; held: its cache of the
    context (scope "buffer" only); begin [M, D]: the slots before any step; scale of the adapter; weights of the kinds of
    tasks; the slots' rate; others: buffers that some steps read beside. n and M are filled up to a multiple of `STEP`
    tokens and what slots that makes; context_at int32 [n], written_at and read_at int32 [M] are the positions of context
    and slots, -1 where nothing is; following int32 []: the position of the first token read after the slots.
    """

    params: Params
    header: Segment
    context: jax.Array
    held: Segment | None
    context_at: jax.Array
    begin: jax.Array
    written_at: jax.Array
    read_at: jax.Array
    following: jax.Array
    scale: jax.Array
    weights: dict[str, jax.Array]
    slots_rate: jax.Array
    others: Others | None
    model: Model = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    remat: bool = dataclasses.field(default=False, metadata={"static": True})
    coupled: bool = dataclasses.field(default=False, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Tasks of a text to train on and tasks held out, by kind; questions for gates; the seconds that making all took."""

    tasks: dict[str, Tasks]
    held: dict[str, Tasks]
    probes: tuple[Question, ...]
    seconds: float


def write_slots(compiler: Compiler, trained: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """(k before RoPE, v) [L, M, K, H] of the slots: the base with the adapter on reads `[header | context | slots]`.

    trained: {a, b: the adapter's factors by site, slots [M, D]: what is added to the slots' first inputs}; the latter
    alone, and the slots see no context; or {k, v}, which are the slots.
    """
    if "k" in trained:
        return trained["k"], trained["v"]
    model, params = compiler.model, compiler.params
    count = compiler.begin.shape[0]
    slots = (compiler.begin + compiler.slots_rate * trained["slots"]).astype(params["embed"].dtype)
    at, segments, inputs = compiler.written_at, [compiler.header], slots
    if compiler.held is not None:
        segments.append(compiler.held)
    elif "a" in trained:
        inputs = jnp.concatenate([embed(model, params, compiler.context), slots])
        at = jnp.concatenate([compiler.context_at, at])
    out = forward(
        model,
        params,
        inputs[None],
        at[None],
        segments=segments,
        slots=_adapter(compiler, trained) if "a" in trained else None,
        taps=("k_raw", "v"),
        remat=compiler.remat,
    )
    k, v = (out.taps[name][:, 0, -count:] for name in ("k_raw", "v"))
    return k, v


def _adapter(compiler: Compiler, trained: Mapping[str, Any]) -> Slots:
    return as_slots(Adapter(trained["a"], trained["b"], compiler.scale))


def make_buffer(compiler: Compiler, k: jax.Array, v: jax.Array) -> Buffer:
    """The buffer of what `write_slots` gives, without the slots that only fill up."""
    count, context = (int((np.asarray(at) >= 0).sum()) for at in (compiler.read_at, compiler.context_at))
    return Buffer(k[:, :count], v[:, :count], compiler.length, context, compiler.layout)


def read_tasks(
    compiler: Compiler,
    k: jax.Array,
    v: jax.Array,
    tasks: PackedTasks,
    adapter: Slots | None = None,
    beside: Beside | None = None,
) -> jax.Array:
    """KL(teacher || reader) of every answer token [A] in nats, float32, where the frozen base reads tasks behind the slots;
    for tasks with a `norm` the mean squared difference of logits.

    adapter: is on in the reader, for the coupled control; beside: which other buffers it reads too.
    """
    model, params = compiler.model, compiler.params
    arrays: Any = jax.tree.map(jnp.asarray, tasks)
    read_at, following, segments = compiler.read_at, compiler.following, [compiler.header]
    if beside is not None and compiler.others is not None:
        start = compiler.context_at[0]
        other, read_at, following = place_beside(model.config, compiler.others, beside, read_at, start, following)
        segments.append(other)
    segments.append(Segment(rotate_layers(model.config, k, read_at)[:, None], v[:, None], read_at[None]))
    positions = jnp.where(arrays.offset >= 0, following + arrays.offset, -1)
    out = forward(model, params, arrays.inputs, positions, visible=arrays.owner, segments=segments, slots=adapter)
    logits = unembed(model, params, out.hidden.reshape(-1, out.hidden.shape[-1])[arrays.at])
    chosen = jnp.take_along_axis(logits, arrays.target, axis=-1)
    if arrays.norm is not None:
        return jnp.square(arrays.logp + arrays.norm[..., None] - chosen).mean(axis=-1)
    return divergence(arrays.logp, chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def compile_loss(
    compiler: Compiler, trained: Mapping[str, Any], tasks: PackedTasks, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted loss of the kinds of tasks in a batch; each alone, `kl_recon` (or `mse_recon`) and so on, as a metric,
    float32."""
    adapter = _adapter(compiler, trained) if compiler.coupled else None
    beside = None if compiler.others is None else draw_beside(compiler.others, key)
    return _losses(compiler, *write_slots(compiler, trained), tasks, adapter, beside)


def _losses(
    compiler: Compiler,
    k: jax.Array,
    v: jax.Array,
    tasks: PackedTasks,
    adapter: Slots | None = None,
    beside: Beside | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    each = read_tasks(compiler, k, v, tasks, adapter, beside)
    name = "kl" if tasks.norm is None else "mse"
    found = {f"{name}_{kind}": jnp.where(share > 0, each * share, 0.0).sum() for kind, share in tasks.share.items()}
    weights = jnp.stack([compiler.weights[kind] for kind in tasks.share])
    return (weights * jnp.stack(list(found.values()))).sum() / weights.sum(), found


def make_compiler(base: Base, split: Split, config: CompileConfig, before: Prefix | None = None) -> Compiler:
    """A compilation of a context before its first step: slots begin as embeddings of evenly spaced context tokens, those
    written within the context of the tokens that they stand on.

    before: what the base has read before the context, in the header's place (`write.chunks`).
    """
    length, tokens = len(split.header), len(split.context)
    if config.layout == "spread" and base.config.window is not None:
        raise InputError("slots cannot be spread where layers see a window only; use the layout compact")
    context = np.pad(np.asarray(split.context, np.int32), (0, -tokens % STEP))
    held = None
    header = before or read_prefix(base.model, base.params, split.header)
    seen = config.scope == "buffer" and config.through != "inputs"  # those never see the context
    if seen and before is not None:
        held = read_own(base, split, before)
    elif seen:
        whole = read_prefix(base.model, base.params, [*split.header, *split.context]).segment
        own = fetch(whole.position) >= length
        held = dataclasses.replace(whole, position=jnp.where(own, whole.position, -1))
    start = int(header.length)
    given = (header.segment, jnp.asarray(context), tokens, held, length)
    return assemble(base.model, base.params, *given, config, start)


def assemble(
    model: Model,
    params: Params,
    header: Segment,
    context: jax.Array,
    tokens: int,
    held: Segment | None,
    length: int,
    config: CompileConfig,
    start: int | None = None,
) -> Compiler:
    """A compilation from what the base has read of a prompt; traceable, for plans of a base that is only described.

    context int32 [n], the first `tokens` of which are the text's; length: tokens of the header; start: position of the
    context's first token, where more than the header stands before it; others as in `Compiler`. InputError where a
    sliding window would hide the slots.
    """
    start = length if start is None else start
    count, slots = (math.ceil(size / config.ratio) for size in (tokens, context.shape[0]))
    read_at, following = places(count, start, tokens, config.layout)
    check_reach(model.config, read_at, following)
    rest = 1 - config.asked_share if config.asks else 1.0
    shares = {"recon": rest * config.recon, "query": rest * (1 - config.recon), "asked": config.asked_share}
    within = config.written == "within"
    written_at, _ = places(count, start, tokens, "spread" if within else "in_place")
    begin_as = written_at - start if within else ((np.arange(count) + 0.5) * tokens / count).astype(np.int32)
    chosen = _filled(begin_as, slots, 0)
    return Compiler(
        params,
        header,
        context,
        held,
        _filled(start + np.arange(tokens), context.shape[0], -1),
        readable(embed(model, params, context[chosen]), mesh_of(params["embed"])),
        _filled(written_at, slots, -1),
        _filled(read_at, slots, -1),
        jnp.int32(following),
        jnp.float32(config.alpha / config.rank),
        {kind: jnp.float32(share) for kind, share in shares.items()},
        jnp.float32(config.slots_rate),
        None,
        model=model,
        length=length,
        layout=config.layout,
        remat=config.remat,
        coupled=config.coupled,
    )


def _filled(array: np.ndarray, size: int, value: int) -> jax.Array:
    """The array with so much of `value` behind it that it has `size` entries, int32."""
    return jnp.asarray(np.pad(array, (0, size - len(array)), constant_values=value), jnp.int32)


def fresh_tree(compiler: Compiler, config: CompileConfig) -> dict[str, Any]:
    """What is trained, before the first step: an adapter that changes nothing, and nothing added to the slots.

    Or, by `through`, only the latter, or the keys and values that the two give.
    """
    base = compiler.model.config
    slots = jnp.zeros(compiler.begin.shape, jnp.float32)
    if config.through == "inputs":
        return {"slots": slots}
    sites = {site: shape for site, shape in site_shapes(base).items() if site in config.sites}
    fresh = init_adapter(sites, base.num_layers, config.rank, 1.0, jax.random.key(config.seed))
    tree = {"a": fresh.a, "b": fresh.b, "slots": slots}
    if config.through == "slots":
        k, v = _write(compiler, tree)
        return {"k": k.astype(jnp.float32), "v": v.astype(jnp.float32)}
    return tree


def fit_config(config: CompileConfig) -> FitConfig:
    """How the buffer of a recipe is trained."""
    warmup = min(config.warmup, config.steps // 4)
    optimizer = OptimizerConfig(
        kind=config.optimizer, learning_rate=config.learning_rate, schedule="linear", warmup=warmup, final=0.02
    )
    return FitConfig(steps=config.steps, seed=config.seed, log_every=5, eval_every=config.eval_every, optimizer=optimizer)


def compile_context(
    base: Base,
    text: str,
    style: PromptStyle,
    config: CompileConfig = CompileConfig(),
    *,
    seconds: float | None = None,
    general: Tasks | None = None,
    lesson: Lesson | None = None,
    others: Sequence[Buffer] = (),
    progress: Progress = lambda stage, share, metrics: None,
) -> Written:
    """Compile `text` into a buffer of the frozen base; the best by the tasks held out, within `seconds` if given.

    A text that is too long to be read at once is compiled chunk by chunk into one buffer (`CompileConfig.chunks`); its
    losses are the means of the chunks', of which `chunks` tells the number.

    general: `tasks.general_tasks` of this base, style and config, for callers that compile several texts. lesson:
    `make_lesson` of this text, for callers that compile it at several ratios. others: buffers of other texts, for a config
    with distractors.
    progress(stage, share done, metrics) is called as work goes on; stages are those of `distill`. InputError for a text
    that is too short to compile, or so long that its slots do not fit the base's window.
    """
    began = time.monotonic()
    split = split_prompts(base.tokenizer, style, text)
    texts = chunk_texts(base, split, text, config)
    pool = None
    if config.distractors:
        pool = make_others(base.config, others, config.distractors, config.beside, len(split.header))
    if len(texts) == 1:
        return _compile_one(base, text, split, config, seconds, general, lesson, None, pool, progress)
    parts = split_chunks(base, split, texts)
    count = sum(math.ceil(len(part.context) / config.ratio) for part in parts)
    chunks = Chunks(base, split, count, config.chunks == "sequential")
    config = dataclasses.replace(config, layout="compact", probes=math.ceil(config.probes / len(parts)))
    if general is None and config.query_teacher == "none":
        general = general_tasks(base, split, config)
    made: list[Written] = []
    for number, (part, own) in enumerate(zip(parts, texts, strict=True)):
        left = None
        if seconds is not None:
            left = max(0.0, seconds * (number + 1) / len(parts) - (time.monotonic() - began))
        told = _chunk_progress(progress, number, len(parts))
        written = _compile_one(base, own, part, config, left, general, None, chunks.before(), pool, told)
        assert isinstance(written.artefact, Buffer)
        made.append(written)
        chunks.done.append(written.artefact)
    buffer = join_chunks(chunks.done)
    each = [written.metrics for written in made]
    shared = set(each[0]).intersection(*each)
    metrics = {name: float(np.mean([found[name] for found in each])) for name in each[0] if name in shared}
    metrics |= {name: float(sum(found[name] for found in each)) for name in metrics if name.startswith("seconds_")}
    metrics |= {"slots": float(buffer.slots), "context": float(buffer.context), "chunks": float(len(parts))}
    return Written(buffer, tuple(probe for written in made for probe in written.held_out), metrics)


def _chunk_progress(progress: Progress, number: int, count: int) -> Progress:
    """Tells of one chunk of several: a share of the training, so that no bar goes back."""
    stages = {"questions": (0.0, 0.1), "teacher": (0.1, 0.2), "train": (0.3, 0.7)}

    def told(stage: str, share: float, metrics: dict[str, float]) -> None:
        begin, room = stages[stage]
        progress("train", (number + begin + room * share) / count, metrics)

    return told


def _compile_one(
    base: Base,
    text: str,
    split: Split,
    config: CompileConfig,
    seconds: float | None,
    general: Tasks | None,
    lesson: Lesson | None,
    before: Prefix | None,
    others: Others | None,
    progress: Progress,
) -> Written:
    """`compile_context` of a text that is read at once, behind the header or what stands `before` it in its place, and
    among `others`."""
    began = time.monotonic()
    lesson = lesson or _lesson(base, text, split, config, general, before, progress)
    tasks, held = lesson.tasks, pack_tasks(lesson.held)
    compiler = dataclasses.replace(make_compiler(base, split, config, before), others=others)
    if others is not None:
        _check_room(base, compiler, tasks)
    ready = time.monotonic()
    best: dict[str, Any] = {"loss": math.inf, "since": 0}

    def evaluate(trained: Any) -> dict[str, float]:
        loss, found = _held_out(compiler, trained, held)
        metrics = {"held_out": float(loss), **{f"held_out_{name}": float(value) for name, value in found.items()}}
        if metrics["held_out"] < best["loss"]:
            best.update(loss=metrics["held_out"], since=0, metrics=metrics, trained=jax.tree.map(np.array, trained))
        else:
            best["since"] += 1
        return metrics

    def on_log(step: int, line: Mapping[str, Any]) -> bool:
        told = {name: float(line[name]) for name in line if name.startswith(("kl_", "mse_"))}
        progress("train", step / config.steps, {**told, **best.get("metrics", {})})
        late = seconds is not None and agreed(time.monotonic() - began > seconds)
        return late or best["since"] >= config.patience

    start = fresh_tree(compiler, config)
    evaluate(start)
    fit(
        jax.tree_util.Partial(compile_loss, compiler),
        start,
        _batches(tasks, config),
        fit_config(config),
        evaluate=evaluate,
        on_log=on_log,
        progress=False,
    )
    buffer = make_buffer(compiler, *_write(compiler, best["trained"]))
    metrics = {**best["metrics"], "seconds_teacher": lesson.seconds, "seconds_train": time.monotonic() - ready}
    return Written(buffer, lesson.probes, {**metrics, "slots": float(buffer.slots), "context": float(buffer.context)})


def make_lesson(
    base: Base, text: str, style: PromptStyle, config: CompileConfig, general: Tasks | None = None
) -> Lesson | None:
    """What `text` is compiled with at any ratio: all of the config counts but that. None where it is another for each.

    That is so for a text in chunks, which are read behind the slots of those before them, and in the layout in_place, where
    slots take room that windows would have. general: as in `compile_context`.
    """
    split = split_prompts(base.tokenizer, style, text)
    if config.layout == "in_place" or len(chunk_texts(base, split, text, config)) > 1:
        return None
    return _lesson(base, text, split, config, general, None, lambda stage, share, metrics: None)


def _lesson(
    base: Base,
    text: str,
    split: Split,
    config: CompileConfig,
    general: Tasks | None,
    before: Prefix | None,
    progress: Progress,
) -> Lesson:
    began = time.monotonic()
    progress("questions", 0.0, {})
    questions, probes = _questions(base, text, split.style, config)
    progress("teacher", 0.0, {})
    tasks, held = make_tasks(base, split, config, questions, general, before)
    return Lesson(tasks, held, tuple(probes), time.monotonic() - began)


def _check_room(base: Base, compiler: Compiler, tasks: Mapping[str, Tasks]) -> None:
    """InputError where slots, distractors and tasks do not fit the base's window together."""
    assert compiler.others is not None
    own = int((compiler.read_at >= 0).sum()) + int(np.sort(np.asarray(compiler.others.size))[-compiler.others.most :].sum())
    longest = max(some.inputs.shape[1] for some in tasks.values())
    if int(compiler.context_at[0]) + own + longest > base.config.max_positions:
        raise InputError(
            f"{own} slots, those of {compiler.others.most} distractors among them, leave no room for questions in the "
            f"base's window of {base.config.max_positions}; train with fewer distractors"
        )


def _questions(base: Base, text: str, style: PromptStyle, config: CompileConfig) -> tuple[list[Question], list[Question]]:
    """(questions to train on, those that gates are calibrated with and nothing is trained on)."""
    if not config.asks:
        return [], probe_questions(base, text, style, config.probes, config.seed)
    kinds = {name: getattr(config, name) for name in ("asked", "turned", "cloze", "alike", "strangers", "trust")}
    wanted = DistillConfig(**kinds, continued=0, seed=config.seed)
    made = make_questions(base, text, style, wanted)
    asked = [question for question in made if question.kind in ("asked", "turned")]
    probes = asked[:: max(1, len(asked) // config.probes)][: config.probes] if config.probes else []
    return [question for question in made if question not in probes], probes


_write = jax.jit(write_slots)


@jax.jit
def _held_out(compiler: Compiler, trained: Any, tasks: PackedTasks) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The losses held out; with others to be read beside, as large a share of those with all of them as steps have."""
    k, v = write_slots(compiler, trained)
    loss, found = _losses(compiler, k, v, tasks)
    if compiler.others is None:
        return loss, found
    among, _ = _losses(compiler, k, v, tasks, beside=all_beside(compiler.others))
    share = compiler.others.share
    return (1 - share) * loss + share * among, {**found, "beside": among}


def _batches(tasks: Mapping[str, Tasks], config: CompileConfig) -> Iterator[PackedTasks]:
    """The tasks of each step: as many of each kind as the config says, reshuffled when they are used up."""
    rng = np.random.default_rng(config.seed)
    counts = {"recon": config.windows, "query": config.queries, "asked": config.asks}
    drawn = {kind: shuffled(len(some.inputs), rng) for kind, some in tasks.items()}
    indices = [
        {kind: np.array([next(drawn[kind]) for _ in range(counts[kind])]) for kind in tasks} for _ in range(config.steps)
    ]
    step = lambda index: {kind: some.take(index[kind]) for kind, some in tasks.items()}
    room = room_for(map(step, indices))
    yield from (pack_tasks(step(index), room) for index in indices)
