"""Decode and short-block attention over one segment on TPU: keys and values are read once, where any query sees them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memjax.kernels.choose import LONGEST
from memjax.kernels.segment_attention.block_sizes import BlockSizes, Shape, block_sizes, bytes_moved, queries
from memjax.kernels.vmem import LANES, SUBLANES

SHORTEST = 16  # keys of a segment; fewer cost less in XLA than the start of a kernel
UNSEEN = -1e30


def attend_segment(
    q: jax.Array,
    q_position: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    mask: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: jax.Array | int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H], lse [B, T, N]), both float32, of attention over one segment (online softmax, arXiv 2205.14135).

    q [B, T, N, H] rotated; k, v [Bk, S, K, H], or [L, Bk, S, K, H] with `layer` int32 [], which is then read in place;
    position [Bp, S] and mask [B, T, S] as in `api.Segment`. Where Bk is 1, all rows of a block read the segment together.
    Blocks of keys that no query of a row sees (empty places, beyond the window) are neither transferred nor computed.
    Where rows of a shared segment have positions or masks of their own, these are read per query: 4 bytes per score.
    NotImplementedError, with the reason, for what XLA should do.
    """
    batch, length, heads, size = q.shape
    if layer is None:
        k, v, layer = k[None], v[None], jnp.int32(0)
    held, groups = k.shape[2:4]
    if length > LONGEST:
        raise NotImplementedError(f"{length} query tokens of a row are more than {LONGEST}: arithmetic binds, not memory")
    if position.ndim != 2:
        raise NotImplementedError("every key/value head has positions of its own; the kernel knows one per token")
    if held < SHORTEST:
        raise NotImplementedError(f"a segment of {held} keys is shorter than {SHORTEST}: a kernel costs more than XLA")
    if q.dtype not in (jnp.float32, jnp.bfloat16) or k.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"queries of {q.dtype} over keys of {k.dtype}; the kernel knows float32 and bfloat16")
    if size % LANES or (groups & (groups - 1) and groups % (2 * SUBLANES)):
        raise NotImplementedError(
            f"{groups} key/value heads of {size}: tiles of 8 x {LANES} would be padded and the whole segment copied; "
            f"the kernel takes heads of a multiple of {LANES}, as many as a power of two or a multiple of {2 * SUBLANES}"
        )
    shared = k.shape[1] == 1 and batch > 1
    per_query = mask is not None or (shared and position.shape[0] > 1)
    shape = Shape(batch, length, heads, groups, held, size, q.dtype, k.dtype, shared, per_query)
    blocks = block_sizes(shape)
    count, parts = queries(shape, blocks), batch // blocks.rows
    fold = lambda x: x.reshape(parts, count, *x.shape[3:])  # of [B, T, N / K, ...]
    rows = (q * scale).reshape(parts, blocks.rows * length, groups, heads // groups, size)
    rows = rows.transpose(0, 2, 1, 3, 4).reshape(parts, groups, count, size)
    at = fold(jnp.broadcast_to(q_position[..., None], (batch, length, heads // groups)))
    place = position[:, None, :]
    if per_query:
        place = jnp.broadcast_to(place, (batch, length, held))
        place = place if mask is None else jnp.where(mask, place, -1)
        place = fold(jnp.broadcast_to(place[:, :, None], (batch, length, heads // groups, held)))
    reach = jnp.int32(jnp.iinfo(jnp.int32).max if window is None else window)
    fetch = _blocks_to_read(at, place, reach, blocks.tokens)
    out, lse = _call(rows, at, k, v, place, layer, reach, fetch, shape, blocks, softcap, interpret)
    out = out.reshape(parts, groups, blocks.rows * length, heads // groups, size).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(parts, groups, blocks.rows * length, heads // groups).transpose(0, 2, 1, 3)
    return out.reshape(batch, length, heads, size), lse.reshape(batch, length, heads)


def _blocks_to_read(at: jax.Array, place: jax.Array, reach: jax.Array, tokens: int) -> jax.Array:
    """int32 [parts, blocks]: the block itself where a query sees part of it, else one that is in memory anyway.

    at [parts, Q]; place [1 or parts, 1 or Q, S]. A block that is named twice running is transferred once.
    """
    place = jnp.pad(place, ((0, 0), (0, 0), (0, -place.shape[-1] % tokens)), constant_values=-1)
    latest = at.max(axis=1)[:, None, None]
    earliest = jnp.where(at >= 0, at, jnp.iinfo(jnp.int32).max).min(axis=1)[:, None, None]
    seen = (place >= 0) & (place <= latest) & (earliest - place < reach)
    seen = seen.any(axis=1).reshape(at.shape[0], -1, tokens).any(axis=-1)
    index = jnp.arange(seen.shape[1], dtype=jnp.int32)
    before = jax.lax.cummax(jnp.where(seen, index, -1), axis=1)
    return jnp.where(before >= 0, before, jnp.argmax(seen, axis=1)[:, None].astype(jnp.int32))


def _call(
    rows: jax.Array,
    at: jax.Array,
    k: jax.Array,
    v: jax.Array,
    place: jax.Array,
    layer: jax.Array,
    reach: jax.Array,
    fetch: jax.Array,
    shape: Shape,
    blocks: BlockSizes,
    softcap: float | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """(out [parts, K, Q, H], lse [parts, K, Q]) float32 of rows [parts, K, Q, H]."""
    parts, groups, count, size = rows.shape
    steps, held = fetch.shape[1], k.shape[2]
    # A head alone (a mesh may leave one to a device) is taken out: as a dimension of tiles it would be padded, by a copy.
    alone = groups == 1
    k, v = (x[..., 0, :] if alone else x for x in (k, v))
    # Index maps: (part, block, then the prefetched scalars).
    whole = lambda p, s, *_: (p, 0, 0, 0)

    def keys(chunk: int, p: Any, s: Any, layer: Any, reach: Any, fetch: Any) -> tuple[Any, ...]:
        at = layer[0], 0 if shape.shared else p, fetch[p * steps + s]
        return (*at, chunk) if alone else (*at, 0, chunk)

    places = lambda p, s, layer, reach, fetch: (p if place.shape[0] > 1 else 0, 0, fetch[p * steps + s])
    # Heads wider than a vector register come as several operands, one per 128 lanes: only such rows can be read with a
    # stride (see `_head`).
    chunks = size // LANES
    block = (None, None, blocks.tokens, *(() if alone else (groups,)), size // chunks)
    lanes = [pl.BlockSpec(block, partial(keys, chunk)) for chunk in range(chunks)]
    scores = parts * groups * count * held
    return pl.pallas_call(
        partial(_kernel, chunks=chunks, steps=steps, held=held, tokens=blocks.tokens, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(parts, steps),
            in_specs=[
                pl.BlockSpec((None, count, 1), lambda p, s, *_: (p, 0, 0)),
                pl.BlockSpec((None, place.shape[1], blocks.tokens), places),
                pl.BlockSpec((None, groups, count, size), whole),
                *lanes,
                *lanes,
            ],
            out_specs=[
                pl.BlockSpec((None, groups, count, size), whole),
                pl.BlockSpec((None, groups, count), lambda p, s, *_: (p, 0, 0)),
            ],
            scratch_shapes=[pltpu.VMEM((groups, count, 1), jnp.float32)] * 2,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((parts, groups, count, size), jnp.float32),
            jax.ShapeDtypeStruct((parts, groups, count), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * size,
            transcendentals=scores,
            bytes_accessed=bytes_moved(shape, blocks),
        ),
        interpret=interpret,
        name="segment_attention",
    )(layer.reshape(1), reach.reshape(1), fetch.reshape(-1), at[..., None], place, rows, *[k] * chunks, *[v] * chunks)


def _kernel(
    layer_ref: Any, reach_ref: Any, fetch_ref: Any, at_ref: Any, place_ref: Any, q_ref: Any, *refs: Any,
    chunks: int, steps: int, held: int, tokens: int, softcap: float | None,
) -> None:  # fmt: skip
    """One block of keys against one block of queries, head by head; `out_ref` holds the sum until the last block."""
    k_refs, v_refs, (out_ref, lse_ref, top_ref, total_ref) = refs[:chunks], refs[chunks : 2 * chunks], refs[2 * chunks :]
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(fetch_ref[pl.program_id(0) * steps + step] == step)
    def _() -> None:
        ahead = at_ref[...] - place_ref[...]
        seen = (place_ref[...] >= 0) & (ahead >= 0) & (ahead < reach_ref[0])
        left = held - step * tokens
        if held % tokens:  # the last block reaches past the end, where anything may lie
            seen &= jax.lax.broadcasted_iota(jnp.int32, (1, tokens), 1) < left
        for group in range(q_ref.shape[0]):
            q = q_ref[group]
            k, v = _head(k_refs, group).astype(q.dtype), _head(v_refs, group).astype(q.dtype)
            if held % tokens:
                v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (tokens, 1), 0) < left, v, jnp.zeros_like(v))
            exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
            dot = partial(jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
            logits = dot(q, k, (((1,), (1,)), ((), ())))
            if softcap is not None:
                logits = softcap * jnp.tanh(logits / softcap)
            logits = jnp.where(seen, logits, UNSEEN)
            top = jnp.maximum(top_ref[group], logits.max(axis=1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(logits - top), 0.0)
            kept = jnp.exp(top_ref[group] - top)
            total_ref[group] = kept * total_ref[group] + weights.sum(axis=1, keepdims=True)
            out_ref[group] = kept * out_ref[group] + dot(weights.astype(q.dtype), v, (((1,), (0,)), ((), ())))
            top_ref[group] = top

    @pl.when(step == steps - 1)
    def _() -> None:
        for group in range(q_ref.shape[0]):
            total = total_ref[group]
            some = total > 0
            safe = jnp.where(some, total, 1.0)
            out_ref[group] = out_ref[group] / safe
            lse_ref[group] = jnp.where(some, top_ref[group] + jnp.log(safe), -jnp.inf)[:, 0]


def _head(refs: Sequence[Any], group: int) -> jax.Array:
    """[tokens, H]: one head's rows of a block whose refs [tokens, K, 128], or [tokens, 128] of one head, lie side by side.

    16-bit heads lie in pairs, two to a word of 32 bits: words are picked and split, since picking every K-th row out of
    packed pairs takes several times the instructions.
    """
    return jnp.concatenate([_chunk(ref, group) for ref in refs], axis=1) if len(refs) > 1 else _chunk(refs[0], group)


def _chunk(ref: Any, group: int) -> jax.Array:
    if len(ref.shape) == 2:
        return ref[...]
    tokens, groups, size = ref.shape
    words = ref.reshape(tokens * groups, size)
    if ref.dtype == jnp.float32:
        return words[pl.ds(group, tokens, groups), :]
    pair = words.bitcast(jnp.uint32)[pl.ds(group // 2, tokens, groups // 2), :]
    half = pair & jnp.uint32(0xFFFF0000) if group % 2 else pair << 16
    return jax.lax.bitcast_convert_type(half, jnp.float32).astype(jnp.bfloat16)
