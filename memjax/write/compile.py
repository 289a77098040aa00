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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import ConfigError, InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import SITES, Adapter, Slots, as_slots, init_adapter
from memjax.memory.buffer import Buffer
from memjax.memory.layout import LAYOUTS, Layout, places
from memjax.models.base import Base
from memjax.models.buffers import check_reach, rotate_layers
from memjax.models.decoder import Model, Params, embed, forward, site_shapes, unembed
from memjax.models.generate import read_prefix
from memjax.sharding import mesh_of, readable
from memjax.train.fit import FitConfig, fit
from memjax.train.optimizer import OptimizerConfig
from memjax.write.distill import DistillConfig, Written, divergence, make_questions, probe_questions, shuffled
from memjax.write.prompts import PromptStyle
from memjax.write.questions import Question
from memjax.write.reading import Split, split_prompts
from memjax.write.tasks import Tasks, make_tasks

STEP = 64  # tokens up to a multiple of which contexts are filled up: texts of like lengths share a program
Scope = Literal["context+buffer", "buffer"]
Through = Literal["adapter", "slots", "inputs"]


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """The recipe of one compilation; as it stands the paper's, see `recipe` for what `memjax write` does.

    ratio: context tokens per slot; scope: where the disposable adapter acts ("buffer": on the slots alone, so that the
    context is read once by the base and not per step); layout: see `memory.buffer`. Every step holds `windows`
    continuations of the context, each `window` tokens after a cue of `cue`, and `queries` general prompts, drawn from
    `general`, with what the base answers; their losses weigh `recon` and 1 - `recon`. query_teacher: whether the base saw
    the context when it answered those. top_k: classes of the divergence, 0 for the whole vocabulary. `slots_rate` is the
    learning rate of the slots as a multiple of the adapter's. Every `eval_every` steps the tasks held out are read; the
    best slots by their losses are kept, and after `patience` readings without a better one it ends. probes: questions about
    the text that gates are calibrated with, and nothing is trained on.

    asks: questions about the context in a step, from those that the base asks itself before (`asked`, `turned`, `cloze`,
    `alike`, `trust` as in `write.distill`); their loss weighs `asked_share`, the two others the rest of it. 0: none.

    through: what is trained. "adapter", the paper's: an adapter and the slots' inputs; "slots": the slots' keys and values
    themselves, beginning with those of the untrained pass (Cartridges, arXiv 2506.06266); "inputs": the slots' inputs
    alone, which never see the context (prompt tuning). coupled: the adapter stays on in the reader while training, and is
    missing when the buffer is read.
    """

    ratio: float = 16.0
    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = ("q", "k", "v", "o")
    scope: Scope = "context+buffer"
    layout: Layout = "in_place"
    cue: int = 16
    window: int = 64
    windows: int = 8
    queries: int = 8
    general: int = 240
    answer_tokens: int = 16
    query_teacher: Literal["none", "context"] = "none"
    recon: float = 0.5
    top_k: int = 32
    held_out: float = 0.1
    steps: int = 300
    learning_rate: float = 1e-3
    slots_rate: float = 10.0
    warmup: int = 20
    eval_every: int = 50
    patience: int = 4
    probes: int = 24
    asks: int = 0
    asked_share: float = 0.5
    asked: int = 24
    turned: int = 48
    cloze: int = 8
    alike: int = 0
    trust: float = 0.7
    through: Through = "adapter"
    coupled: bool = False
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scope not in ("context+buffer", "buffer") or self.layout not in LAYOUTS:
            raise ConfigError(f"scope {self.scope!r} or layout {self.layout!r} is unknown; see CompileConfig")
        if self.ratio < 1 or not 0 <= self.recon <= 1 or not 0 < self.held_out < 1:
            raise ConfigError("compiling wants ratio >= 1, recon from 0 to 1 and held_out between 0 and 1")
        if min(self.windows, self.queries, self.steps, self.window, self.cue) < 1:
            raise ConfigError("compiling wants at least one window, one query, one step, and a cue")
        if not 0 <= self.asked_share <= 1 or self.asks < 0:
            raise ConfigError("compiling wants asked_share from 0 to 1 and asks of 0 or more")
        if self.through not in ("adapter", "slots", "inputs") or (self.coupled and self.through != "adapter"):
            raise ConfigError(f"compiling through {self.through!r} is unknown, or has no adapter to be coupled")


