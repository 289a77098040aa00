"""The authors' PyTorch checkpoints of Doc-to-LoRA, once they are safetensors: their names become ours, sizes are read off.

Theirs is a pickle that holds Python objects beside the tensors, and is never opened here: `launch/convert_doc_to_lora.py`
makes a safetensors file of it in a process of its own. Names below `aggregator.perceiver` are the Perceiver's, `layers.0`
is the residual MLP, `head`, `bias_A`, `bias_B`, `scaler_A` and `scaler_B` are the rest (arXiv 2602.15902 and its code).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from memjax.errors import ArtefactError
from memjax.memory.raw import listed, parse_safetensors, read_file
from memjax.models.base import Base
from memjax.models.config import ModelConfig
from memjax.models.decoder import Params
from memjax.models.weights import SITE_MODULES
from memjax.write.hypernet.chunks import affixes_of
from memjax.write.hypernet.encode import Hyper
from memjax.write.hypernet.network import HyperConfig, abstract_hyper
from memjax.write.prompts import prompt_style

HEAD_SIZE = 128  # theirs, whatever the width; queries and keys do not tell it
MOST = 8192  # tokens of a chunk in their long documents; 512 in training
_COMPILED = "_orig_mod."  # what torch.compile puts before a name
_MAPS = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o"}
_MAPS |= {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
_NORMS = {
    "input_context_layernorm": "context_norm",
    "input_latents_layernorm": "latent_norm",
    "post_attention_layernorm": "attn_out_norm",
    "pre_ff_layernorm": "mlp_norm",
    "post_ff_layernorm": "mlp_out_norm",
}

Tensors = Mapping[str, np.ndarray]


def read_published(
    path: str | Path, base: Base, *, head_size: int = HEAD_SIZE, max_chunk: int = MOST, depth: int = 0
) -> Hyper:
    """The hypernetwork in a converted checkpoint, for the base that it was trained for, float32; save it by `save_hyper`.

    max_chunk: tokens of its longest chunk, at most what the base reads at once; depth: blocks of the base that early
    features lie behind (0: a quarter of them). ArtefactError where names or shapes are not those of such a checkpoint, or
    of another base's.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ArtefactError(
            f"{path} is no safetensors file, and pickles are not opened; convert it: python launch/convert_doc_to_lora.py"
        )
    found = {name.removeprefix(_COMPILED): x for name, x in parse_safetensors(path, read_file(path)).items()}
    affixes = affixes_of(base.tokenizer, prompt_style(base.tokenizer.prompt_style))
    room = base.config.max_positions - len(affixes.prefix) - len(affixes.suffix)
    config, params = from_published(found, base.config, head_size, depth, str(path))
    return Hyper(config, params, affixes, min(max_chunk, room), base.id)


def from_published(
    tensors: Tensors, base: ModelConfig, head_size: int, depth: int = 0, where: str = "the checkpoint"
) -> tuple[HyperConfig, Params]:
    """(shape, parameters float32) of tensors under the published names. ArtefactError where they do not fit the base."""
    left = dict(tensors)
    config = _shape(left, base, head_size, depth, where)

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise ArtefactError(f"{where} lacks {name}; give a whole checkpoint of Doc-to-LoRA")
        return left.pop(name).astype(np.float32)

    turned = lambda name: np.ascontiguousarray(take(f"{name}.weight").T)  # torch keeps [outputs, inputs]

    def gated(name: str) -> Params:
        return {ours: turned(f"{name}.{ours}_proj") for ours in ("gate", "up", "down")}

    def resampler(name: str, count: int) -> Params:
        blocks = [f"{name}.layers.{i}" for i in range(count)]
        maps = {ours: np.stack([turned(f"{block}.{theirs}") for block in blocks]) for theirs, ours in _MAPS.items()}
        norms = {ours: np.stack([take(f"{block}.{theirs}.weight") for block in blocks]) for theirs, ours in _NORMS.items()}
        return {
            "latents": take(f"{name}.latents_q"),
            "blocks": {**maps, **norms},
            "out_norm": take(f"{name}.layernorm.weight"),
        }

    layers, rank = base.num_layers, config.rank
    mlp, perceiver = "layers.0.layers", "aggregator.perceiver"
    flat = lambda name: take(name).reshape(layers, -1)  # stored with axes of one between
    modules = {site: SITE_MODULES[site].rsplit(".", 1)[-1] for site in config.names}
    params: Params = {
        "project": gated(f"{perceiver}.modality_projection"),
        "encoder": resampler(f"{perceiver}.encoder", config.blocks),
        "decoder": resampler(f"{perceiver}.decoder", 1),
        "mlp": {
            "in_norm": take(f"{mlp}.0.weight"),
            "in_norm_bias": take(f"{mlp}.0.bias"),
            "up": take(f"{mlp}.1.weight"),
            "up_bias": flat(f"{mlp}.1.bias"),
            "down": take(f"{mlp}.3.weight"),
            "down_bias": flat(f"{mlp}.3.bias"),
            "out_norm": take(f"{mlp}.4.weight"),
            "out_norm_bias": take(f"{mlp}.4.bias"),
        },
        "head": take("head.weight").reshape(layers, len(modules), config.width, -1),
        "sites": {
            site: {
                "a_scale": take(f"scaler_A.{module}").reshape(layers, rank),
                "b_scale": take(f"scaler_B.{module}").reshape(layers, rank),
                "a_bias": take(f"bias_A.{module}"),
                "b_bias": take(f"bias_B.{module}"),
            }
            for site, module in modules.items()
        },
    }
    if left:
        raise ArtefactError(
            f"{where} holds what no Doc-to-LoRA has: {listed(sorted(left))}; another version cannot be read"
        )
    _check(params, abstract_hyper(config, base), where)
    return config, params


