"""The decoder of every base: parameters declared by NNX, everything else pure functions of plain dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.errors import WeightsError
from memjax.kernels.choose import chosen
from memjax.kernels.segment_attention import Segment, attend
from memjax.kernels.slot_lora import slot_delta
from memjax.memory.adapter import SITES, Slots
from memjax.memory.cache import Cache, append, make_cache
from memjax.memory.latent import Residual, read_latent
from memjax.models.config import ModelConfig
from memjax.models.rope import RopeTable, rope_tables, rotate
from memjax.sharding import RULES, Rules, looked_up, mesh_of, pinned, shardings

Params = dict[str, Any]
TAPS = ("x", "q_raw", "k_raw", "q", "k", "v", "lse", "attn_out")
KEY_TAPS = ("x", "k_raw", "k", "v")  # one for each token that is read; the others belong to the queries


class Model(NamedTuple):
    """What is static about a base: hashable, an ordinary static argument of `jax.jit`.

    kernels: how attention and slots are computed, see `kernels.choose.chosen`; `model._replace(kernels="xla")` is a model
    that reads the same in another way.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    kernels: str = "auto"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Out:
    """hidden [B, T, D] after the final norm (before it, if `layers` stopped early); cache; taps {name: [L, B, T, ...]}."""

    hidden: jax.Array
    cache: Cache | None
    taps: dict[str, jax.Array]


class Block(nnx.Module):
    """One layer. Its parameters are declared stacked, [L, ...]; a call binds the slice of one layer."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.config = config
        layers, width, size = config.num_layers, config.width, config.head_size
        for name, (size_in, size_out) in site_shapes(config).items():
            setattr(self, name, nnx.Param(jnp.zeros((layers, size_in, size_out), dtype)))
        norms = ["attn_norm", "mlp_norm"] + ["post_attn_norm", "post_mlp_norm"] * config.post_norms
        for name in norms:
            setattr(self, name, nnx.Param(jnp.zeros((layers, width), dtype)))
        if config.qkv_bias:
            for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
                setattr(self, f"{name}_bias", nnx.Param(jnp.zeros((layers, heads * size), dtype)))
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                setattr(self, name, nnx.Param(jnp.zeros((layers, size), dtype)))

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rope: RopeTable,
        window: jax.Array | int | None,
        segments: Sequence[Segment],
        latent: Residual | None,
        own_mask: jax.Array | None,
        slots: Slots | None,
        slot_ids: jax.Array | None,
        adapter_mask: jax.Array | None,
        taps: Sequence[str],
        kernels: str,
        layer: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
        """(x [B, T, D], keys, values [B, T, K, H] of these tokens, taps) of one layer; `segments` are read before own.

        slots: of this layer, or of all layers where `layer` int32 [] says which one is meant.
        """
        config = self.config

        def site(name: str, value: jax.Array) -> jax.Array:
            weight = getattr(self, name)[...]
            # As one matrix: XLA's CPU backend takes half as long again for the gradient of a product with two row axes.
            y = (value.reshape(-1, value.shape[-1]) @ weight).reshape(*value.shape[:-1], -1)
            if slots is not None and name in slots.a:
                y = y + slot_delta(
                    value, slots.a[name], slots.b[name], slots.scale, slot_ids, adapter_mask, layer, kernels=kernels
                )
            return y

        def norm(name: str, value: jax.Array) -> jax.Array:
            return rms_norm(value, getattr(self, name)[...], config)

        def heads(name: str, count: int, value: jax.Array) -> jax.Array:
            y = site(name, value)
            if config.qkv_bias:
                y = y + getattr(self, f"{name}_bias")[...]
            return y.reshape(*y.shape[:-1], count, config.head_size)

        seen = {"x": x}
        h = norm("attn_norm", x)
        q, k = heads("q", config.num_heads, h), heads("k", config.num_kv_heads, h)
        v = heads("v", config.num_kv_heads, h)
        if config.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        seen |= {"q_raw": q, "k_raw": k, "v": v}
        q, k = rotate(q, rope), rotate(k, rope)
        seen |= {"q": q, "k": k}
        own = Segment(k, v, positions, own_mask)
        out, lse = attend(
            q,
            positions,
            [*segments, own],
            scale=config.query_scale,
            softcap=config.attn_softcap,
            window=window,
            kernels=kernels,
        )
        if latent is not None:
            out = read_latent(latent, q, out, lse, scale=config.query_scale, softcap=config.attn_softcap)
        seen |= {"lse": lse, "attn_out": out}
        h = site("o", out.reshape(*out.shape[:-2], -1))
        x = x + (norm("post_attn_norm", h) if config.post_norms else h)
        h = norm("mlp_norm", x)
        gate = site("gate", h)
        gate = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        h = site("down", gate * site("up", h))
        x = x + (norm("post_mlp_norm", h) if config.post_norms else h)
        return x, k, v, {name: seen[name] for name in taps}


class Decoder(nnx.Module):
    """Declares every parameter of a base."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.embed = nnx.Param(jnp.zeros((config.vocab_size, config.width), dtype))
        self.layers = Block(config, dtype)
        self.final_norm = nnx.Param(jnp.zeros((config.width,), dtype))
        if not config.tied:
            self.head = nnx.Param(jnp.zeros((config.width, config.vocab_size), dtype))


