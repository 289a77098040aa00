"""Buffers as segments: their keys rotated to where they are read, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import ArtefactError, InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.buffer import Buffer
from memjax.memory.layout import places
from memjax.models.config import ModelConfig
from memjax.models.generate import Prefix
from memjax.models.rope import RopeTable, rope_tables, rotate

Join = Literal["shift", "raw"]


def read_buffer(config: ModelConfig, buffer: Buffer) -> tuple[Segment, int]:
    """(the buffer as a segment that all rows share, position of the first token read after it); see `read_buffers`."""
    return read_buffers(config, [buffer])


def read_buffers(config: ModelConfig, buffers: Sequence[Buffer], join: Join = "shift") -> tuple[Segment, int]:
    """(one segment of several buffers behind one header, position of the first token read after them).

    join: "shift" gives each its own compact places, one after the other; "raw" leaves each in its own layout, on the same
    places as the others. One buffer alone is always in its own layout. ArtefactError where their headers differ;
    InputError where a sliding window would hide slots from the tokens that follow.
    """
    header = buffers[0].header
    if any(buffer.header != header for buffer in buffers):
        raise ArtefactError("buffers of different headers cannot be read together; write them with the same prompt style")
    if join == "shift" and len(buffers) > 1:
        count = sum(buffer.slots for buffer in buffers)
        position, following = places(count, header, count, "compact")
    else:
        each = [places(buffer.slots, header, buffer.context, buffer.layout) for buffer in buffers]
        position, following = np.concatenate([at for at, _ in each]), max(after for _, after in each)
    check_reach(config, position, following)
    k = jnp.concatenate([buffer.k for buffer in buffers], axis=1)
    v = jnp.concatenate([buffer.v for buffer in buffers], axis=1)
    return Segment(rotate_layers(config, k, position)[:, None], v[:, None], jnp.asarray(position)[None]), following


def check_reach(config: ModelConfig, position: np.ndarray, following: int) -> None:
    """InputError where a sliding window would hide slots at `position` [S] from tokens read at `following` and after."""
    reach = following - int(position.min())
    if config.window is not None and reach > config.window // 2:
        raise InputError(
            f"layers of the base see the last {config.window} tokens only, and the slots reach back {reach} of them; "
            "write the buffer with the layout compact or a larger ratio, or use a base without a sliding window"
        )


def buffer_prefix(header: Segment, segment: Segment, following: int) -> Prefix:
    """Header and buffers as one prefix that any number of prompts may continue; see `read_buffers`."""
    k, v = (jnp.concatenate(pair, axis=2) for pair in ((header.k, segment.k), (header.v, segment.v)))
    position = jnp.concatenate([header.position, segment.position], axis=1)
    return Prefix(Segment(k, v, position), jnp.int32(following))


def rotate_layers(config: ModelConfig, k: jax.Array, position: np.ndarray | jax.Array, *, back: bool = False) -> jax.Array:
    """Keys [L, S, K, H] turned to positions [S], each layer by its own table; back: from there to what they were."""
    full, near = rope_tables(config, jnp.asarray(position)[None])
    if back:
        full, near = (RopeTable(table.cos, -table.sin) for table in (full, near))
    turned = rotate(k, full)
    if config.local is None or config.rope_local_theta is None:
        return turned
    local = jnp.asarray(config.local)[:, None, None, None]
    return jnp.where(local, rotate(k, near), turned)