def recipe(effort: str = "default", ratio: float = 16.0, style: str = "chat") -> CompileConfig:
    """The recipe of an effort, `fast`, `default` or `thorough`, for a prompt style; it adds questions to the paper's.

    A base of the plain style asks them all itself; measured in configs/compile.md.
    """
    steps = {"fast": 200, "thorough": 1200}.get(effort, 600)
    own = CompileConfig(ratio=ratio, steps=steps, windows=2, queries=6, asks=16, recon=0.4)
    if style != "plain":
        return dataclasses.replace(own, steps=steps // 2)
    asked = dataclasses.replace(own, asked=800, turned=0, cloze=0, alike=20, trust=0.0, scope="buffer", layout="spread")
    return dataclasses.replace(asked, rank=16, alpha=32.0, sites=SITES, learning_rate=1e-2, slots_rate=2.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compiler:
    """What a compilation reads and never trains. A pytree: texts of like lengths and one recipe share one compiled step.

    params: the frozen base; header: its cache of the prompt before the context; context int32 [n]; held: its cache of the
    context (scope "buffer" only); begin [M, D]: the slots before any step; scale of the adapter; weights of the kinds of
    tasks; the slots' rate. n and M are filled up to a multiple of `STEP` tokens and what slots that makes;
    context_at int32 [n], written_at and read_at int32 [M] are the positions of context and slots, -1 where nothing is;
    following int32 []: the position of the first token read after the slots.
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
    model: Model = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    remat: bool = dataclasses.field(default=False, metadata={"static": True})
    coupled: bool = dataclasses.field(default=False, metadata={"static": True})


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


def read_tasks(compiler: Compiler, k: jax.Array, v: jax.Array, tasks: Tasks, adapter: Slots | None = None) -> jax.Array:
    """KL(teacher || reader) of every token [B, T] in nats, float32, where the frozen base reads tasks behind the slots.

    adapter: is on in the reader, for the coupled control.
    """
    model, params = compiler.model, compiler.params
    arrays: Any = jax.tree.map(jnp.asarray, tasks)
    segment = Segment(rotate_layers(model.config, k, compiler.read_at)[:, None], v[:, None], compiler.read_at[None])
    positions = jnp.where(arrays.offset >= 0, compiler.following + arrays.offset, -1)
    out = forward(model, params, arrays.inputs, positions, segments=[compiler.header, segment], slots=adapter)
    logits = unembed(model, params, out.hidden)
    logq = jnp.take_along_axis(logits, arrays.target, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return divergence(arrays.logp, logq)


def compile_loss(
    compiler: Compiler, trained: Mapping[str, Any], tasks: Mapping[str, Tasks], key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted KL of the kinds of tasks in a batch; each alone, `kl_recon` and so on, as a metric, float32.

    A mean over each task's tokens, then over the tasks of a kind: long continuations do not drown short answers.
    """
    adapter = _adapter(compiler, trained) if compiler.coupled else None
    return _losses(compiler, *write_slots(compiler, trained), tasks, adapter)


def _losses(
    compiler: Compiler, k: jax.Array, v: jax.Array, tasks: Mapping[str, Tasks], adapter: Slots | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    found = {}
    for kind, some in tasks.items():
        read = some.weight.sum(axis=1)
        each = (read_tasks(compiler, k, v, some, adapter) * some.weight).sum(axis=1) / jnp.maximum(read, 1.0)
        found[f"kl_{kind}"] = each.sum() / jnp.maximum((read > 0).sum(), 1)
    weights = jnp.stack([compiler.weights[kind] for kind in tasks])
    return (weights * jnp.stack(list(found.values()))).sum() / weights.sum(), found


def make_compiler(base: Base, split: Split, config: CompileConfig) -> Compiler:
    """A compilation of a context before its first step: slots begin as embeddings of evenly spaced context tokens."""
    length, tokens = len(split.header), len(split.context)
    if config.layout == "spread" and base.config.window is not None:
        raise InputError("slots cannot be spread where layers see a window only; use the layout compact")
    context = np.pad(np.asarray(split.context, np.int32), (0, -tokens % STEP))
    held = None
    header = read_prefix(base.model, base.params, split.header)
    if config.scope == "buffer":
        whole = read_prefix(base.model, base.params, [*split.header, *split.context]).segment
        own = np.asarray(whole.position) >= length
        held = dataclasses.replace(whole, position=jnp.where(own, whole.position, -1))
    return assemble(base.model, base.params, header.segment, jnp.asarray(context), tokens, held, length, config)


def assemble(
    model: Model,
    params: Params,
    header: Segment,
    context: jax.Array,
    tokens: int,
    held: Segment | None,
    length: int,
    config: CompileConfig,
) -> Compiler:
    """A compilation from what the base has read of a prompt; traceable, for plans of a base that is only described.

    context int32 [n], the first `tokens` of which are the text's; length: tokens of the header; others as in `Compiler`.
    InputError where a sliding window would hide the slots.
    """
    count, slots = (math.ceil(size / config.ratio) for size in (tokens, context.shape[0]))
    read_at, following = places(count, length, tokens, config.layout)
    check_reach(model.config, read_at, following)
    rest = 1 - config.asked_share if config.asks else 1.0
    shares = {"recon": rest * config.recon, "query": rest * (1 - config.recon), "asked": config.asked_share}
    chosen = _filled(((np.arange(count) + 0.5) * tokens / count).astype(np.int32), slots, 0)
    return Compiler(
        params,
        header,
        context,
        held,
        _filled(length + np.arange(tokens), context.shape[0], -1),
        readable(embed(model, params, context[chosen]), mesh_of(params["embed"])),
        _filled(length + tokens + np.arange(count), slots, -1),
        _filled(read_at, slots, -1),
        jnp.int32(following),
        jnp.float32(config.alpha / config.rank),
        {kind: jnp.float32(share) for kind, share in shares.items()},
        jnp.float32(config.slots_rate),
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
    optimizer = OptimizerConfig(learning_rate=config.learning_rate, schedule="linear", warmup=warmup, final=0.02)
    return FitConfig(steps=config.steps, seed=config.seed, log_every=5, eval_every=config.eval_every, optimizer=optimizer)


def compile_context(
    base: Base,
    text: str,
    style: PromptStyle,
    config: CompileConfig = CompileConfig(),
    *,
    seconds: float | None = None,
    general: Tasks | None = None,
    progress: Callable[[str, float, dict[str, float]], None] = lambda stage, share, metrics: None,
) -> Written:
    """Compile `text` into a buffer of the frozen base; the best by the tasks held out, within `seconds` if given.

    general: `tasks.general_tasks` of this base, style and config, for callers that compile several texts.
    progress(stage, share done, metrics) is called as work goes on; stages are those of `distill`. InputError for a text
    that is too short to compile or does not fit the base's window.
    """
    began = time.monotonic()
    progress("questions", 0.0, {})
    split = split_prompts(base.tokenizer, style, text)
    questions, probes = _questions(base, text, style, config)
    progress("teacher", 0.0, {})
    tasks, held = make_tasks(base, split, config, questions, general)
    compiler = make_compiler(base, split, config)
    taught = time.monotonic()
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
        told = {name: float(line[name]) for name in line if name.startswith("kl_")}
        progress("train", step / config.steps, {**told, **best.get("metrics", {})})
        late = seconds is not None and time.monotonic() - began > seconds
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
    metrics = {**best["metrics"], "seconds_teacher": taught - began, "seconds_train": time.monotonic() - taught}
    return Written(buffer, tuple(probes), {**metrics, "slots": float(buffer.slots), "context": float(buffer.context)})


def _questions(base: Base, text: str, style: PromptStyle, config: CompileConfig) -> tuple[list[Question], list[Question]]:
    """(questions to train on, those that gates are calibrated with and nothing is trained on)."""
    if not config.asks:
        return [], probe_questions(base, text, style, config.probes, config.seed)
    wanted = DistillConfig(
        asked=config.asked, turned=config.turned, cloze=config.cloze, continued=0, alike=config.alike, seed=config.seed
    )
    made = make_questions(base, text, style, wanted)
    asked = [question for question in made if question.kind in ("asked", "turned")]
    probes = asked[:: max(1, len(asked) // config.probes)][: config.probes] if config.probes else []
    return [question for question in made if question not in probes], probes


_write = jax.jit(write_slots)


@jax.jit
def _held_out(compiler: Compiler, trained: Any, tasks: Mapping[str, Tasks]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return _losses(compiler, *write_slots(compiler, trained), tasks)


def _batches(tasks: Mapping[str, Tasks], config: CompileConfig) -> Iterator[dict[str, Tasks]]:
    """The tasks of each step: as many of each kind as the config says, reshuffled when they are used up."""
    rng = np.random.default_rng(config.seed)
    counts = {"recon": config.windows, "query": config.queries, "asked": config.asks}
    drawn = {kind: shuffled(len(some.inputs), rng) for kind, some in tasks.items()}
    for _ in range(config.steps):
        yield {kind: some.take(np.array([next(drawn[kind]) for _ in range(counts[kind])])) for kind, some in tasks.items()}
