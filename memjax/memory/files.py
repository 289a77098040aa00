"""The artefact format: a memory as a PEFT folder with a manifest beside it.

    adapter_config.json        what PEFT and vLLM read
    adapter_model.safetensors  base_model.model.model.layers.{l}.{module}.lora_A.weight [R,I] and .lora_B.weight [F,R]
    memory.json                the manifest: id, key, what the memory was written from, and the sha256 of each file

The same memory always has the same bytes, and nothing is ever pickled. Everything here is NumPy, so that a process that
only keeps memories need not load JAX. The names of a base's modules come from the caller as {site: "self_attn.q_proj"}.
The PEFT layout is that of peft's `save_pretrained` (LoRA, arXiv 2106.09685): delta W = lora_alpha / r * B A.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save as to_safetensors

from memjax import ids
from memjax.errors import ArtefactError, BaseMismatchError

FORMAT = 1
MANIFEST = "memory.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LAYERS_PREFIX = "base_model.model.model.layers"

SAVED_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
READ_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


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


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a memory was written from. The first five fields are its key; the rest is told, not identified."""

    base_id: str
    tokenizer_id: str
    template_id: str
    recipe: Mapping[str, Any]
    source_hash: str = ids.NO_SOURCE
    kind: str = "adapter"
    base_name: str = ""
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    licence: str = ""

    @property
    def key(self) -> str:
        """The key of the memory that these describe: known before it is written."""
        return ids.memory_key(self.base_id, self.tokenizer_id, self.template_id, self.recipe, self.source_hash)


@dataclasses.dataclass(frozen=True)
class Memory:
    """A memory: id, key, kind, the artefact itself (`Factors` for an adapter), and its `Meta` as a dict."""

    id: str
    key: str
    kind: str
    artefact: Any
    provenance: dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- writing


def write_artefact(
    folder: Path, adapter: AdapterLike, module_names: Mapping[str, str], meta: Meta, dtype: str = "float32"
) -> Memory:
    """Write an adapter and its manifest into `folder` (new or empty) and return the memory, as it would be read back.

    module_names: {site: module path within a layer}, e.g. {"q": "self_attn.q_proj"}; names every site of the adapter.
    dtype: "float32" or "bfloat16", of the stored values. ArtefactError if a value is not finite, the shapes do not
    agree, or the folder holds files already. The files are not fsynced here; the bank does that before it commits.
    Layers that the adapter leaves alone (all zero) are left out and the others named in `layers_to_transform`.
    """
    folder = Path(folder)
    factors = _check_factors(_as_stored(adapter, dtype), f"the adapter to be written to {folder}")
    modules = _named_modules(factors.a, module_names)
    layers, rank, _ = next(iter(factors.a.values())).shape
    kept = _touched_layers(factors)
    tensors = {}
    for site, module in modules.items():
        for layer in kept:
            tensors[_tensor_name(layer, module, "A")] = np.ascontiguousarray(factors.a[site][layer])
            tensors[_tensor_name(layer, module, "B")] = np.ascontiguousarray(factors.b[site][layer].T)
    contents = {
        CONFIG_FILE: _json_file(
            _peft_config(modules, rank, factors.scale, meta.base_name, kept if len(kept) < layers else None)
        ),
        WEIGHTS_FILE: to_safetensors(tensors, metadata={"format": "pt"}),
    }
    hashes = {name: ids.bytes_hash(data) for name, data in contents.items()}
    memory_id = ids.memory_id(meta.key, ids.files_hash(hashes))
    provenance = {field.name: getattr(meta, field.name) for field in dataclasses.fields(Meta)}
    provenance |= {"recipe": dict(meta.recipe), "metrics": dict(meta.metrics)}
    manifest = {"format": FORMAT, "id": memory_id, "key": meta.key, "files": hashes, "provenance": provenance}
    contents[MANIFEST] = _json_file(manifest)

    folder.mkdir(parents=True, exist_ok=True)
    if present := sorted(path.name for path in folder.iterdir()):
        raise ArtefactError(f"{folder} already holds {', '.join(present[:3])}; a memory is written into an empty folder")
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return Memory(memory_id, meta.key, meta.kind, factors, json.loads(contents[MANIFEST])["provenance"])


