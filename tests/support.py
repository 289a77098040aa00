"""Small things that several test files need: a random base with a real tokenizer, and a random adapter."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import memjax.models
from memjax.memory.adapter import Adapter, init_adapter
from memjax.models.base import Base
from memjax.models.config import ModelConfig
from memjax.models.decoder import init_params, make_model, site_shapes
from memjax.models.tokenizer import Tokenizer

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
    # Larger than a usual init, so that different prompts give clearly different logits.
    params = jax.tree.map(lambda x: x * 3, init_params(config, jax.random.key(seed)))
    return Base(config, model.graphdef, params, tokenizer, f"{seed:064x}", f"small-{seed}")


def random_adapter(config: ModelConfig, seed: int, rank: int = 4, size: float = 0.3) -> Adapter:
    """An adapter that changes something: both factors random."""
    adapter = init_adapter(site_shapes(config), config.num_layers, rank, 1.0, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    b = {s: jnp.asarray(size * rng.normal(size=x.shape), jnp.float32) for s, x in adapter.b.items()}
    return Adapter(adapter.a, b, adapter.scale)
