"""The hypernetwork of Doc-to-LoRA: a Perceiver shared over layers, then a residual MLP and a head per layer.

Activations of the frozen base become rank embeddings of unit length, and each of those a row of A and a row of B (arXiv
2602.15902, section 3 and its listing of parameters). Parameters are declared by NNX; everything else is a pure function
of a plain dict. Letters here beside the house's: C chunks, M sites, d the width within the hypernetwork, q latents.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.errors import ConfigError
from memjax.memory.adapter import SITES
from memjax.models.config import ModelConfig
from memjax.models.decoder import Params, site_shapes

RMS_EPS = 1e-6
LAYER_NORM_EPS = 1e-5
UNIT_EPS = 1e-12  # under the root of a squared length; the reference divides without one
WIDEN = 4  # hidden width of every MLP here, as a multiple of its narrow side
_MASKED = -1e30  # finite, so that a chunk that is all padding has no NaN in its gradient
_BLOCK_NORMS = ("context_norm", "latent_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm")


@dataclasses.dataclass(frozen=True)
class HyperConfig:
    """The shape of a hypernetwork; the defaults are the paper's for gemma-2-2b-it (its code has 9 blocks, not 8).

    sites: projections that the adapter acts on; rank: of what one chunk becomes; latents, blocks: of the Perceiver's
    encoder; width d, and its attention's heads, kv_heads and head_size. features "layers": layer l reads what enters block
    l of the base; "early": all layers read one state, behind `depth` blocks (0: a quarter of them). gates: each chunk has a
    learned weight in every layer (see `chunk_share`), so that a chunk that holds nothing need not add to the update; the
    paper has none.
    """

    sites: tuple[str, ...] = ("down",)
    rank: int = 8
    latents: int = 8
    blocks: int = 8
    width: int = 512
    heads: int = 16
    kv_heads: int = 4
    head_size: int = 128
    features: Literal["layers", "early"] = "layers"
    depth: int = 0
    gates: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.sites) - set(SITES))
        if unknown or not self.sites or len(set(self.sites)) != len(self.sites):
            raise ConfigError(f"sites are {list(self.sites)}; give each once, from {', '.join(SITES)}")
        if min(self.rank, self.latents, self.blocks, self.width, self.heads, self.kv_heads, self.head_size) < 1:
            raise ConfigError("a hypernetwork wants every size to be at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} heads cannot be grouped over {self.kv_heads} key/value heads")

    @property
    def scale(self) -> float:
        """What the update is multiplied by, 2 r^1.5, whatever the rank after concatenation; not alpha / r."""
        return 2.0 * self.rank**1.5

    @property
    def names(self) -> tuple[str, ...]:
        """The sites in the order in which they are emitted: by name, as in the reference."""
        return tuple(sorted(self.sites))

    def sizes(self, base: ModelConfig) -> dict[str, tuple[int, int]]:
        """{site: (I, F)} in the order of `names`."""
        shapes = site_shapes(base)
        return {site: shapes[site] for site in self.names}

    def emitted(self, base: ModelConfig) -> int:
        """P: numbers that the head emits per rank embedding, enough for the largest site."""
        return max(size_in + size_out for size_in, size_out in self.sizes(base).values())

    def read_layers(self, base: ModelConfig) -> int:
        """How many blocks of the base read a chunk: all but the last, whose output enters no block; fewer if early."""
        if self.depth > base.num_layers:
            raise ConfigError(f"depth is {self.depth} and the base has {base.num_layers} layers; give at most that")
        return base.num_layers - 1 if self.features == "layers" else self.depth or max(base.num_layers // 4, 1)


# ----------------------------------------------------------------------------------------------------------- parameters


class _Gated(nnx.Module):
    """gate, up [wide, hidden], down [hidden, narrow]; no biases."""

    def __init__(self, size_in: int, hidden: int, size_out: int) -> None:
        self.gate = nnx.Param(jnp.zeros((size_in, hidden)))
        self.up = nnx.Param(jnp.zeros((size_in, hidden)))
        self.down = nnx.Param(jnp.zeros((hidden, size_out)))


class _Blocks(nnx.Module):
    """`count` blocks of cross-attention and MLP, stacked."""

    def __init__(self, config: HyperConfig, count: int) -> None:
        width, queries, keys = config.width, config.heads * config.head_size, config.kv_heads * config.head_size
        hidden = WIDEN * width
        shapes = {"q": (width, queries), "k": (width, keys), "v": (width, keys), "o": (queries, width)}
        shapes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros((count, *shape))))
        for name in _BLOCK_NORMS:
            setattr(self, name, nnx.Param(jnp.zeros((count, width))))


class _Resampler(nnx.Module):
    """Latents of its own, blocks, and a norm."""

    def __init__(self, config: HyperConfig, latents: int, count: int) -> None:
        self.latents = nnx.Param(jnp.zeros((latents, config.width)))
        self.blocks = _Blocks(config, count)
        self.out_norm = nnx.Param(jnp.zeros((config.width,)))


class _LayerMlp(nnx.Module):
    """A residual MLP per layer between two layer norms that all layers share."""

    def __init__(self, config: HyperConfig, layers: int) -> None:
        width, hidden = config.width, WIDEN * config.width
        self.up = nnx.Param(jnp.zeros((layers, width, hidden)))
        self.up_bias = nnx.Param(jnp.zeros((layers, hidden)))
        self.down = nnx.Param(jnp.zeros((layers, hidden, width)))
        self.down_bias = nnx.Param(jnp.zeros((layers, width)))
        for name in ("in_norm", "in_norm_bias", "out_norm", "out_norm_bias"):
            setattr(self, name, nnx.Param(jnp.zeros((width,))))


class _Site(nnx.Module):
    """Scalers [L, R], and the adapter that no document changes: a_bias [L, R, I], b_bias [L, R, F]."""

    def __init__(self, config: HyperConfig, layers: int, size_in: int, size_out: int) -> None:
        for name in ("a_scale", "b_scale"):
            setattr(self, name, nnx.Param(jnp.zeros((layers, config.rank))))
        self.a_bias = nnx.Param(jnp.zeros((layers, config.rank, size_in)))
        self.b_bias = nnx.Param(jnp.zeros((layers, config.rank, size_out)))


class _Sites(nnx.Module):
    def __init__(self, config: HyperConfig, base: ModelConfig) -> None:
        for site, (size_in, size_out) in config.sizes(base).items():
            setattr(self, site, _Site(config, base.num_layers, size_in, size_out))


class Hypernet(nnx.Module):
    """Declares every parameter of a hypernetwork for a base."""

    def __init__(self, config: HyperConfig, base: ModelConfig) -> None:
        emitted = len(config.sites) * config.rank * (base.num_layers if config.features == "early" else 1)
        self.project = _Gated(base.width, WIDEN * base.width, config.width)
        self.encoder = _Resampler(config, config.latents, config.blocks)
        self.decoder = _Resampler(config, emitted, 1)
        self.mlp = _LayerMlp(config, base.num_layers)
        self.head = nnx.Param(jnp.zeros((base.num_layers, len(config.sites), config.width, config.emitted(base))))
        self.sites = _Sites(config, base)
        if config.gates:
            self.chunk_gate = nnx.Param(jnp.zeros((base.num_layers, config.width)))
            self.chunk_gate_bias = nnx.Param(jnp.zeros((base.num_layers,)))


def abstract_hyper(config: HyperConfig, base: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`, float32: the one source for init, loading and shardings."""
    _, state = nnx.split(nnx.eval_shape(lambda: Hypernet(config, base)))
    return nnx.to_pure_dict(state)


