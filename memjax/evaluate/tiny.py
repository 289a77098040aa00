"""Trains the tiny base on the invented world: copying first, then everything, in growing windows."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from memjax.config import to_dict
from memjax.errors import ConfigError
from memjax.evaluate.grow import start_from
from memjax.evaluate.pretrain import MIXES, example
from memjax.evaluate.pretrain_rows import Encoder, make_encoder
from memjax.evaluate.world import documents, questions
from memjax.evaluate.world.tokenizer import ANSWER, build_tokenizer, chat, tokenizer_config
from memjax.models.config import ModelConfig
from memjax.models.decoder import Model, forward, init_params, make_model, param_shardings, unembed
from memjax.models.weights.export import save_folder
from memjax.sharding import MeshConfig, build_mesh, fetch, put
from memjax.train.checkpoint import start_of
from memjax.train.data import next_token_targets
from memjax.train.fit import FitConfig, Fitted, fit
from memjax.train.optimizer import OptimizerConfig

STRIDE = 4096  # example indices set aside for one step; no step uses as many
_SHORTEST = 24  # tokens: what is left of a row below this is padding
_FULL = 0.55  # a row filled to this share is closed when the next example does not fit
CHECK_ROWS = 48


@dataclasses.dataclass(frozen=True)
class Shape:
    """The Llama-shaped model: layers, widths and heads; `window` is its native context in tokens."""

    layers: int = 6
    width: int = 128
    mlp: int = 320
    heads: int = 6
    kv_heads: int = 3
    head_size: int = 32
    window: int = 512
    rope_theta: float = 10_000.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training: `steps` batches of `rows` x `window` tokens of a mix of tasks (see `pretrain.MIXES`).

    vary: with forms that are changed a little (see `world.vary`).
    """

    mix: str = "full"
    window: int = 512
    rows: int = 8
    steps: int = 1000
    vary: bool = False

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise ConfigError(f"stages: there is no mix {self.mix!r}; give one of {', '.join(MIXES)}")


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """The recipe of the tiny base. `checked` is how many steps lie between two looks at the validation world.

    start: the folder of a trained base to `grow` from, instead of random parameters. mesh: how all devices train it.
    """

    seed: int = 0
    start: str | None = None
    shape: Shape = dataclasses.field(default_factory=Shape)
    stages: tuple[Stage, ...] = (
        Stage("copy", 128, 16, 500),
        Stage("early", 128, 16, 1000),
        Stage("early", 256, 16, 1000),
        Stage("full", 512, 8, 2000),
    )
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            kind="muon", learning_rate=5e-3, schedule="wsd", warmup=50, decay=0.4, final=0.02, beta2=0.98
        )
    )
    log_every: int = 50
    checked: int = 500
    save_every: int = 250
    plot: bool = True
    mesh: MeshConfig | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("stages is empty; give at least one stage of training")
        for i, stage in enumerate(self.stages):
            if stage.window > self.shape.window:
                raise ConfigError(
                    f"stages[{i}].window is {stage.window}, beyond the shape's window of {self.shape.window} tokens"
                )

    @property
    def steps(self) -> int:
        """The steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def hf_config(shape: Shape, vocab_size: int) -> dict[str, Any]:
    """The config.json of a shape, in Hugging Face's terms; the vocabulary is rounded up to a multiple of 32."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": -(-vocab_size // 32) * 32,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.window,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def model_files(shape: Shape) -> dict[str, str]:
    """{file name: text} of config.json and the tokenizer."""
    tokenizer = build_tokenizer()
    config = hf_config(shape, Tokenizer.from_str(tokenizer).get_vocab_size())
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config(shape.window),
    }


def train_tiny(config: TinyConfig, out: str | Path, *, resume: bool = False, progress: bool | None = None) -> Fitted:
    """Trains and leaves in `out`: the Hugging Face folder `base/`, checkpoints/, metrics.jsonl and loss.png.

    The config files of the base stand in `out` as well, which makes a running or stopped run a base of its own.
    """
    out = Path(out)
    files = model_files(config.shape)
    model = make_model(ModelConfig.from_hf(json.loads(files["config.json"])))
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
    encoder = make_encoder(files["tokenizer.json"])
    key = jax.random.key(config.seed)
    start = start_of(config.start, out, resume)
    params = start_from(start, model.config, key) if start else init_params(model.config, key)
    if config.mesh:
        params = put(params, param_shardings(model.config, build_mesh(config.mesh)))
    settings = FitConfig(
        steps=config.steps,
        seed=config.seed,
        optimizer=config.optimizer,
        log_every=config.log_every,
        eval_every=config.checked,
        save_every=config.save_every,
        plot=config.plot,
    )
    loss = jax.tree_util.Partial(functools.partial(base_loss, model))
    fitted = fit(
        loss,
        params,
        lambda step: batch_of(encoder, config, step),
        settings,
        out=out,
        resume=resume,
        evaluate=checks(model, encoder, config.shape.window),
        progress=progress,
        name="tiny base",
        run={"tiny": to_dict(config)},
    )
    trained = fetch(fitted.params)
    if jax.process_index() == 0:
        save_folder(out / "base", model.config, trained, files)
    return fitted