def site_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """{site: (I, F)} of every projection that can carry an adapter."""
    width, inner = config.width, config.num_heads * config.head_size
    kv = config.num_kv_heads * config.head_size
    shapes = {
        "q": (width, inner),
        "k": (width, kv),
        "v": (width, kv),
        "o": (inner, width),
        "gate": (width, config.mlp_width),
        "up": (width, config.mlp_width),
        "down": (config.mlp_width, width),
    }
    return {site: shapes[site] for site in SITES}


def make_model(config: ModelConfig) -> Model:
    """The static half of a base."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, jnp.float32)))
    return Model(config, graphdef)


def upper_layers(model: Model, params: Params, begin: int) -> tuple[Model, Params]:
    """(model, params) of the layers from `begin` on, as a model of its own that is fed hidden states [B, T, D].

    Its `forward` on what `forward(…, layers=begin)` gave is the rest of the whole model's; segments, cache and slots are
    those of its own layers. Copies the weights of these layers, unless `begin` is 0.
    """
    if not begin:
        return model, params
    config, local = model.config, model.config.local
    upper = dataclasses.replace(config, num_layers=config.num_layers - begin, local=local and local[begin:])
    layers = jax.tree.map(lambda x: x[begin:], params["layers"])
    return make_model(upper)._replace(kernels=model.kernels), {**params, "layers": layers}


def abstract_params(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`: the one source for init, loading, restore targets and shardings."""
    _, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype)))
    return nnx.to_pure_dict(state)


def head_counts(config: ModelConfig) -> dict[str, int]:
    """What cannot be cut: the heads that the features of a projection belong to, for `memjax.sharding`."""
    return {"heads": config.num_heads, "kv_heads": config.num_kv_heads}


def param_shardings(config: ModelConfig, mesh: jax.sharding.Mesh, rules: Rules = RULES) -> Params:
    """Where each parameter of a base lies on a mesh: a tree of `NamedSharding` like `abstract_params`."""
    return shardings(abstract_params(config), "params", mesh, rules=rules, counts=head_counts(config))


