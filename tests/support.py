"""Small things that several test files need: a random base with a real tokenizer, and a random adapter."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import memjax.models
from memjax.memory.adapter import Adapter, init_adapter
from memjax.models.base import Base
from memjax.models.config import ModelConfig
from memjax.models.decoder import Model, forward, init_params, make_model, site_shapes
from memjax.models.tokenizer import Tokenizer

# The reader as one program: called as it is, each of its operations is compiled by itself, anew for each length.
read = jax.jit(forward, static_argnums=0, static_argnames=("taps", "tap_last", "layers", "remat", "unroll"))
_init_params = jax.jit(init_params, static_argnums=0)
TOKENIZER = Path(memjax.models.__file__).parent / "tiny"


def small_config(**changes: object) -> ModelConfig:
    """A Llama of three layers with grouped heads."""
    fields: dict[str, object] = {
        "family": "llama",
        "vocab_size": 97,
        "num_layers": 3,
        "width": 32,
        "mlp_width": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "max_positions": 512,
        "query_scale": 8**-0.5,
    }
    return ModelConfig(**{**fields, **changes})


def small_base(seed: int = 0, **changes: object) -> Base:
    """A random base of that shape, with the tokenizer of the shipped tiny base."""
    tokenizer = Tokenizer.from_folder(TOKENIZER)
    config = small_config(vocab_size=max(tokenizer.vocab_size, 1472), **changes)
    model = make_model(config)
    params = random_params(config, seed)
    return Base(config, model.graphdef, params, tokenizer, f"{seed:064x}", f"small-{seed}")


def read_alone(model: Model, params: dict, tokens: list[int], **more: object) -> jax.Array:
    """Hidden states [T, D] of one sequence that sees nothing but itself; lengths up to a multiple of 64 share a program."""
    padded = -len(tokens) % 64
    ids = np.asarray([[*tokens, *[0] * padded]], np.int32)
    positions = np.asarray([[*range(len(tokens)), *[-1] * padded]], np.int32)
    return read(model, params, ids, positions, **more).hidden[0, : len(tokens)]


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Parameters larger than a usual init, so that different prompts give clearly different logits."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * 3), _init_params(config, jax.random.key(seed)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_adapter(config: ModelConfig, rank: int, key: jax.Array) -> Adapter:
    return init_adapter(site_shapes(config), config.num_layers, rank, 1.0, key)


def random_adapter(config: ModelConfig, seed: int, rank: int = 4, size: float = 0.3) -> Adapter:
    """An adapter that changes something: both factors random."""
    adapter = _init_adapter(config, rank, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    b = {s: jnp.asarray(size * rng.normal(size=x.shape), jnp.float32) for s, x in adapter.b.items()}
    return Adapter(adapter.a, b, adapter.scale)
