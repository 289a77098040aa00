"""The training loop: `fit(loss, params, batches, config)`.

A method hands over a loss, an initial tree and data; everything else (steps, metrics, checkpoints, stopping) is here,
once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config import to_dict
from memjax.errors import ConfigError, TrainingError
from memjax.sharding import find_mesh, put, shardings
from memjax.train.data import Stream, open_stream
from memjax.train.metrics import Bar, Recorder, count_tokens, read_metrics
from memjax.train.optimizer import OptimizerConfig
from memjax.train.step import Loss, Plan, State, abstract_state, compile_step, init_state, lower_step, shardings_of

if TYPE_CHECKING:
    from memjax.train.checkpoint import Checkpoints

Evaluate = Callable[[Any], Mapping[str, float]]
OnLog = Callable[[int, Mapping[str, Any]], bool | None]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long and how to train. `save_every` 0 saves at the end only; `eval_every` 0 evaluates at the end only.

    `best` names the metric of `evaluate` by which the best checkpoint is kept beside the last `keep_last`.
    `compute` is the dtype the loss sees the parameters in; they, their gradients and the optimizer state are float32.
    """

    steps: int = 1000
    seed: int = 0
    accumulate: int = 1
    compute: Literal["float32", "bfloat16"] = "float32"
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep_last: int = 2
    best: str | None = None
    best_mode: Literal["min", "max"] = "min"
    writers: tuple[str, ...] = ()
    plot: bool = True

    def __post_init__(self) -> None:
        leasts = {"steps": 1, "accumulate": 1, "log_every": 1, "keep_last": 1, "eval_every": 0, "save_every": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least {least}")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` returns: trained params (float32), steps done in all, and the lines logged by this call.

    `step` is below `config.steps` when `on_log` ended the run or the data ran out. `best` is (step, value) of the best
    evaluation, if `config.best` names one.
    """

    params: Any
    step: int
    history: tuple[dict[str, Any], ...]
    best: tuple[int, float] | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """The last logged line."""
        return self.history[-1] if self.history else {}

    @property
    def scores(self) -> dict[str, Any]:
        """What the evaluation in the last logged line found; empty where there was none."""
        return {key.removeprefix("eval/"): value for key, value in self.metrics.items() if key.startswith("eval/")}

    @property
    def told(self) -> dict[str, Any]:
        """What files of trained networks tell of their run: its step and its scores, as the log calls them."""
        return {"step": self.step, **{f"eval/{name}": value for name, value in self.scores.items()}}


def fit(
    loss: Loss,
    params: Any,
    batches: Any,
    config: FitConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    on_log: OnLog | None = None,
    progress: bool | None = None,
    name: str = "train",
    batch_sharding: jax.sharding.NamedSharding | None = None,
    run: Mapping[str, Any] | None = None,
) -> Fitted:
    """Minimises `loss(params, batch, key) -> (scalar, {name: scalar})` over `config.steps` batches.

    loss: any function, or (better, see `compile_step`) `Partial(function, frozen)` called as `function(frozen, params,
        batch, key)`: frozen arrays stay arguments, and repeated fits with it do not compile again.
    params: tree of floating leaves; copied, so the caller's arrays stay valid. Sharded leaves stay sharded.
    batches: a list of ready batches (cycled), a function `step -> batch`, a Grain dataset (see `data.batched`,
        `data.packed`), or any iterator of batches (which cannot be resumed).
    out: folder for metrics.jsonl, loss.png and checkpoints/; None keeps everything in memory.
    resume: continue from the newest complete checkpoint in `out`, if there is one. Without it, a folder that already
        holds checkpoints is refused.
    evaluate: called with the params every `eval_every` steps and at the end. It must not keep them: the next step
        reuses their memory.
    on_log: called with (step, line) whenever a line is logged; a true result ends the run after saving.
    batch_sharding: how rows of a batch lie on the mesh, where each process hands in its own rows. Without it, each hands
        in the whole batch, which goes where `memjax.sharding` says if params or frozen arrays lie on a mesh.
    run: what else to record with the checkpoints, usually the whole configuration as a dict.

    The key of step s is `fold_in(key(seed), s)`, so a resumed run draws what the uninterrupted one would have drawn.
    The host reads results only every `log_every` steps and when it saves or evaluates. SIGTERM (and Ctrl-C) in a run
    with `out` saves a checkpoint, says so and exits.
    Raises TrainingError when a loss or gradient is not finite: it names the step and the examples of its batch; the
    last good checkpoint is kept and parameters are not updated past it.
    """
    folder = None if out is None else Path(out)
    if config.best and not evaluate:
        raise ConfigError(f"best={config.best!r} names a metric of evaluate, but no evaluate function is given")
    if folder and config.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot=true needs the package matplotlib: pip install matplotlib, or set plot=false")
    plan = plan_of(config)
    mesh = find_mesh(params, loss, batch_sharding)
    state = init_state(params, plan, mesh)
    plan = dataclasses.replace(plan, shardings=shardings_of(state))
    step = compile_step(loss)
    record = {"fit": to_dict(config), **(run or {})}
    primary = jax.process_index() == 0

    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(contextlib.closing(open_stream(batches)))
        saver = None
        if folder:
            saver = stack.enter_context(contextlib.closing(_open_checkpoints(folder, config, stream, resume)))
            state = _resumed(saver, state, stream)
        start = done = int(state.step)
        recorder = None
        if folder and primary:
            recorder = Recorder(folder, step=start, writers=config.writers, run=record)
            stack.enter_context(contextlib.closing(recorder))
        bar = stack.enter_context(Bar(name, config.steps, start=start, show=progress if primary else False))
        signals = stack.enter_context(_Signals(active=saver is not None))
        host = _Host(config, recorder, bar, saver, record, evaluate, on_log)
        # Beside sharded arrays the key must be on every device too, also on those of other processes.
        place_key = jax.jit(jax.random.key, static_argnums=0, out_shardings=state.step.sharding)
        key = place_key(config.seed) if plan.shardings else jax.random.key(config.seed)

        while done < config.steps:
            try:
                batch, examples = next(stream)
            except StopIteration:
                break
            state, metrics = step(state, place(batch, batch_sharding, mesh), key, plan=plan)
            done += 1
            host.add(done, metrics, examples, count_tokens(batch))
            leave = bool(signals.came) or (saver is not None and saver.preempted(done))
            # The first step of a run is logged by itself: it contains the compilation, and people want to see a number.
            if leave or host.due(done) or done == start + 1:
                host.settle(state, done, stream, leave=leave)
                if leave and saver:
                    _exit(signals.came or signal.SIGTERM, done, saver)
                if host.stop:
                    break
        if host.waiting:  # the data ran out
            host.settle(state, done, stream, leave=True)
    if folder and recorder and config.plot:
        from memjax.train.plot import loss_curve

        loss_curve(read_metrics(recorder.path), folder / "loss.png", title=name)
    return Fitted(state.params, done, tuple(host.history), host.best)


def plan_of(config: FitConfig) -> Plan:
    """What is static in the steps of a run."""
    return Plan(config.optimizer, config.steps, config.accumulate, config.compute)


def lower_fit(
    loss: Loss, params: Any, batch: Any, config: FitConfig, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, State]:
    """(the step that `fit` runs, lowered, its state) where everything is described by ShapeDtypeStructs on a mesh.

    loss: a pytree such as `Partial(function, frozen)`. What has no sharding yet lies where `fit` would put it. Nothing is
    made and nothing runs, so the mesh may be one of devices that are only described.
    """
    plan, whole = plan_of(config), jax.NamedSharding(mesh, jax.P())
    described = lambda x, to: x if getattr(x, "sharding", None) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
    state = abstract_state(params, plan, mesh)
    plan = dataclasses.replace(plan, shardings=shardings_of(state))
    loss = jax.tree.map(lambda x: described(x, whole), loss)
    batch = jax.tree.map(described, batch, shardings(batch, "batch", mesh))
    key = described(jax.eval_shape(jax.random.key, 0), whole)
    return lower_step(loss, state, batch, key, plan), state


class _Host:
    """What a run holds on the host between two looks at the device, and what it does when it looks."""

    def __init__(
        self,
        config: FitConfig,
        recorder: Recorder | None,
        bar: Bar,
        saver: Checkpoints | None,
        record: Mapping[str, Any],
        evaluate: Evaluate | None,
        on_log: OnLog | None,
    ) -> None:
        self.config, self.recorder, self.bar = config, recorder, bar
        self.saver, self.record = saver, record
        self.evaluate, self.on_log = evaluate, on_log
        self.waiting: list[tuple[int, dict[str, jax.Array], np.ndarray | None]] = []
        self.tokens = 0
        self.since = time.perf_counter()
        self.compiled = False
        self.history: list[dict[str, Any]] = []
        self.best = saver.best() if saver else None
        self.stop = False

    def add(self, done: int, metrics: dict[str, jax.Array], examples: np.ndarray | None, tokens: int) -> None:
        """Notes a step whose metrics are still being computed."""
        self.waiting.append((done, metrics, examples))
        self.tokens += tokens
        self.bar.advance()

    def due(self, done: int) -> bool:
        """Whether something (a log line, an evaluation, a checkpoint, the end) falls on this step."""
        config = self.config
        every = (config.log_every, config.eval_every, config.save_every)
        return done == config.steps or any(n and done % n == 0 for n in every)

    def settle(self, state: State, done: int, stream: Stream, *, leave: bool) -> None:
        """Reads the waiting metrics, evaluates and saves where due, logs one line. `leave`: the run ends here.

        Raises TrainingError for a bad loss, before anything is saved.
        """
        config = self.config
        line = self._read()
        self.bar.note(line)
        last = done == config.steps
        scored: dict[str, float] = {}
        better = False
        if self.evaluate and (last or (config.eval_every and done % config.eval_every == 0)):
            scores = {k: float(v) for k, v in self.evaluate(state.params).items()}
            line |= {f"eval/{k}": v for k, v in scores.items()}
            better = self._is_better(done, scores)
            scored = {k: v for k, v in scores.items() if k == config.best and math.isfinite(v)}
        line = {"step": done, **line}
        self.history.append(line)
        if self.recorder:
            self.recorder.write(done, {k: v for k, v in line.items() if k != "step"})
        self.stop = bool(self.on_log and self.on_log(done, line))
        timed = config.save_every and done % config.save_every == 0
        if self.saver and (timed or last or leave or better or self.stop):
            self.saver.save(
                done,
                trained=state.params,
                optimizer=state.opt,
                data={"step": done, "stream": stream.get_state() if stream.resumable else None},
                config=self.record,
                metrics=scored,
            )
        self.since = time.perf_counter()  # evaluation and saving do not count against the speed of training

    def _read(self) -> dict[str, Any]:
        """The means of the waiting metrics (the last learning rate), with speed. Waits for the device."""
        steps, found, examples = zip(*self.waiting, strict=True)
        values = jax.device_get(found)
        seconds = time.perf_counter() - self.since
        for step, value, indices in zip(steps, values, examples, strict=True):
            if not (math.isfinite(value["loss"]) and math.isfinite(value["grad_norm"])):
                raise self._bad(step, value, indices)
        line = {k: float(np.mean([v[k] for v in values], dtype=np.float64)) for k in values[0]}
        line["learning_rate"] = float(values[-1]["learning_rate"])
        line["seconds"] = seconds
        if self.compiled:  # the first window of a run is mostly compilation and says nothing about speed
            line["steps_per_second"] = len(values) / max(seconds, 1e-9)
            if self.tokens:
                line["tokens_per_second"] = self.tokens * jax.process_count() / max(seconds, 1e-9)
        self.waiting, self.tokens, self.compiled = [], 0, True
        return line

    def _bad(self, step: int, value: Mapping[str, Any], examples: np.ndarray | None) -> TrainingError:
        what = "loss" if not math.isfinite(value["loss"]) else "gradient norm"
        number = value["loss"] if what == "loss" else value["grad_norm"]
        names = [] if examples is None else np.unique(examples).tolist()
        more = f" and {len(names) - 32} more" if len(names) > 32 else ""
        batch = f" (examples {', '.join(map(str, names[:32]))}{more})" if names else ""
        saved = "nothing was saved"
        if self.saver and self.saver.latest() is not None:
            saved = f"the last good checkpoint is {self.saver.folder / str(self.saver.latest())}"
        return TrainingError(
            f"step {step}: the {what} is {float(number)}{batch}; training stopped and {saved}. "
            "Look at those examples, or lower optimizer.learning_rate"
        )

    def _is_better(self, done: int, scores: Mapping[str, float]) -> bool:
        config = self.config
        if not config.best:
            return False
        if config.best not in scores:
            raise ConfigError(f"best={config.best!r} is not a metric of evaluate; it gives {', '.join(scores)}")
        score = scores[config.best]
        sign = -1 if config.best_mode == "min" else 1
        if not math.isfinite(score) or (self.best and sign * score <= sign * self.best[1]):
            return False
        self.best = (done, score)
        return True


def place(batch: Any, sharding: jax.sharding.NamedSharding | None, mesh: jax.sharding.Mesh | None) -> Any:
    """The batch as the step takes it: its rows on the mesh (see `fit`), or as it is without one.

    Entries without a batch axis are replicated; arrays that are on the mesh already stay there.
    """
    if mesh is None:
        return batch
    if sharding is None:
        lies = lambda x: isinstance(getattr(x, "sharding", None), jax.NamedSharding)
        return jax.tree.map(lambda x, to: x if lies(x) else put(x, to), batch, shardings(batch, "batch", mesh))
    everywhere = jax.NamedSharding(sharding.mesh, jax.P())
    return jax.tree.map(
        lambda x: (
            x
            if isinstance(x, jax.Array)
            else jax.make_array_from_process_local_data(sharding if np.ndim(x) else everywhere, np.asarray(x))
        ),
        batch,
    )


def _open_checkpoints(folder: Path, config: FitConfig, stream: Stream, resume: bool) -> Checkpoints:
    """The run's checkpoints. Raises ConfigError when they could not be resumed or would mix with another run's."""
    # Imported here: Orbax is slow to import and short jobs need none.
    from memjax.train.checkpoint import FOLDER, Checkpoints, latest_complete

    if not stream.resumable and (resume or config.save_every):
        raise ConfigError("a plain iterator of batches cannot be resumed; give a list, a function of the step or a dataset")
    held = latest_complete(folder)
    if held and not resume:
        raise ConfigError(f"{held} is there already; resume (--resume) to continue it, or choose another folder")
    return Checkpoints(folder / FOLDER, keep_last=config.keep_last, best=config.best, best_mode=config.best_mode)


def _resumed(saver: Checkpoints, state: State, stream: Stream) -> State:
    """The state of the newest complete checkpoint, and the stream set to where it was; `state` itself without one."""
    latest = saver.latest()
    if latest is None:
        return state
    params, opt, data, _ = saver.restore(latest, trained=state.params, optimizer=state.opt)
    if data["stream"] is None:
        raise ConfigError(f"{saver.folder / str(latest)} was trained from a plain iterator and cannot be resumed")
    stream.set_state(data["stream"])
    restored = dataclasses.replace(state, step=jnp.int32(data["step"]), params=params, opt=opt)
    # Restored arrays are bound to their device; those that were free to move before are so again. Besides, a resumed
    # run then compiles the very program of a fresh one.
    return jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding) if old.committed else jnp.array(np.asarray(new)),
        restored,
        state,
    )


def _exit(number: int, done: int, saver: Checkpoints) -> None:
    """Waits for the checkpoint, says where it is, and ends the process with the signal's customary status."""
    saver.wait()
    # The one place where this room speaks: the process ends here, and nobody is left to show a return value.
    sys.stderr.write(
        f"memjax: {signal.Signals(number).name} after step {done}; saved {saver.folder / str(done)}; --resume continues\n"
    )
    raise SystemExit(128 + number)


class _Signals:
    """While open, notes SIGTERM and SIGINT instead of dying; a second one acts as it did before."""

    def __init__(self, active: bool) -> None:
        # Python allows handlers in the main thread only. With several processes the runtime watches SIGTERM itself and
        # all of them must agree on the step to save at (`Checkpoints.preempted`).
        main = threading.current_thread() is threading.main_thread()
        self._numbers = (signal.SIGTERM, signal.SIGINT) if active and main and jax.process_count() == 1 else ()
        self._before: dict[int, Any] = {}
        self.came = 0

    def __enter__(self) -> _Signals:
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        self.came = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(self, *_: object) -> None:
        self._restore()
