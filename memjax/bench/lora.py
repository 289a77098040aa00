"""Decode steps with another adapter in every row, against the base alone, by how many adapters are resident."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bench.decode import random_cache, stepper
from memjax.bench.timing import SMOLLM2_SHAPE, in_turn, ratio
from memjax.memory.adapter import Slots, make_slots
from memjax.models.config import ModelConfig
from memjax.models.decoder import init_params, make_model, site_shapes


def adapters(
    config: ModelConfig = SMOLLM2_SHAPE,
    rows: int = 8,
    resident: int = 1024,
    rank: int = 8,
    held: int = 128,
    times: int = 15,
) -> dict[str, float]:
    """{adapters_8_of_1024_ratio, adapters_8_of_8_ratio, adapters_1024_over_8_ratio, …} for the default sizes.

    One token per row over `held` tokens of cache; every row has an adapter of its own, bfloat16, at all sites, spread over
    the resident ones. The ratios are seconds over those of the base with the same rows; the last one of many resident over
    as many as there are rows.
    """
    model, params = make_model(config), init_params(config, jax.random.key(0))
    key = jax.random.key(1)
    token, position = jnp.arange(rows, dtype=jnp.int32) + 5, jnp.full((rows,), held, jnp.int32)
    many, few = _filled(config, resident, rank), _filled(config, rows, rank)
    spread = jnp.asarray(np.linspace(1, resident, rows).astype(np.int32))
    given = {
        "base": ((), None, None),
        "many": ((), many, spread),
        "few": ((), few, jnp.arange(1, rows + 1, dtype=jnp.int32)),
    }
    cache = lambda: random_cache(config, rows, held + 64, held, key)
    seconds = in_turn(
        {name: stepper(model, params, cache(), token, position, *told) for name, told in given.items()}, times
    )
    return {
        f"adapters_{rows}_of_{resident}_ratio": ratio(seconds["many"], seconds["base"]),
        f"adapters_{rows}_of_{rows}_ratio": ratio(seconds["few"], seconds["base"]),
        f"adapters_{resident}_over_{rows}_ratio": ratio(seconds["many"], seconds["few"]),
        **{f"adapters_seconds/{name}": float(np.median(value)) for name, value in seconds.items()},
    }


def _filled(config: ModelConfig, resident: int, rank: int) -> Slots:
    """Slots of adapters, bfloat16, each another multiple of one random adapter; slot 0 is the base."""
    slots = make_slots(site_shapes(config), config.num_layers, resident + 1, rank, jnp.bfloat16)
    share = jnp.arange(resident + 1, dtype=jnp.bfloat16)[:, None, None] / (100 * resident)
    draw = jax.jit(lambda x, key: x + share * jax.random.normal(key, (len(x), 1, *x.shape[2:]), x.dtype), donate_argnums=0)
    keys = iter(jax.random.split(jax.random.key(2), 2 * len(slots.a)))
    fill = lambda tree: {site: draw(x, next(keys)) for site, x in tree.items()}
    return Slots(fill(slots.a), fill(slots.b), jnp.ones((resident + 1,), jnp.float32).at[0].set(0))