def _shape(tensors: Tensors, base: ModelConfig, head_size: int, depth: int, where: str) -> HyperConfig:
    """The sizes, read off the tensors."""
    ends = {module.rsplit(".", 1)[-1]: site for site, module in SITE_MODULES.items()}
    modules = sorted(name.removeprefix("bias_A.") for name in tensors if name.startswith("bias_A."))
    unknown = [module for module in modules if module not in ends]
    encoder, decoder = (f"aggregator.perceiver.{part}" for part in ("encoder", "decoder"))
    needed = [
        f"{encoder}.latents_q",
        f"{decoder}.latents_q",
        *(f"{encoder}.layers.0.self_attn.{x}_proj.weight" for x in "qk"),
    ]
    missing = [name for name in needed if name not in tensors]
    if not modules or unknown or missing:
        raise ArtefactError(
            f"{where} is no checkpoint of Doc-to-LoRA: it lacks {listed(missing or ['bias_A'])}; modules {listed(modules)}"
        )
    first = tensors[f"bias_A.{modules[0]}"]
    latents, made, q, k = (tensors[name] for name in needed)
    rank, layers = first.shape[1], first.shape[0]
    if layers != base.num_layers:
        raise ArtefactError(
            f"{where} is for a base of {layers} layers and this one has {base.num_layers}; load its own base"
        )
    if q.shape[0] % head_size or k.shape[0] % head_size:
        raise ArtefactError(f"{where}: queries of {q.shape[0]} and keys of {k.shape[0]} are no heads of {head_size}")
    blocks = len({name.split(".")[4] for name in tensors if name.startswith(f"{encoder}.layers.")})
    return HyperConfig(
        sites=tuple(ends[module] for module in modules),
        rank=rank,
        latents=latents.shape[0],
        blocks=blocks,
        width=latents.shape[1],
        heads=q.shape[0] // head_size,
        kv_heads=k.shape[0] // head_size,
        head_size=head_size,
        features="layers" if made.shape[0] == len(modules) * rank else "early",
        depth=depth,
    )


def _check(params: Params, abstract: Params, where: str, path: str = "") -> None:
    """ArtefactError for a leaf that has another shape, or values that are not finite; leaves become JAX's."""
    for name, leaf in abstract.items():
        here = f"{path}/{name}".lstrip("/")
        if isinstance(leaf, dict):
            _check(params[name], leaf, where, here)
            continue
        value = params[name]
        if value.shape != leaf.shape:
            raise ArtefactError(f"{where}: {here} is {list(value.shape)}, not {list(leaf.shape)}; load its own base")
        if not np.isfinite(value).all():
            raise ArtefactError(f"{where}: {here} has values that are not finite; get the checkpoint again")
        params[name] = jnp.asarray(value)