def hyper_counts(config: HyperConfig) -> dict[str, int]:
    """Heads that `memjax.sharding` must not cut, for a tree of the kind `hyper`."""
    return {"heads": config.heads, "kv_heads": config.kv_heads}


@partial(jax.jit, static_argnums=(0, 1, 3))
def init_hyper(config: HyperConfig, base: ModelConfig, key: jax.Array, b_scale: float = 0.0) -> Params:
    """Fresh parameters whose adapter changes nothing: every row of B is zero until `b_scale` and `b_bias` move.

    b_scale: what the scalers of B start at. Above zero the adapter disturbs the base at first, and everything has a
    gradient from the first step on: what a document says is found sooner (configs/hypernet.md).

    Latents N(0, 1); maps uniform within 1 / sqrt(inputs); those of the layers' MLPs within sqrt(3 / inputs), their biases
    within 1 / sqrt(inputs); head N(0, 0.25 / (d + P R)); a_bias N(0, 0.04 / (I R)); a_scale and norms one, the rest zero
    (the reference's values, read off its listing). Gates are zero: each chunk counts one.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_hyper(config, base))
    # Two draws for all leaves: a draw of its own for each takes ten times as long to compile as to compute.
    total = sum(math.prod(leaf.shape) for _, leaf in leaves)
    keys = jax.random.split(key)
    draws = {"normal": jax.random.normal(keys[0], (total,)), "uniform": jax.random.uniform(keys[1], (total,), minval=-1.0)}
    values, at = [], 0
    for path, leaf in leaves:
        kind, spread = _spread(path[0].key, path[-1].key, leaf.shape, config, base)
        size = math.prod(leaf.shape)
        value = draws[kind][at : at + size] if kind in draws else jnp.ones((size,))
        spread = b_scale if path[-1].key == "b_scale" else spread
        values.append((spread * value).reshape(leaf.shape))
        at += size
    return tree.unflatten(values)


def _spread(group: str, name: str, shape: tuple[int, ...], config: HyperConfig, base: ModelConfig) -> tuple[str, float]:
    """(how a leaf is drawn, what the draw is multiplied by): see `init_hyper`."""
    if name.endswith("_norm") or name == "a_scale":
        return "constant", 1.0
    if name in ("b_scale", "b_bias") or name.endswith("_norm_bias") or name.startswith("chunk_gate"):
        return "constant", 0.0
    if name == "latents":
        return "normal", 1.0
    if name == "head":
        return "normal", 0.5 / math.sqrt(config.width + config.emitted(base) * config.rank)
    if name == "a_bias":
        return "normal", 0.2 / math.sqrt(math.prod(shape[1:]))
    if group == "mlp":
        inputs = WIDEN * config.width if name.startswith("down") else config.width
        return "uniform", math.sqrt((1 if name.endswith("_bias") else 3) / inputs)
    return "uniform", shape[-2] ** -0.5


# ---------------------------------------------------------------------------------------------------------- computation


def rms(x: jax.Array, weight: jax.Array) -> jax.Array:
    """RMSNorm over the last axis in float32 with a plain weight (not the base's own norm, whose offset and eps differ)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + RMS_EPS)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS) * weight + bias


def _times(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., I] @ weight [I, O] in x's dtype."""
    # As one matrix: XLA's CPU backend takes far longer for the gradient of a product with several row axes.
    return (x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype)).reshape(*x.shape[:-1], -1)