def _as_stored(adapter: AdapterLike, dtype: str) -> Factors:
    """The adapter's values rounded to the dtype in which they are stored."""
    if dtype not in SAVED_DTYPES:
        raise ArtefactError(f"a memory cannot be stored as {dtype!r}; choose one of {', '.join(SAVED_DTYPES)}")
    cast = lambda tree: {site: np.asarray(tree[site]).astype(SAVED_DTYPES[dtype]) for site in sorted(tree)}
    return Factors(cast(adapter.a), cast(adapter.b), float(np.float32(adapter.scale)))


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


def _json_file(value: Any) -> bytes:
    """A JSON file's bytes: sorted keys, so that the same value is the same file."""
    try:
        text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False, default=ids.plain_scalar)
        return text.encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"the memory's metrics and recipe must be plain, finite JSON values: {error}") from None


# -------------------------------------------------------------------------------------------------------------- reading


def read_artefact(
    folder: Path,
    site_shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    module_names: Mapping[str, str],
    base_id: str | None = None,
) -> Memory:
    """The memory in `folder`, checked in full: hashes, ids, tensor names, shapes, finite values.

    site_shapes {site: (I, F)} and num_layers come from the base's config; the memory may carry some of the sites only.
    base_id: the base that will read it, if that is to be checked. ArtefactError names the file that is missing, damaged
    or does not fit; BaseMismatchError names both bases.
    """
    folder = Path(folder)
    manifest, contents = _read_checked(folder)
    provenance = manifest["provenance"]
    if base_id is not None and provenance["base_id"] != base_id:
        raise BaseMismatchError(
            f"the memory in {folder} was written for base {provenance['base_id']}"
            f"{_in_brackets(provenance['base_name'])}, not for base {base_id}; load the base it was written for"
        )
    if provenance["kind"] != "adapter":
        raise ArtefactError(f"{folder / MANIFEST} describes a {provenance['kind']!r}, which this version cannot read")
    factors = _parse_peft(folder, contents[CONFIG_FILE], contents[WEIGHTS_FILE], site_shapes, num_layers, module_names)
    return Memory(manifest["id"], manifest["key"], provenance["kind"], factors, provenance)


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
    config, weights = _read_file(folder / CONFIG_FILE), _read_file(folder / WEIGHTS_FILE)
    return _parse_peft(folder, config, weights, site_shapes, num_layers, module_names)


def read_manifest(folder: Path) -> dict[str, Any]:
    """memory.json of a folder, its fields checked and its ids recomputed, or ArtefactError; no other file is opened."""
    path = Path(folder) / MANIFEST
    manifest = _parse_json(path, _read_file(path))
    if manifest.get("format") != FORMAT:
        raise ArtefactError(f"{path} has format {manifest.get('format')!r}; this version of memjax reads format {FORMAT}")
    provenance, files = manifest.get("provenance"), manifest.get("files")
    fields = {field.name for field in dataclasses.fields(Meta)}
    if not isinstance(provenance, dict) or set(provenance) != fields or not isinstance(provenance["recipe"], dict):
        raise ArtefactError(f"{path} is damaged: its provenance does not have the fields {', '.join(sorted(fields))}")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise ArtefactError(f"{path} is damaged: it does not list the memory's files")
    if any(name in ("", ".", "..", MANIFEST) or Path(name).name != name for name in files):
        raise ArtefactError(f"{path} is damaged: it lists a file outside its folder")
    if manifest.get("key") != Meta(**provenance).key:
        raise ArtefactError(f"{path} is damaged: its key does not follow from what it says it was written from")
    if manifest.get("id") != ids.memory_id(manifest["key"], ids.files_hash(files)):
        raise ArtefactError(f"{path} is damaged: its id does not follow from its key and files")
    return manifest