def init_params(config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Fresh parameters: normal 0.02, output projections narrowed by sqrt(2L) (GPT-2), norms at one, biases zero."""
    abstract = abstract_params(config, dtype)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(key, len(leaves))

    def init(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, leaf_key: jax.Array) -> jax.Array:
        name = path[-1].key
        if "norm" in name:
            return jnp.full(leaf.shape, 1.0 - config.norm_offset, leaf.dtype)
        if name.endswith("_bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        std = 0.02 / (2 * config.num_layers) ** 0.5 if name in ("o", "down") else 0.02
        return (std * jax.random.normal(leaf_key, leaf.shape, jnp.float32)).astype(leaf.dtype)

    return tree.unflatten([init(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)])


def bind(graphdef: nnx.GraphDef, abstract: Params, params: Params) -> nnx.Module:
    """The module with `params` in it, paired by name after a check of names and shapes against `abstract`.

    The only caller of `nnx.merge`: it pairs a plain dict by sorted position and looks at no shape, so a renamed key
    would swap two weights in silence.
    """
    expected, got = _shapes(abstract), _shapes(params)
    if expected != got:
        missing = sorted(set(expected) - set(got))
        unexpected = sorted(set(got) - set(expected))
        wrong = [f"{n}: {got[n]} instead of {expected[n]}" for n in sorted(expected) if n in got and got[n] != expected[n]]
        raise WeightsError(
            f"parameters do not fit the model; missing: {missing or 'none'}; unexpected: {unexpected or 'none'}; "
            f"misshapen: {wrong or 'none'}"
        )
    return nnx.merge(graphdef, nnx.State(params))


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(entry.key) for entry in path): tuple(leaf.shape) for path, leaf in leaves}


def rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
    """RMSNorm over the last axis in float32 (arXiv 1910.07467), with Gemma's `1 + w` where `norm_offset` is 1."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_eps)
    return (y * (weight.astype(jnp.float32) + config.norm_offset)).astype(x.dtype)


def forward(
    model: Model,
    params: Params,
    inputs: jax.Array,
    positions: jax.Array,
    cache: Cache | None = None,
    *,
    visible: jax.Array | None = None,
    segments: Sequence[Segment] = (),
    latent: Residual | None = None,
    slots: Slots | None = None,
    slot_ids: jax.Array | None = None,
    adapter_mask: jax.Array | None = None,
    taps: Sequence[str] = (),
    tap_last: int | None = None,
    layers: int | None = None,
    remat: bool = False,
    unroll: int = 1,
) -> Out:
    """The reader: hidden states of `inputs`, which see the segments, the cache and each other.

    inputs: ids [B, T] or embeddings [B, T, D]; positions int32 [B, T], -1 for padding (valid tokens first);
    cache: read, then these tokens are appended to it (None: nothing is kept);
    visible: segment ids [B, T] of packed rows (a token sees only its own id), or a mask [B, T, S + T] over cache and
    own tokens; default causal by position;
    segments: further keys and values, each with a leading layer axis on k and v ([L, Bk, S, K, H]), and on positions
    that differ between layers and heads ([L, Bp, S, K]);
    latent: a memory of evicted tokens [L, B, ...], whose residual joins each query head's output before the projection;
    slots, slot_ids [B], adapter_mask [B, T]: an adapter per row, switched per token; slot_ids None with one slot means
    that all rows share it;
    taps: names of per-layer values to return, from {x, q_raw, k_raw, q, k, v, lse, attn_out}, q and k being rotated;
    tap_last: of those that belong to queries (all but x, k_raw, k, v) only the last that many positions;
    layers: stop after that many; remat: recompute each layer in the backward pass;
    unroll: layers in one iteration of the scan; a small model trains a sixth faster on CPU with all of them in one.
    """
    config = model.config
    module = bind(model.graphdef, abstract_params(config), params)
    x = inputs
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        x = embed(model, params, inputs)
    count = config.num_layers if layers is None else layers
    mesh = mesh_of(params["embed"])
    x = pinned(x, "batch", mesh)
    cache_mask, own_mask = _masks(visible, cache, inputs.shape[1])
    rope, local_rope = rope_tables(config, positions)
    mixed = config.local is not None and not all(config.local)
    block_def, block_state = nnx.split(module.layers)
    block_params = nnx.to_pure_dict(block_state)
    abstract_block = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), block_params)

    def step(x: jax.Array, xs: Params) -> tuple[jax.Array, tuple[Any, ...]]:
        block = bind(block_def, abstract_block, xs["params"])
        layer = xs.get("layer")
        kept = [(s.k, s.v) for s in segments] if in_place else xs["segments"]
        read = [
            Segment(k, v, s.position if own is None else own, s.mask, layer if in_place else None)
            for (k, v), own, s in zip(kept, xs["positions"], segments, strict=True)
        ]
        if cache is not None:
            k, v = (cache.k, cache.v) if in_place else xs["cache"]
            read.append(Segment(k, v, cache.position, cache_mask, layer if in_place else None))
        window: jax.Array | int | None
        if mixed:
            assert config.window is not None
            window = jnp.where(xs["local"], config.window, config.max_positions + 1)
            table = jax.tree.map(lambda near, far: jnp.where(xs["local"], near, far), local_rope, rope)
        else:
            window, table = (config.window, local_rope) if config.local else (None, rope)
        layer_slots, place = slots, layer
        if slots is not None and "slots" in xs:
            layer_slots, place = Slots(xs["slots"][0], xs["slots"][1], slots.scale), None
        x, k, v, seen = block(
            x,
            positions,
            table,
            window,
            read,
            xs.get("latent"),
            own_mask,
            layer_slots,
            slot_ids,
            adapter_mask,
            taps,
            model.kernels,
            place,
        )
        if tap_last is not None:
            seen = {name: value if name in KEY_TAPS else value[:, -tap_last:] for name, value in seen.items()}
        return pinned(x, "batch", mesh), ((k, v) if cache is not None else None, seen)

    xs: Params = {"params": block_params, "positions": [s.position if s.position.ndim == 4 else None for s in segments]}
    # What a scan slices for a kernel, or for a gather, is a copy of the whole layer: they read it where it lies.
    in_place = chosen(model.kernels, inputs.shape[1]) != "xla"
    if not in_place:
        xs["segments"] = [(s.k, s.v) for s in segments]
        if cache is not None:
            xs["cache"] = (cache.k, cache.v)
    if in_place or (slots is not None and slot_ids is not None):
        xs["layer"] = jnp.arange(config.num_layers, dtype=jnp.int32)
    if latent is not None:
        xs["latent"] = latent
    if slots is not None and slot_ids is None:
        xs["slots"] = (slots.a, slots.b)
    if mixed:
        xs["local"] = jnp.asarray(config.local)
    if count != config.num_layers:
        xs = jax.tree.map(lambda leaf: leaf[:count], xs)
    x, (written, seen) = jax.lax.scan(jax.checkpoint(step) if remat else step, x, xs, unroll=unroll)
    if cache is not None and count == config.num_layers:
        cache = pinned(append(cache, written[0], written[1], positions), "cache", mesh)
    hidden = rms_norm(x, module.final_norm[...], config) if count == config.num_layers else x
    return Out(hidden, cache, seen)