def _gated(x: jax.Array, params: Params) -> jax.Array:
    return _times(jax.nn.silu(_times(x, params["gate"])) * _times(x, params["up"]), params["down"])


def _block(config: HyperConfig, params: Params, context: jax.Array, latents: jax.Array, seen: jax.Array) -> jax.Array:
    """One block: latents [B, S, q, d] read context [B, N, d] where `seen` bool [B, S, N], then their MLP."""
    heads, groups, size = config.heads, config.kv_heads, config.head_size
    ctx, lat = rms(context, params["context_norm"]), rms(latents, params["latent_norm"])
    # Query heads g J ... g J + J - 1 share the key head g. The latents are no keys.
    q = _times(lat, params["q"]).reshape(*lat.shape[:-1], groups, heads // groups, size)
    k, v = (_times(ctx, params[name]).reshape(*ctx.shape[:-1], groups, size) for name in ("k", "v"))
    logits = jnp.einsum("bsqgje,bnge->bsgjqn", q, k, preferred_element_type=jnp.float32) * size**-0.5
    logits = jnp.where(seen[:, :, None, None, None, :], logits, _MASKED)
    shares = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    read = jnp.einsum("bsgjqn,bnge->bsqgje", shares, v).reshape(*lat.shape[:-1], heads * size)
    latents = latents + rms(_times(read, params["o"]), params["attn_out_norm"])
    return latents + rms(_gated(rms(latents, params["mlp_norm"]), params), params["mlp_out_norm"])


def _resample(config: HyperConfig, params: Params, context: jax.Array, seen: jax.Array) -> jax.Array:
    """[B, S, q, d]: the resampler's latents, once for each of S chunks in a row, after reading what each may see."""
    shape = (*seen.shape[:2], *params["latents"].shape)
    latents = jnp.broadcast_to(params["latents"].astype(context.dtype), shape)
    step = lambda lat, block: (_block(config, block, context, lat, seen), None)
    latents, _ = jax.lax.scan(step, latents, params["blocks"], unroll=True)
    return rms(latents, params["out_norm"])


def perceive(config: HyperConfig, params: Params, features: jax.Array, owner: jax.Array, slots: int) -> jax.Array:
    """Rank embeddings [B, S, n, d] of the S chunks that lie in each row, in the features' dtype.

    features [B, N, D]; owner int32 [B, N]: which chunk of its row a token belongs to, -1 for padding. n is M R, or L M R
    where one feature map serves all layers. There is no order among tokens but what the features themselves carry.
    """
    context = _gated(features, params["project"])
    seen = owner[:, None, :] == jnp.arange(slots)[None, :, None]
    latents = _resample(config, params["encoder"], context, seen)
    flat = latents.reshape(-1, *latents.shape[2:])
    out = _resample(config, params["decoder"], flat, jnp.ones((len(flat), 1, flat.shape[1]), bool))
    return out.reshape(*latents.shape[:2], *out.shape[2:])


def _emit(config: HyperConfig, base: ModelConfig, params: Params, layer: Params, e: jax.Array) -> dict[str, Any]:
    """{a, b: {site: [C, R, I or F]}} float32 of one layer from its rank embeddings [C, M, R, d]."""
    norms, e = params["mlp"], e.astype(jnp.float32)
    exact = {name: value.astype(jnp.float32) for name, value in layer.items() if name != "sites"}
    h = layer_norm(e, norms["in_norm"], norms["in_norm_bias"])
    h = jax.nn.silu(h @ exact["up"] + exact["up_bias"]) @ exact["down"] + exact["down_bias"]
    e = unit(e + layer_norm(h, norms["out_norm"], norms["out_norm_bias"]))
    y = jnp.einsum("cmrd,mdp->cmrp", e, exact["head"])
    share = chunk_share(e, exact["chunk_gate"], exact["chunk_gate_bias"])[:, None, None] if config.gates else 1.0
    a, b = {}, {}
    for m, (site, (size_in, size_out)) in enumerate(config.sizes(base).items()):
        a[site] = y[:, m, :, :size_in] * layer["sites"][site]["a_scale"][:, None] * share
        b[site] = y[:, m, :, size_in : size_in + size_out] * layer["sites"][site]["b_scale"][:, None]
    return {"a": a, "b": b}


def chunk_share(e: jax.Array, gate: jax.Array, bias: jax.Array) -> jax.Array:
    """What each of C chunks counts in a layer, [C] in (0, 2): 2 sigmoid(mean of its rank embeddings . gate [d] + bias []).

    e [C, M, R, d]. It multiplies A, as the reference's weights of chunks do, and depends on no other chunk: a document's
    update is still a sum, of which a chunk of filler may take no part.
    """
    return 2.0 * jax.nn.sigmoid(e.mean(axis=(1, 2)) @ gate + bias)


def unit(x: jax.Array) -> jax.Array:
    """x at length one over its last axis: what is emitted depends on its direction alone."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + UNIT_EPS)


def chunk_factors(
    config: HyperConfig,
    base: ModelConfig,
    params: Params,
    features: jax.Array,
    owner: jax.Array,
    slots: int = 1,
    *,
    iterative: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(a {site: [L, C, R, I]}, b {site: [L, C, R, F]}) float32 of C = B S chunks, S in each row; unscaled, without bias.

    features [L, B, N, D] of `context_features`, or [B, N, D] where they are early; owner int32 [B, N] as in `perceive`.
    Layers are folded into the batch, or with `iterative` come one after another (`lax.scan`): the same numbers, and the
    projection's hidden states, the largest values of all, of one layer at a time.
    """
    layers, sites, rank = base.num_layers, len(config.sites), config.rank
    gates = {name: params[name] for name in ("chunk_gate", "chunk_gate_bias")} if config.gates else {}
    mlp = {name: params["mlp"][name] for name in ("up", "up_bias", "down", "down_bias")}
    scales = {site: {name: params["sites"][site][name] for name in ("a_scale", "b_scale")} for site in config.names}
    stacked = {**mlp, **gates, "head": params["head"], "sites": scales}
    emit = lambda layer, e: _emit(config, base, params, layer, e)
    read = lambda z, own: perceive(config, params, z, own, slots).reshape(-1, sites, rank, config.width)
    if config.features == "early":
        e = perceive(config, params, features, owner, slots)
        feed = e.reshape(-1, layers, sites, rank, config.width).swapaxes(0, 1)
    elif iterative:
        feed, emit = features, lambda layer, z: _emit(config, base, params, layer, read(z, owner))
    else:
        # Rows before layers: rows are divided among devices, and stay so only where they are the outer part of a dimension.
        folded = features.swapaxes(0, 1).reshape(-1, *features.shape[2:])
        e = read(folded, jnp.repeat(owner, layers, axis=0))
        feed = e.reshape(len(owner), layers, slots, sites, rank, config.width).swapaxes(0, 1)
        feed = feed.reshape(layers, -1, sites, rank, config.width)
    if iterative:
        _, made = jax.lax.scan(lambda _, xs: (None, emit(*xs)), None, (stacked, feed))
    else:
        made = jax.vmap(emit)(stacked, feed)
    return made["a"], made["b"]
