"""Texts to vectors for retrieval: a small BERT, static word vectors, the base's own hidden states, or any function.

An `Encoder` is a function with an id; whatever would change its vectors changes the id, so that stored keys are never
compared with a query of another encoder. `sentence_encoder` reads a Hugging Face folder: BERT with mean pooling over
the tokens and L2 norm (Sentence-BERT, arXiv 1908.10084, section 3) or one matrix of word vectors, averaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax import ids
from memjax.errors import InputError, WeightsError
from memjax.models.base import Base
from memjax.models.decoder import forward
from memjax.models.tokenizer import Tokenizer
from memjax.models.weights import hf, names

DEFAULT_ENCODER = "all-minilm-l6-v2"
BATCH_TOKENS = 1024  # tokens of one compiled call, for as many texts as fit
SHORTEST = 16  # tokens of the shortest compiled length
# Tensors that a BERT checkpoint may carry and that mean pooling does not use.
BERT_IGNORED = tuple(map(re.compile, (r"embeddings\.position_ids", r"pooler\.dense\.(weight|bias)")))
WORD_VECTORS = "embedding.weight"
SENTENCE_CONFIG = "sentence_bert_config.json"

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """texts -> [n, width], and the id that its keys are stored under; `encode` checks and normalises what comes out."""

    id: str
    width: int
    run: Callable[[Sequence[str]], np.ndarray]


class BertConfig(NamedTuple):
    """The static half of a BERT encoder: sizes of the tree, heads, tokens it reads, epsilon of its norms."""

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    max_positions: int
    norm_eps: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> BertConfig:
        """From a config.json; WeightsError for what this encoder does not compute."""
        kind = (config.get("model_type"), config.get("hidden_act"), config.get("position_embedding_type", "absolute"))
        if kind != ("bert", "gelu", "absolute"):
            raise WeightsError(
                f"no encoder: model_type, hidden_act and positions are {', '.join(map(str, kind))}; "
                "supported: bert, gelu, absolute"
            )
        keys = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        try:
            vocab, layers, width, mlp, heads, longest = (int(config[key]) for key in (*keys, "max_position_embeddings"))
        except KeyError as error:
            raise WeightsError(f"the encoder's config.json lacks {error.args[0]!r}") from None
        return cls(vocab, layers, width, mlp, heads, longest, float(config.get("layer_norm_eps", 1e-12)))


def encode(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors float32 [n, width] of texts; a text without any token has the zero vector.

    InputError where the encoder gives another shape or a value that is not finite.
    """
    if not len(texts):
        return np.zeros((0, encoder.width), np.float32)
    made = np.asarray(encoder.run(texts), np.float32)
    if made.shape != (len(texts), encoder.width):
        wanted = [len(texts), encoder.width]
        raise InputError(f"encoder {encoder.id[:40]} gave {list(made.shape)} for {len(texts)} texts; it must give {wanted}")
    if not np.isfinite(made).all():
        raise InputError(f"encoder {encoder.id[:40]} gave values that are not finite; use another encoder")
    return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)


# ------------------------------------------------------------------------------------------------------ kinds of encoder


def sentence_encoder(path_or_name: str | Path = DEFAULT_ENCODER) -> Encoder:
    """The encoder in a folder, or fetched under a name: a BERT, or word vectors where the folder has no config.json.

    FetchError where nothing is found or reached, WeightsError where the weights do not fit.
    """
    from memjax.models.fetch import resolve_encoder

    folder = resolve_encoder(path_or_name)
    return bert_encoder(folder) if (folder / "config.json").is_file() else word_encoder(folder)


def available_encoder(retrieve: str = "auto") -> Encoder | None:
    """The default encoder for a kind of retrieval (see `bank.fusion`); None for bm25.

    Nothing is fetched unasked: auto takes it where it has been fetched before and is None elsewhere, dense and fusion
    fetch it at their first use (FetchError where that fails).
    """
    from memjax.models.fetch import has_encoder

    if retrieve == "bm25" or (retrieve == "auto" and not has_encoder(DEFAULT_ENCODER)):
        return None
    return sentence_encoder()


