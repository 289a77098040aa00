"""Rotary position embedding (RoFormer, arXiv 2104.09864), with the frequency scalings that the families use."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.models.config import ModelConfig, RopeScaling


class RopeTable(NamedTuple):
    """cos, sin [B, T, H/2] float32 of a batch of positions."""

    cos: jax.Array
    sin: jax.Array


def frequencies(theta: float, head_size: int, scaling: RopeScaling | None) -> np.ndarray:
    """Rotations per token [H/2] float32; `llama3` keeps short wavelengths and stretches long ones (Llama 3.1 release)."""
    base = 1.0 / theta ** (np.arange(0, head_size, 2, dtype=np.float32) / head_size)
    if scaling is None:
        return base
    if scaling.kind == "linear":
        return base / np.float32(scaling.factor)
    wavelength = 2 * math.pi / base
    original = scaling.original_max_positions
    long, short = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    smooth = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - smooth) * base / scaling.factor + smooth * base
    out = np.where(wavelength > long, base / scaling.factor, np.where(wavelength < short, base, blended))
    return out.astype(np.float32)


def table(freqs: np.ndarray, positions: jax.Array) -> RopeTable:
    """cos and sin of every position; padding (-1) is turned as position 0, which nothing reads."""
    angle = jnp.maximum(positions, 0).astype(jnp.float32)[..., None] * jnp.asarray(freqs)
    return RopeTable(jnp.cos(angle), jnp.sin(angle))


def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[RopeTable, RopeTable]:
    """(table of full layers, table of local layers); the two are one where the family has a single theta."""
    full = table(frequencies(config.rope_theta, config.head_size, config.rope_scaling), positions)
    if config.rope_local_theta is None:
        return full, full
    return full, table(frequencies(config.rope_local_theta, config.head_size, None), positions)


def rotate(x: jax.Array, rope: RopeTable) -> jax.Array:
    """x [B, T, heads, H] turned by its positions; halves are paired as in the Hugging Face layout. Same dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[:, :, None], rope.sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