def embed(model: Model, params: Params, ids: jax.Array) -> jax.Array:
    """What the first layer is fed for these ids: [..., D]."""
    x = looked_up(params["embed"], ids)
    scale = model.config.embed_scale
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def unembed(model: Model, params: Params, hidden: jax.Array) -> jax.Array:
    """Vocabulary logits [..., V] float32 of the given hidden states; taken only where needed."""
    config = model.config
    if config.tied:
        logits = jnp.einsum("...d,vd->...v", hidden, params["embed"], preferred_element_type=jnp.float32)
    else:
        logits = jnp.einsum("...d,dv->...v", hidden, params["head"], preferred_element_type=jnp.float32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits


def empty_cache(config: ModelConfig, batch: int, capacity: int, like: jax.Array | None = None) -> Cache:
    """An empty cache of the base's shape; `like` is a parameter of the base: its dtype (else float32), and its mesh."""
    dtype, mesh = (jnp.float32, None) if like is None else (like.dtype, mesh_of(like))
    return make_cache(config.num_layers, batch, capacity, config.num_kv_heads, config.head_size, dtype, mesh)


def _masks(visible: jax.Array | None, cache: Cache | None, length: int) -> tuple[jax.Array | None, jax.Array | None]:
    """(mask over the cache, mask over own tokens) that narrow what positions alone would show."""
    if visible is None:
        return None, None
    if visible.ndim == 2:
        if cache is not None:
            raise ValueError("segment ids of packed rows say nothing about a cache; pass a mask [B, T, S + T]")
        return None, visible[:, :, None] == visible[:, None, :]
    held = visible.shape[-1] - length
    return (visible[..., :held] if cache is not None else None), visible[..., held:]