def bert_encoder(folder: str | Path) -> Encoder:
    """A BERT of a Hugging Face folder, mean-pooled; longer texts are cut at what it was made for (usually 256 tokens)."""
    folder = Path(folder)
    config, loaded, weights_id = load_bert(folder)
    tokenizer = Tokenizer.from_folder(folder)
    first, last = tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")
    if first is None or last is None:
        raise WeightsError(f"the tokenizer of {folder} has no [CLS] and [SEP]; fetch the encoder again")
    own = hf.read_config(folder, SENTENCE_CONFIG) if (folder / SENTENCE_CONFIG).is_file() else {}
    longest = min(int(own.get("max_seq_length") or config.max_positions), config.max_positions)
    params = jax.tree.map(jnp.asarray, loaded)

    def run(texts: Sequence[str]) -> np.ndarray:
        rows = [[first, *tokenizer.encode(text)[: longest - 2], last] for text in texts]
        return in_batches(rows, longest, config.width, lambda batch, mask: bert_vectors(config, params, batch, mask))

    identity = ids.text_hash(ids.canonical_json(["bert-mean", weights_id, tokenizer.id, longest]))
    return Encoder(identity, config.width, run)


def word_encoder(folder: str | Path) -> Encoder:
    """The mean of static word vectors (`embedding.weight` [V, width] in model.safetensors), by their tokenizer."""
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        shards = hf.Shards(folder, stack)
        names.match((names.Rule(WORD_VECTORS, "words"),), shards.names, 0, where=str(folder))
        stored = shards.get(WORD_VECTORS)
    table, tokenizer = stored.astype(np.float32), Tokenizer.from_folder(folder)
    if table.ndim != 2 or len(table) < tokenizer.vocab_size or not hf.all_finite(table):
        raise WeightsError(f"{WORD_VECTORS} in {folder} is not a finite row per token of its tokenizer; fetch it again")

    def run(texts: Sequence[str]) -> np.ndarray:
        made = np.zeros((len(texts), table.shape[1]), np.float32)
        for row, text in enumerate(texts):
            tokens = tokenizer.encode(text)
            made[row] = table[tokens].mean(axis=0) if tokens else 0
        return made

    identity = ids.text_hash(ids.canonical_json(["word-mean", ids.tensor_hash(stored), tokenizer.id]))
    return Encoder(identity, table.shape[1], run)


def base_encoder(base: Base, layers: int | None = None, longest: int = 512) -> Encoder:
    """The mean of the base's own hidden states after `layers` of its layers (half of them by default)."""
    layers = base.config.num_layers // 2 if layers is None else layers
    if not 1 <= layers <= base.config.num_layers:
        raise InputError(f"layer {layers} is not one of the {base.config.num_layers} layers of {base.name}")
    longest = min(longest, base.config.max_positions)
    start = base.tokenizer.prefix_ids

    def run(texts: Sequence[str]) -> np.ndarray:
        rows = [[*start, *base.tokenizer.encode(text)][:longest] for text in texts]
        step = lambda batch, mask: _base_vectors(base.model, layers, base.params, batch, mask)
        return in_batches(rows, longest, base.config.width, step)

    identity = ids.text_hash(ids.canonical_json(["base-mean", base.id, base.tokenizer.id, layers, longest]))
    return Encoder(identity, base.config.width, run)


# --------------------------------------------------------------------------------------------------------- computing


