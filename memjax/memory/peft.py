"""The PEFT folder layout of an adapter, in both directions, and a refusal by name of whatever is more than plain LoRA.

    adapter_config.json        what PEFT and vLLM read
    adapter_model.safetensors  base_model.model.model.layers.{l}.{module}.lora_A.weight [R,I] and .lora_B.weight [F,R]

That is what peft's `save_pretrained` writes (LoRA, arXiv 2106.09685): delta W = lora_alpha / r * B A. The names of a base's
modules come from the caller as {site: "self_attn.q_proj"}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors.numpy import save as to_safetensors

from memjax.errors import ArtefactError
from memjax.memory.raw import json_bytes, listed, parse_json, parse_safetensors, read_file, saved_dtype

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LAYERS_PREFIX = "base_model.model.model.layers"


class AdapterLike(Protocol):
    """Anything with the fields of `memory.adapter.Adapter`: a {site: [L,R,I]}, b {site: [L,R,F]}, scale."""

    @property
    def a(self) -> Mapping[str, Any]: ...
    @property
    def b(self) -> Mapping[str, Any]: ...
    @property
    def scale(self) -> Any: ...


class Factors(NamedTuple):
    """An adapter as plain NumPy: a {site: [L,R,I]}, b {site: [L,R,F]}, scale. `Adapter(*factors)` makes the JAX one."""

    a: dict[str, np.ndarray]
    b: dict[str, np.ndarray]
    scale: float


def adapter_files(
    adapter: AdapterLike, module_names: Mapping[str, str], base_name: str, dtype: str, where: str
) -> tuple[Factors, dict[str, bytes]]:
    """(the adapter as it will be read back, {file name: bytes}); `where` is what a refusal calls it.

    Layers that the adapter leaves alone (all zero) are left out and the others named in `layers_to_transform`.
    """
    saved = saved_dtype(dtype)
    cast = lambda tree: {site: np.asarray(tree[site]).astype(saved) for site in sorted(tree)}
    factors = _check_factors(Factors(cast(adapter.a), cast(adapter.b), float(np.float32(adapter.scale))), where)
    modules = _named_modules(factors.a, module_names)
    layers, rank, _ = next(iter(factors.a.values())).shape
    kept = _touched_layers(factors)
    tensors = {}
    for site, module in modules.items():
        for layer in kept:
            tensors[_tensor_name(layer, module, "A")] = np.ascontiguousarray(factors.a[site][layer])
            tensors[_tensor_name(layer, module, "B")] = np.ascontiguousarray(factors.b[site][layer].T)
    config = _peft_config(modules, rank, factors.scale, base_name, kept if len(kept) < layers else None)
    return factors, {CONFIG_FILE: json_bytes(config), WEIGHTS_FILE: to_safetensors(tensors, metadata={"format": "pt"})}


def read_peft(
    folder: Path, site_shapes: Mapping[str, tuple[int, int]], num_layers: int, module_names: Mapping[str, str]
) -> Factors:
    """The adapter in a folder written by PEFT's `save_pretrained`, refused by name where it is more than plain LoRA.

    Refused: DoRA, biases, modules_to_save, ranks or alphas that differ between modules, initialisations that change the
    base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), and every option that this version does not know. rsLoRA is read: its
    scale is lora_alpha / sqrt(r). Layers left out by `layers_to_transform` become zeros.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ArtefactError(
            f"{folder} holds adapter_model.bin, a pickle, which is never read; save it again as safetensors"
        )
    config, weights = read_file(folder / CONFIG_FILE), read_file(folder / WEIGHTS_FILE)
    return parse_adapter(folder, {CONFIG_FILE: config, WEIGHTS_FILE: weights}, site_shapes, num_layers, module_names)


def _touched_layers(factors: Factors) -> list[int]:
    """The layers with any value that is not zero; all of them where there is none."""
    each = [np.any(np.asarray(x) != 0, axis=(1, 2)) for tree in (factors.a, factors.b) for x in tree.values()]
    touched = np.any(each, axis=0)
    return [int(layer) for layer in (np.flatnonzero(touched) if touched.any() else range(len(touched)))]