def base_loss(
    model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted next-token cross-entropy in nats of packed rows, and the share of answer tokens that are right.

    batch: tokens, segments, positions int32 [B, T], mask float32 [B, T] (the weight of predicting each token).
    """
    everything = model.config.num_layers
    hidden = forward(
        model, params, batch["tokens"], batch["positions"], visible=batch["segments"], unroll=everything
    ).hidden
    targets, _ = next_token_targets(batch["tokens"], batch["segments"])
    weights = jnp.pad(batch["mask"][:, 1:], ((0, 0), (0, 1)))
    logits = unembed(model, params, hidden)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    answered = weights >= 0.5
    right = ((logits.argmax(-1) == targets) & answered).sum() / jnp.maximum(answered.sum(), 1)
    return (each * weights).sum() / jnp.maximum(weights.sum(), 1e-6), {"answers_right": right}


def batch_of(encoder: Encoder, config: TinyConfig, step: int) -> dict[str, np.ndarray]:
    """The packed rows of a step: tokens, segments, positions int32 [B, T], mask float32 [B, T], and `examples`.

    A pure function of the seed and the step, so that a resumed run sees what the uninterrupted one would have seen.
    """
    stage = stage_at(config, step)
    shape = (stage.rows, stage.window)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions, mask = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    index = step * STRIDE
    for row in range(stage.rows):
        used, count = 0, 0
        while used < stage.window - _SHORTEST:
            ids, weights = example(encoder, config.seed, index, stage.window, MIXES[stage.mix], stage.vary)
            index += 1
            if used + len(ids) > stage.window:
                if used > _FULL * stage.window:
                    break
                ids, weights = ids[: stage.window - used], weights[: stage.window - used]
            at = slice(used, used + len(ids))
            count += 1
            tokens[row, at], mask[row, at], segments[row, at] = ids, weights, count
            positions[row, at] = np.arange(len(ids))
            mask[row, used] = 0.0
            used += len(ids)
    examples = np.arange(step * STRIDE, index)
    return {"tokens": tokens, "segments": segments, "positions": positions, "mask": mask, "examples": examples}


def stage_at(config: TinyConfig, step: int) -> Stage:
    """The stage that a step (0-based) belongs to."""
    for stage in config.stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return config.stages[-1]


def checks(model: Model, encoder: Encoder, window: int) -> Callable[[Any], dict[str, float]]:
    """A function params -> {check: score} on the validation world, teacher-forced, which equals greedy exact match.

    `repeat` is the share of tokens, the others the share of whole answers; documents have 80 and 200 tokens.
    """
    sets = {
        f"{kind}_{size}": _check_set(encoder, kind, size, window)
        for size in (80, 200)
        if 2 * size + 60 <= window
        for kind in ("repeat", "one_hop", "two_hop", "list", "yes_no")
    }

    @jax.jit
    def right(params: Any, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = unembed(model, params, forward(model, params, tokens, positions).hidden[:, :-1])
        hit = (logits.argmax(-1) == tokens[:, 1:]) & mask[:, 1:]
        return hit.sum() / mask.sum(), (hit.sum(1) == mask.sum(1)).mean()

    def scores(params: Any) -> dict[str, float]:
        found = {name: right(params, *arrays) for name, arrays in sets.items()}
        return {name: float(tokens if name.startswith("repeat") else whole) for name, (tokens, whole) in found.items()}

    return scores


def _check_set(encoder: Encoder, kind: str, size: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, positions int32, mask bool of the answer) [rows, T] of questions of a kind on the validation world."""
    length = min(window, 512) if size > 80 else min(window, 512) // 2
    tokens = np.zeros((CHECK_ROWS, length), np.int32)
    positions, mask = np.full(tokens.shape, -1, np.int32), np.zeros(tokens.shape, bool)
    row = 0
    for doc in documents("validation", 7, 8 * CHECK_ROWS, size):
        asked = [("Copy the text word for word.", doc.text)] if kind == "repeat" else []
        asked += [] if asked else [(q.text, q.answer) for q in questions(doc, (kind,), seed=1, limit=1)]
        ids = encoder.tokenizer.encode(chat(doc.text, asked[:1]), add_special_tokens=False).ids if asked else []
        if not ids or len(ids) > length:
            continue
        begin = len(ids) - 1 - ids[::-1].index(encoder.special[ANSWER])
        tokens[row, : len(ids)], positions[row, : len(ids)] = ids, np.arange(len(ids))
        mask[row, begin + 1 : len(ids)] = True
        row += 1
        if row == CHECK_ROWS:
            break
    return tokens[:row], positions[:row], mask[:row]