def check_folder(folder: Path) -> list[str]:
    """What is wrong with a memory's folder, one line per missing, damaged or unexpected file; empty if all is well."""
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} is missing"]
    try:
        files = read_manifest(folder)["files"]
    except ArtefactError as error:
        return [str(error)]
    problems = []
    for name, expected in sorted(files.items()):
        try:
            if ids.file_hash(folder / name) != expected:
                problems.append(f"{folder / name} is damaged: its bytes are not those that were written")
        except FileNotFoundError:
            problems.append(f"{folder / name} is missing")
        except OSError as error:
            problems.append(f"{folder / name} cannot be read: {error.strerror or error}")
    extra = sorted({path.name for path in folder.iterdir()} - set(files) - {MANIFEST})
    return problems + [f"{folder / name} does not belong to the memory" for name in extra]


def _read_checked(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the bytes of the files it lists, each compared with its hash. ArtefactError names the file."""
    manifest = read_manifest(folder)
    contents = {}
    for name, expected in sorted(manifest["files"].items()):
        contents[name] = _read_file(folder / name)
        if ids.bytes_hash(contents[name]) != expected:
            raise ArtefactError(
                f"{folder / name} is damaged: its bytes are not those that were written; "
                "delete this memory and write it again"
            )
    if missing := sorted({CONFIG_FILE, WEIGHTS_FILE} - set(contents)):
        raise ArtefactError(f"{folder / MANIFEST} does not list {', '.join(missing)}; write this memory again")
    return manifest, contents


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtefactError(f"{path} is missing; the folder is not a whole memory") from None
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror or error}") from None


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ArtefactError(f"{path} is damaged: it is not a JSON object")
    return value


# ---------------------------------------------------------------------------------------------------- PEFT's own format

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


def _parse_peft(
    folder: Path,
    config_bytes: bytes,
    weights_bytes: bytes,
    site_shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    module_names: Mapping[str, str],
) -> Factors:
    """The adapter in a PEFT folder's two files: every tensor is used once and every place filled, or ArtefactError."""
    config = _parse_json(folder / CONFIG_FILE, config_bytes)
    rank, scale, transformed = _check_config(folder / CONFIG_FILE, config, num_layers)
    path = folder / WEIGHTS_FILE
    tensors = _parse_safetensors(path, weights_bytes)

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
            f"missing {_listed(missing)}; unexpected {_listed(unexpected)}"
        )
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [f"{n} is {list(found[n])}, not {list(shape)}" for n, shape in shapes.items() if found[n] != shape]
    if wrong:
        raise ArtefactError(f"{path} does not fit this base: {_listed(wrong)}")

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


def _parse_safetensors(path: Path, data: bytes) -> dict[str, np.ndarray]:
    """{name: array} of a safetensors file's bytes, bfloat16 included (which safetensors.numpy does not read)."""
    try:
        views = safetensors.deserialize(data)
    except Exception as error:  # SafetensorError, or whatever its Rust side makes of bytes that are not safetensors
        raise ArtefactError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    tensors = {}
    for name, view in views:
        if view["dtype"] not in READ_DTYPES:
            raise ArtefactError(f"{path}: {name} is {view['dtype']}; only {', '.join(READ_DTYPES)} can be read")
        tensors[name] = np.frombuffer(view["data"], READ_DTYPES[view["dtype"]]).reshape(view["shape"])
    return tensors


# -------------------------------------------------------------------------------------------------------------- helpers


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


def _listed(names: list[str], most: int = 8) -> str:
    """A list for one line: the first few names and how many more there are."""
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _in_brackets(name: str) -> str:
    return f" ({name})" if name else ""
