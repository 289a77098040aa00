"""A small hypernetwork of a small random base, with every parameter moved away from its start."""

import functools

import jax
import numpy as np

from memjax.models.config import ModelConfig
from memjax.models.decoder import forward, unembed
from memjax.write.hypernet.chunks import affixes_of, document_tokens, split_evenly
from memjax.write.hypernet.encode import Hyper
from memjax.write.hypernet.network import HyperConfig, abstract_hyper
from memjax.write.prompts import prompt_style
from tests.support import small_base

BASE = small_base(max_positions=256)
STYLE = prompt_style("plain")
SHAPE = {"rank": 2, "latents": 3, "width": 16, "heads": 4, "kv_heads": 2, "head_size": 8}
CONFIG = HyperConfig(("up", "down"), blocks=2, **SHAPE)
EARLY = HyperConfig(blocks=1, features="early", depth=1, **SHAPE)
AFFIXES = affixes_of(BASE.tokenizer, STYLE)
# Shapes of the papers' other bases; gemma's is among configs/bases.
MISTRAL = ModelConfig("mistral", 32000, 32, 4096, 14336, 32, 8, 128, 32768)
QWEN = ModelConfig("qwen3", 151936, 36, 2560, 9728, 32, 8, 128, 40960)
TEXT = "Tavin lives in Orvale. The harp of Halvic is old. Mira keeps the oven."


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, places, slots, ids, on):
    out = forward(model, params, tokens, places, slots=slots, slot_ids=ids, adapter_mask=on)
    return unembed(model, params, out.hidden)


@functools.cache
def moved(config, seed=0):
    """Parameters of which none is zero, as training makes them of fresh ones."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        size = 0.05 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
        return np.float32(path[-1].key.endswith(("norm", "a_scale")) + size * rng.normal(size=leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, abstract_hyper(config, BASE.config))


def fresh(config):
    """Parameters that change nothing, as at the start."""
    params = jax.tree.map(np.copy, moved(config))
    for site in params["sites"].values():
        site["b_scale"], site["b_bias"] = np.zeros_like(site["b_scale"]), np.zeros_like(site["b_bias"])
    return params


def hyper(config=CONFIG, params=None):
    return Hyper(config, moved(config) if params is None else params, AFFIXES, 200, BASE.id)


def chunks_of(text=TEXT, count=2, overlap=0):
    return split_evenly(document_tokens(BASE.tokenizer, STYLE, text), AFFIXES, count, overlap)


def logits(slots=None, ids=None, base=BASE, params=None, rows=((1, 5, 905, 1099, 6), (1, 5, 38, 885, 6)), on=None):
    """Logits [B, T, V] of a few prompts, with the adapter on where `on` [B, T] says, or everywhere."""
    tokens = np.asarray(rows, np.int32)
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    params = base.params if params is None else params
    return np.asarray(_logits(base.model, params, tokens, places, slots, ids, on))
