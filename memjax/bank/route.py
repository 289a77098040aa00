"""Which memory: a small network scores every candidate by what the base itself says of it (arXiv 2605.28889, routing).

A candidate's features are its retrieval score, the lead of the best candidate over it, the entropy of the first answer
token under its adapter and the first 128 components of the hidden state that this token is predicted from. A two-layer
network scores each candidate alone, and the highest score wins. It is trained on held-out synthetic questions, whose
memory is known, and with it who else answers the same; nothing in it names a memory, so memories may come later. Hidden
states are of one base: another base is refused by id.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.errors import BankError, BaseMismatchError, ConfigError
from memjax.models.base import Base
from memjax.train.fit import FitConfig, fit
from memjax.train.optimizer import OptimizerConfig

ROUTER = "router"  # the record of a namespace that holds its router
STATE = 128  # components of the hidden state that are features
PLAIN = 3  # features beside them
_ARRAYS = ("w1", "b1", "w2", "b2", "mean", "deviation")


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a router is trained. What the defaults were chosen by is in configs/router.yaml.

    loss: `softmax` cross-entropy over the candidates (of all right ones together), or `bce` of each alone; none: the
    base's own row is a candidate too, which general prompts teach to win, so that routing and gating are one; blind:
    every example is learnt once more with its retrieval scores made equal, so that the router knows what to do where
    retrieval cannot tell; candidates: memories per question; validation: the share of memories whose questions are not
    trained on, and say when to stop; patience: epochs without a gain.
    """

    width: int = 64
    loss: Literal["softmax", "bce"] = "softmax"
    none: bool = False
    blind: bool = True
    candidates: int = 5
    epochs: int = 40
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    validation: float = 0.2
    patience: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "candidates", "epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if not 0 <= self.validation < 1:
            raise ConfigError(f"validation is {self.validation}; give a share from 0 up to, but not, 1")


class Example(NamedTuple):
    """A question's candidates: features float32 [k, F], best by retrieval first (with `none` the base's row is the last);
    right: bool [k], who answers it rightly; group: which memory it was asked about, or -1 for a general prompt; retrieved:
    whom retrieval alone would choose."""

    features: np.ndarray
    right: np.ndarray
    group: int
    retrieved: int = 0


@dataclasses.dataclass(frozen=True)
class Router:
    """A trained router with its statistics; all arrays float32.

    w1 [F, W], b1 [W], w2 [W], b2 []; mean, deviation [F] of the features it was trained on; none: whether the base's own
    row competes; metrics: of the training run. base_id, template_id: what it is for; bank_version: the namespace's, then.
    """

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    none: bool
    base_id: str
    template_id: str
    bank_version: int
    metrics: Mapping[str, float]

    @property
    def helps(self) -> bool:
        """Whether it found more of the held-out questions' memories than retrieval alone, or gates as well."""
        return self.none or self.metrics["accuracy"] > self.metrics["accuracy_retrieval"]

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """float32 [k] of features [k, F]: on the host, since a few small products are sooner done than dispatched."""
        hidden = (rows - self.mean) / self.deviation @ self.w1 + self.b1
        return _gelu(hidden) @ self.w2 + self.b2

    def check(self, base: Base) -> Router:
        """This router, or BaseMismatchError where it was trained for another base or prompt template."""
        if self.base_id != base.id:
            raise BaseMismatchError(
                f"the router was trained for base {self.base_id[:12]}, not {base.id[:12]}; run memjax train router"
            )
        if self.template_id != base.tokenizer.template_id:
            raise BaseMismatchError("the router was trained with another prompt template; run memjax train router")
        return self


def router_features(scores: Sequence[float], entropies: Sequence[float], hidden: np.ndarray) -> np.ndarray:
    """Features float32 [k, 3 + min(128, D)] of k candidates: [s_i, s_1 - s_i, H_i, the first components of h_i].

    scores: of retrieval, any order; hidden [k, D]: the states after the final norm that the first answer token is
    predicted from (arXiv 2605.28889, routing).
    """
    found = np.asarray(scores, np.float32)
    plain = np.stack([found, found.max() - found, np.asarray(entropies, np.float32)], axis=1)
    return np.concatenate([plain, np.asarray(hidden, np.float32)[:, :STATE]], axis=1)


