"""A document's tokens become an adapter: chunks, their activations, the hypernetwork, and the sum of what it emits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import BaseMismatchError
from memjax.memory.adapter import Adapter, Slots
from memjax.models.base import Base
from memjax.models.decoder import Model, Params, forward, rms_norm
from memjax.models.generate import batch_bucket, bucket, pad_prompts
from memjax.write.hypernet.chunks import Affixes, split_tokens
from memjax.write.hypernet.network import HyperConfig, chunk_factors

CHUNKS = 8  # that are read at once
Weigh = Literal["sum", "root", "mean", "level"]


@dataclasses.dataclass(frozen=True)
class Hyper:
    """A hypernetwork for one base: its shape, parameters, what wraps every chunk, and tokens of the longest chunk.

    id: of the bytes it was read from; empty while it is being trained.
    """

    config: HyperConfig
    params: Params
    affixes: Affixes
    max_chunk: int
    base_id: str
    id: str = ""


def context_features(
    config: HyperConfig, model: Model, params: Params, ids: jax.Array, positions: jax.Array, owner: jax.Array | None = None
) -> jax.Array:
    """What the hypernetwork reads of tokens [B, N]: [L, B, N, D] or, where features are early, [B, N, D]; no gradient.

    Layer l is given what enters block l of the frozen base: the (scaled) embedding, then outputs of blocks. The last entry
    is the output of the block before the last *after the final norm*, and the others are raw, for that is what a library
    returns when the last block is cut off; the early state is normed likewise. owner: segment ids of packed rows.
    """
    names = ("x",) if config.features == "layers" else ()
    out = forward(model, params, ids, positions, visible=owner, taps=names, layers=config.read_layers(model.config))
    whole = config.read_layers(model.config) == model.config.num_layers  # then `forward` has normed it
    last = out.hidden if whole else rms_norm(out.hidden, params["final_norm"], model.config)
    if config.features == "early":
        return jax.lax.stop_gradient(last)
    return jax.lax.stop_gradient(jnp.concatenate([out.taps["x"], last[None]]))


def combine(
    config: HyperConfig,
    params: Params,
    factors: tuple[dict[str, jax.Array], dict[str, jax.Array]],
    index: jax.Array,
    weights: jax.Array | None = None,
    bias: float | jax.Array = 1.0,
) -> Slots:
    """The adapters of G documents: their chunks' rows and the bias rows, once per document, side by side along the rank.

    factors a, b {site: [L, C, R, ...]} of `chunk_factors`; index int32 [G, K]: the chunks of each document, -1 for none,
    whose rows are zero; weights [G, K] of chunks and `bias` of the bias rows multiply A alone. The rank is (K + 1) R, and
    the update a plain sum, so that the order of the chunks means nothing (arXiv 2602.15902, section 3).
    """
    held = (index >= 0).astype(jnp.float32)
    at = jnp.maximum(index, 0)

    def joined(made: jax.Array, own: jax.Array, share: jax.Array, own_share: float | jax.Array) -> jax.Array:
        rows = made[:, at] * share[None, :, :, None, None]  # [L, G, K, R, I]
        rows = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
        own = jnp.broadcast_to((own * own_share)[:, None], (own.shape[0], rows.shape[1], *own.shape[1:]))
        return jnp.concatenate([rows, own], axis=2)

    a_share = held if weights is None else held * weights
    a = {site: joined(factors[0][site], params["sites"][site]["a_bias"], a_share, bias) for site in config.names}
    b = {site: joined(factors[1][site], params["sites"][site]["b_bias"], held, 1.0) for site in config.names}
    return Slots(a, b, jnp.full((index.shape[0],), config.scale, jnp.float32))


def chunk_weights(count: int, weigh: Weigh = "sum") -> np.ndarray:
    """The weight of each of `count` chunks: 1 (the paper; "level" has weights of its own), 1 / sqrt(count) or 1 / count."""
    return np.full(count, {"sum": 1.0, "level": 1.0, "root": count**-0.5, "mean": 1.0 / count}[weigh], np.float32)


def levelled(a: jax.Array, b: jax.Array, rank: int) -> jax.Array:
    """a with the sum of its chunks' updates, in each layer, brought to the root mean square of their own norms.

    a [L, K R, I], b [L, K R, F] of K chunks of R rows. Chunks alike add up to K times one of them, chunks unlike to sqrt(K)
    times: whichever it is, the document's update is as large as one chunk's, for which the network was trained. The
    updates [F, I] are never formed: their inner products are those of rows of a times those of rows of b.
    """
    product = jnp.einsum("lri,lsi->lrs", a, a) * jnp.einsum("lri,lsi->lrs", b, b)
    layers, rows = product.shape[:2]
    blocks = product.reshape(layers, rows // rank, rank, rows // rank, rank).sum(axis=(2, 4))  # [L, K, K]
    alone = jnp.trace(blocks, axis1=1, axis2=2) * rank / rows
    together = blocks.sum(axis=(1, 2))
    return a * jnp.sqrt(jnp.where(together > 0, alone / jnp.maximum(together, 1e-30), 1.0))[:, None, None]


def encode(
    base: Base,
    hyper: Hyper,
    tokens: Sequence[int],
    *,
    max_chunk: int | None = None,
    overlap: int = 0,
    weigh: Weigh = "sum",
    iterative: bool = False,
) -> Adapter:
    """The adapter of a document, of rank (K + 1) R for K chunks; float32.

    tokens: the document wrapped in the base's template (`chunks.document_tokens`), of any length: cut into chunks of up to
    `max_chunk` tokens, of which neighbours share `overlap`. BaseMismatchError where the hypernetwork is another base's,
    InputError where chunks do not fit the base's window.
    """
    return encode_chunks(
        base,
        hyper,
        split_tokens(tokens, hyper.affixes, max_chunk or hyper.max_chunk, overlap, base.config.max_positions),
        weigh=weigh,
        iterative=iterative,
    )


def encode_chunks(
    base: Base, hyper: Hyper, chunks: Sequence[Sequence[int]], *, weigh: Weigh = "sum", iterative: bool = False
) -> Adapter:
    """The adapter of chunks that are wrapped already; see `encode`. CHUNKS of them are read at once."""
    if hyper.base_id != base.id:
        raise BaseMismatchError(
            f"the hypernetwork was trained for base {hyper.base_id}, not for {base.id} ({base.name}); use its own base"
        )
    length = bucket(max(map(len, chunks)))
    parts = []
    for begin in range(0, len(chunks), CHUNKS):
        part = chunks[begin : begin + CHUNKS]
        ids, positions = pad_prompts(part, batch_bucket(len(part)), length)
        made = read_chunks(base.model, hyper.config, base.params, hyper.params, ids, positions, iterative=iterative)
        parts.append(made)  # the rows of a part that is not full come last, and no index names them
    factors = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    index = np.arange(len(chunks), dtype=np.int32)[None]
    slots = _combine(hyper.config, hyper.params, factors, index, chunk_weights(len(chunks), weigh)[None])
    first = lambda tree: {site: x[:, 0] for site, x in tree.items()}
    a, b = first(slots.a), first(slots.b)
    if weigh == "level" and len(chunks) > 1:
        rank = hyper.config.rank
        rows = len(chunks) * rank  # behind them lie the bias rows, which count once whatever the number of chunks
        a = {s: jnp.concatenate([levelled(x[:, :rows], b[s][:, :rows], rank), x[:, rows:]], axis=1) for s, x in a.items()}
    return Adapter(a, b, slots.scale[0])


_combine = jax.jit(combine, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 1), static_argnames=("iterative",))
def read_chunks(
    model: Model,
    config: HyperConfig,
    params: Params,
    hyper: Params,
    ids: jax.Array,
    positions: jax.Array,
    *,
    iterative: bool,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """`chunk_factors` of chunks that lie one in each row, ids and positions int32 [C, N] (position -1 is padding)."""
    features = context_features(config, model, params, ids, positions)
    owner = jnp.where(positions >= 0, 0, -1)
    return chunk_factors(config, model.config, hyper, features, owner, iterative=iterative)