def _peft_config(
    modules: Mapping[str, str], rank: int, scale: float, base_name: str, layers: list[int] | None
) -> dict[str, Any]:
    """adapter_config.json: only what every PEFT since 0.10 and vLLM understand; the scale is lora_alpha / r."""
    alpha = scale * rank  # exact in float64 for a float32 scale, and so is dividing again
    only = {} if layers is None else {"layers_to_transform": layers}
    return only | {
        "base_model_name_or_path": base_name or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(module.rsplit(".", 1)[-1] for module in modules.values()),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


# fmt: off
# Options of adapter_config.json that say nothing about what the tensors mean.
_SILENT = frozenset({
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
})
# Options that are read below.
_READ = frozenset({
    "alpha_pattern", "bias", "init_lora_weights", "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern",
    "use_rslora",
})
# Options that must be off: with any of them the tensors mean something else than a plain low-rank delta.
_OFF = frozenset({
    "alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "fan_in_fan_out", "kasa_config",
    "layer_replication", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config", "modules_to_save",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "velora_config",
})
# fmt: on
# Initialisations that leave the base as it is. The others move part of the base's weights into the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def parse_adapter(
    folder: Path,
    contents: Mapping[str, bytes],
    site_shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    module_names: Mapping[str, str],
) -> Factors:
    """The adapter in a PEFT folder's two files: every tensor is used once and every place filled, or ArtefactError."""
    config = parse_json(folder / CONFIG_FILE, contents[CONFIG_FILE])
    rank, scale, transformed = _check_config(folder / CONFIG_FILE, config, num_layers)
    path = folder / WEIGHTS_FILE
    tensors = parse_safetensors(path, contents[WEIGHTS_FILE])

    modules = _named_modules(site_shapes, module_names)
    sites = [site for site, module in modules.items() if any(f".{module}.lora_" in name for name in tensors)]
    shapes = {}
    for site in sites:
        size_in, size_out = site_shapes[site]
        for layer in transformed:
            shapes[_tensor_name(layer, modules[site], "A")] = (rank, size_in)
            shapes[_tensor_name(layer, modules[site], "B")] = (size_out, rank)
    missing, unexpected = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or unexpected or not sites:
        raise ArtefactError(
            f"{path} does not fit this base with {num_layers} layers and sites {', '.join(modules)}: "
            f"missing {listed(missing)}; unexpected {listed(unexpected)}"
        )
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [f"{n} is {list(found[n])}, not {list(shape)}" for n, shape in shapes.items() if found[n] != shape]
    if wrong:
        raise ArtefactError(f"{path} does not fit this base: {listed(wrong)}")

    a, b = {}, {}
    for site in sites:
        size_in, size_out = site_shapes[site]
        dtype = tensors[_tensor_name(transformed[0], modules[site], "A")].dtype
        a[site] = np.zeros((num_layers, rank, size_in), dtype)
        b[site] = np.zeros((num_layers, rank, size_out), dtype)
        for layer in transformed:
            a[site][layer] = tensors[_tensor_name(layer, modules[site], "A")]
            b[site][layer] = tensors[_tensor_name(layer, modules[site], "B")].T
    return _check_factors(Factors(a, b, scale), str(path))


def _check_config(path: Path, config: Mapping[str, Any], num_layers: int) -> tuple[int, float, list[int]]:
    """(rank, scale, adapted layers) of an adapter_config.json, or ArtefactError naming what cannot be honoured."""
    if config.get("peft_type") != "LORA":
        raise ArtefactError(f"{path} has peft_type {config.get('peft_type')!r}; only LORA adapters can be read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ArtefactError(f"{path} has r = {rank!r}; a positive whole number is needed")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ArtefactError(f"{path} has lora_alpha = {alpha!r}; a finite number is needed")
    refused = [f"{name} = {config[name]!r}" for name in sorted(_OFF & set(config)) if config[name]]
    if config.get("bias", "none") not in ("none", None):
        refused.append(f"bias = {config['bias']!r}")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        refused.append(f"init_lora_weights = {config['init_lora_weights']!r} (it changed the base's weights)")
    for name, common in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or any(value != common for value in pattern.values()):
            refused.append(f"{name} = {pattern!r}")
    if refused:
        raise ArtefactError(f"{path} needs what memjax cannot apply: {', '.join(refused)}; train a plain LoRA instead")
    if unknown := sorted(set(config) - _SILENT - _READ - _OFF):
        raise ArtefactError(
            f"{path} has options that this version does not know: {', '.join(unknown)}; remove those without effect"
        )

    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else (list(range(num_layers)) if layers is None else layers)
    if not (isinstance(layers, list) and layers and all(isinstance(n, int) and 0 <= n < num_layers for n in layers)):
        raise ArtefactError(f"{path} has layers_to_transform = {layers!r}; this base has layers 0 to {num_layers - 1}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return rank, scale, sorted(set(layers))


def _tensor_name(layer: int, module: str, letter: str) -> str:
    return f"{LAYERS_PREFIX}.{layer}.{module}.lora_{letter}.weight"


def _named_modules(sites: Mapping[str, Any], module_names: Mapping[str, str]) -> dict[str, str]:
    """{site: module} of the given sites, or ArtefactError for a site that the base has no module for."""
    if unknown := sorted(set(sites) - set(module_names)):
        raise ArtefactError(f"no module is known for the sites {', '.join(unknown)}; known are {', '.join(module_names)}")
    return {site: module_names[site] for site in module_names if site in sites}


def _check_factors(factors: Factors, where: str) -> Factors:
    """The same factors, if a and b agree on sites, layers and rank and every value is finite; else ArtefactError."""
    if not factors.a or set(factors.a) != set(factors.b):
        raise ArtefactError(f"{where} has sites {sorted(factors.a)} in a but {sorted(factors.b)} in b; make them equal")
    arrays = (*factors.a.values(), *factors.b.values())
    if len({x.shape[:2] for x in arrays}) != 1 or any(x.ndim != 3 or 0 in x.shape for x in arrays):
        shapes = {site: (factors.a[site].shape, factors.b[site].shape) for site in factors.a}
        raise ArtefactError(f"{where} has shapes {shapes}; all sites must be [L,R,I] and [L,R,F] with one L and one R")
    bad = [s for s in factors.a if not (np.isfinite(factors.a[s]).all() and np.isfinite(factors.b[s]).all())]
    if bad or not math.isfinite(factors.scale):
        raise ArtefactError(f"{where} has values that are not finite at {', '.join(bad) or 'its scale'}; write it again")
    return factors