def none_features(best: float, entropy: float, hidden: np.ndarray) -> np.ndarray:
    """Features float32 [1, F] of no memory: a score of 0, the base's own entropy and hidden state [D]."""
    plain = np.asarray([0.0, best, entropy], np.float32)
    return np.concatenate([plain, np.asarray(hidden, np.float32)[:STATE]])[None]


def _gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU (arXiv 1606.08415), as `jax.nn.gelu` has it."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi).astype(np.float32) * (x + 0.044715 * x**3)))


# -------------------------------------------------------------------------------------------------------------- training


def router_loss(loss: str) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """loss(params, batch, key) for `fit`; batch: x float32 [B, K, F]; right, valid bool [B, K].

    softmax: -log of what all right candidates have together, which is the paper's where there is one of them.
    """

    def value(params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden = jax.nn.gelu(batch["x"] @ params["w1"] + params["b1"], approximate=True)
        scores = jnp.where(batch["valid"], hidden @ params["w2"] + params["b2"], -1e9)
        right = batch["right"]
        accuracy = jnp.take_along_axis(right, scores.argmax(axis=-1)[:, None], axis=-1).mean()
        if loss == "softmax":
            each = -jax.nn.logsumexp(jax.nn.log_softmax(scores, axis=-1), axis=-1, where=right)
            return each.mean(), {"accuracy": accuracy}
        each = jnp.maximum(scores, 0) - scores * right + jnp.log1p(jnp.exp(-jnp.abs(scores)))
        return (each * batch["valid"]).sum() / batch["valid"].sum(), {"accuracy": accuracy}

    return value


def train_router(
    examples: Sequence[Example],
    config: RouterConfig,
    base: Base,
    bank_version: int,
    *,
    out: str | None = None,
    progress: bool | None = None,
) -> Router:
    """The router that best finds right rows; the epoch with the best accuracy on the validation memories is kept.

    Examples are of held-out questions (and general prompts, where `config.none`); who makes them leaves out questions whose
    memory was not among the candidates. out: where `fit` logs and saves. BankError where there are too few.
    """
    train, held = _split(examples, config)
    if len(train) < 4:
        raise BankError(
            f"{len(train)} held-out questions are too few to train a router on; write more memories, each holds some"
        )
    if config.blind:
        train = train + [_without_scores(example) for example in train]
    rows = np.concatenate([e.features for e in train])
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    deviation = np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)
    most = max(len(e.features) for e in examples)
    data, checks = (_pack(part, most, mean, deviation) for part in (train, held or train))
    size = rows.shape[1]
    key = jax.random.key(config.seed)
    first = jax.random.normal(key, (size, config.width), jnp.float32) * size**-0.5
    last = jax.random.normal(jax.random.fold_in(key, 1), (config.width,), jnp.float32) * config.width**-0.5
    params = {"w1": first, "b1": jnp.zeros(config.width), "w2": last, "b2": jnp.zeros(())}
    loss = router_loss(config.loss)
    per_epoch = -(-len(train) // config.batch)
    # Each evaluation is one epoch: how many there were, and what the best of them found.
    seen = 0
    best: dict[str, Any] = {"accuracy": -1.0, "loss": np.inf, "params": None, "epoch": 0}

    def batch(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(train))
        # Every batch has as many rows as the first, so that one program does; the last of an epoch wraps around.
        chosen = np.resize(order, per_epoch * config.batch)[place * config.batch :][: config.batch]
        return {name: array[chosen] for name, array in data.items()}

    measure = jax.jit(loss)

    def evaluate(params: Any) -> dict[str, float]:
        nonlocal seen
        value, metrics = measure(params, checks, key)
        found = {"accuracy": float(metrics["accuracy"]), "loss": float(value)}
        seen += 1
        if (found["accuracy"], -found["loss"]) > (best["accuracy"], -best["loss"]):
            best.update(found, params=jax.device_get(params), epoch=seen)
        return found

    fit(
        loss,
        params,
        batch,
        FitConfig(
            steps=per_epoch * config.epochs,
            seed=config.seed,
            log_every=per_epoch,
            eval_every=per_epoch,
            plot=False,
            optimizer=OptimizerConfig(
                learning_rate=config.learning_rate, weight_decay=config.weight_decay, warmup=per_epoch, final=0.05
            ),
        ),
        evaluate=evaluate,
        on_log=lambda step, line: seen - best["epoch"] >= config.patience,
        out=out,
        progress=progress,
        name="router",
    )
    first_right = float(np.mean([e.right[e.retrieved] for e in held or train]))
    metrics = {
        "questions": float(len(examples)),
        "validation_questions": float(len(held)),
        "accuracy": best["accuracy"],
        "accuracy_retrieval": first_right,
        "epochs": float(best["epoch"]),
    }
    arrays = {name: np.asarray(value, np.float32) for name, value in best["params"].items()}
    return Router(
        **arrays,
        mean=mean,
        deviation=deviation,
        none=config.none,
        base_id=base.id,
        template_id=base.tokenizer.template_id,
        bank_version=bank_version,
        metrics=metrics,
    )


def _split(examples: Sequence[Example], config: RouterConfig) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples, by memory: a router is wanted that does not know the memories."""
    groups = sorted({e.group for e in examples if e.group >= 0})
    drawn = np.random.default_rng(config.seed).permutation(len(groups))
    held = {groups[i] for i in drawn[: int(len(groups) * config.validation)]}
    # General prompts belong to no memory; every fifth or so of them checks.
    step = round(1 / config.validation) if config.validation else 0
    general = [e for e in examples if e.group < 0]
    checks = general[::step] if step else []
    trained = [e for e in examples if e.group >= 0 and e.group not in held]
    trained += [e for i, e in enumerate(general) if not step or i % step]
    return trained, [e for e in examples if e.group in held] + checks


def _without_scores(example: Example) -> Example:
    """The same, but retrieval thinks as much of every candidate as, on the whole, of all."""
    features = example.features.copy()
    features[:, 0], features[:, 1] = features[:, 0].mean(), 0.0
    return example._replace(features=features)


def _pack(examples: Sequence[Example], most: int, mean: np.ndarray, deviation: np.ndarray) -> dict[str, np.ndarray]:
    """{x [n, K, F] z-scored, right [n, K], valid [n, K]} of examples, padded to `most` candidates."""
    x = np.zeros((len(examples), most, len(mean)), np.float32)
    right, valid = np.zeros((2, len(examples), most), bool)
    for i, example in enumerate(examples):
        k = len(example.features)
        x[i, :k], right[i, :k], valid[i, :k] = (example.features - mean) / deviation, example.right, True
    return {"x": x, "right": right, "valid": valid}


# --------------------------------------------------------------------------------------------------------------- keeping


def keep_router(bank: Bank, router: Router, namespace: str = DEFAULT_NAMESPACE) -> None:
    """Make this the namespace's router. It is marked stale with the first memory that is deleted."""
    value = {f.name: getattr(router, f.name) for f in dataclasses.fields(router) if f.name not in _ARRAYS}
    value["metrics"] = dict(router.metrics)
    arrays = {name: np.ascontiguousarray(getattr(router, name), "<f4") for name in _ARRAYS}
    value["arrays"] = {
        name: {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}
        for name, array in arrays.items()
    }
    bank.set_record(ROUTER, value, namespace)


def read_router(base: Base, bank: Bank, namespace: str = DEFAULT_NAMESPACE) -> Router | None:
    """The namespace's router; None where there is none, or where a memory that it has seen was deleted since.

    BaseMismatchError where it is for another base or template, BankError where the record is not a router.
    """
    record = bank.record(ROUTER, namespace)
    if record is None or record.stale:
        return None
    try:
        value = dict(record.value)
        arrays: dict[str, Any] = {
            name: np.frombuffer(base64.b64decode(held["float32"]), "<f4").reshape(held["shape"])
            for name, held in value.pop("arrays").items()
        }
        router = Router(**arrays, **value)
    except (KeyError, TypeError, ValueError):
        raise BankError(f"the router of bank {bank.path} cannot be read; run memjax train router again") from None
    return router.check(base)