def in_batches(
    rows: Sequence[Sequence[int]],
    longest: int,
    width: int,
    step: Callable[[np.ndarray, np.ndarray], jax.Array],
) -> np.ndarray:
    """step(ids, mask [B, T]) -> [B, width] over token rows of any length, put together as float32 [n, width].

    Rows go by length, so that little is padded. T is a power of two; B is 1 for a single row and else what fits into
    BATCH_TOKENS: at most two programs for each length. Rows without tokens get zeros; none may be longer than `longest`.
    """
    if any(len(row) > longest for row in rows):
        raise ValueError(f"a row is longer than {longest} tokens")
    made = np.zeros((len(rows), width), np.float32)
    order = [i for i in sorted(range(len(rows)), key=lambda i: len(rows[i])) if len(rows[i])]
    begin = 0
    while begin < len(order):
        length = min(max(SHORTEST, 1 << (len(rows[order[begin]]) - 1).bit_length()), max(longest, SHORTEST))
        fit = [i for i in order[begin : begin + max(BATCH_TOKENS // length, 1)] if len(rows[i]) <= length]
        batch = 1 if len(fit) == 1 else max(BATCH_TOKENS // length, 1)
        tokens, mask = np.zeros((batch, length), np.int32), np.zeros((batch, length), bool)
        for row, index in enumerate(fit):
            tokens[row, : len(rows[index])] = rows[index]
            mask[row, : len(rows[index])] = True
        made[fit] = np.asarray(step(tokens, mask))[: len(fit)]
        begin += len(fit)
    return made


@partial(jax.jit, static_argnums=0)
def bert_vectors(config: BertConfig, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean-pooled unit vectors float32 [B, D] of token ids [B, T] where mask [B, T]."""
    pooled = _mean(bert_hidden(config, params, tokens, mask), mask)
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)


def bert_hidden(config: BertConfig, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Last hidden states [B, T, D] of BERT (arXiv 1810.04805) for token ids [B, T]; all tokens are of the first type.

    Matmuls run in full float32 everywhere: keys stored by one machine are compared with queries of another.
    """
    with jax.default_matmul_precision("highest"):
        x = params["words"][tokens] + params["positions"][: tokens.shape[1]] + params["types"][0]
        x = _layer_norm(x, params["norm"], params["norm_bias"], config.norm_eps)
        bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]

        def block(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
            x = _layer_norm(x + _attention(config, w, x, bias), w["attn_norm"], w["attn_norm_bias"], config.norm_eps)
            inner = jax.nn.gelu(x @ w["up"] + w["up_bias"], approximate=False)
            x = x + inner @ w["down"] + w["down_bias"]
            return _layer_norm(x, w["mlp_norm"], w["mlp_norm_bias"], config.norm_eps), None

        return jax.lax.scan(block, x, params["layers"])[0]


def _attention(config: BertConfig, w: Params, x: jax.Array, bias: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    heads = (batch, length, config.num_heads, width // config.num_heads)
    q, k, v = ((x @ w[side] + w[f"{side}_bias"]).reshape(heads) for side in "qkv")
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * heads[-1] ** -0.5 + bias
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)
    return out.reshape(x.shape) @ w["o"] + w["o_bias"]


def _layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


@partial(jax.jit, static_argnums=(0, 1))
def _base_vectors(model: Any, layers: int, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    positions = jnp.where(mask, jnp.arange(tokens.shape[1], dtype=jnp.int32), -1)
    return _mean(forward(model, params, tokens, positions, layers=layers).hidden.astype(jnp.float32), mask)


def _mean(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean [B, D] of hidden [B, T, D] over the tokens of mask [B, T]; zeros where there are none."""
    weights = mask.astype(jnp.float32)[..., None]
    return (hidden * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)


# ----------------------------------------------------------------------------------------------------------- weights


def bert_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """{dotted path: shape} of the parameter tree."""
    layers, width, inner = config.num_layers, config.width, config.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "words": (config.vocab_size, width),
        "positions": (config.max_positions, width),
        "types": (2, width),
        "norm": (width,),
        "norm_bias": (width,),
    }
    matrices = dict.fromkeys("qkvo", (width, width)) | {"up": (width, inner), "down": (inner, width)}
    for name, shape in matrices.items():
        shapes |= {f"layers.{name}": (layers, *shape), f"layers.{name}_bias": (layers, shape[1])}
    for name in ("attn_norm", "mlp_norm"):
        shapes |= {f"layers.{name}": (layers, width), f"layers.{name}_bias": (layers, width)}
    return shapes


def bert_table() -> tuple[names.Rule, ...]:
    """The rules from Hugging Face's names to our tree."""
    outside = {"word": "words", "position": "positions", "token_type": "types"}
    rules = [names.Rule(f"embeddings.{name}_embeddings.weight", ours) for name, ours in outside.items()]
    rules += [names.Rule(f"embeddings.LayerNorm.{part}", f"norm{end}") for part, end in (("weight", ""), ("bias", "_bias"))]
    modules = {
        "attention.self.query": "q",
        "attention.self.key": "k",
        "attention.self.value": "v",
        "attention.output.dense": "o",
        "attention.output.LayerNorm": "attn_norm",
        "intermediate.dense": "up",
        "output.dense": "down",
        "output.LayerNorm": "mlp_norm",
    }
    for module, ours in modules.items():
        transform = "keep" if ours.endswith("norm") else "transpose"
        rules.append(names.Rule(f"encoder.layer.{{layer}}.{module}.weight", f"layers.{ours}", transform))
        rules.append(names.Rule(f"encoder.layer.{{layer}}.{module}.bias", f"layers.{ours}_bias"))
    return tuple(rules)


def load_bert(folder: str | Path) -> tuple[BertConfig, Params, str]:
    """(config, parameters as float32 NumPy, id of the stored weights) of a BERT folder.

    WeightsError naming every tensor that is missing, unexpected or misshapen, and for values that are not finite.
    """
    folder = Path(folder)
    config = BertConfig.from_hf(hf.read_config(folder))
    with contextlib.ExitStack() as stack:
        shards = hf.Shards(folder, stack)
        shapes = bert_shapes(config)
        table = bert_table()
        placements = names.match(table, shards.names, config.num_layers, where=str(folder), ignored=BERT_IGNORED)
        names.check_targets(placements, shapes)
        tree = hf.fill(shards, placements, shapes, np.dtype(np.float32))
        identity = hf.folder_id(shards, [place.source for place in placements])
    return config, names.unflatten(tree), identity
