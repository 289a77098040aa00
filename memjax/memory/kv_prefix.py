"""PEFT's folders of key/value prefixes, CARTRIDGE and PREFIX_TUNING: keys and values of virtual tokens of every layer.

    adapter_config.json        peft_type, num_virtual_tokens, num_layers, num_attention_heads (of keys), token_dim
    adapter_model.safetensors  prompt_embeddings [P, L * 2 * K * H]: of each token, layer by layer, the key and the value

Keys stand as a cache holds them, turned to the positions 0 ... P - 1 (Cartridges, arXiv 2506.06266; prefix tuning, ACL
2021.acl-long.353, whose projection PEFT applies before it saves).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memjax.errors import ArtefactError
from memjax.memory.peft import CONFIG_FILE, WEIGHTS_FILE
from memjax.memory.raw import listed, parse_json, parse_safetensors, read_file

KINDS = ("CARTRIDGE", "PREFIX_TUNING")
_TENSOR = "prompt_embeddings"
# Options that say nothing about what the tensor means.
_SILENT = frozenset(
    "auto_mapping base_model_name_or_path encoder_hidden_size inference_mode init_weights peft_version prefix_projection "
    "revision runtime_config task_type".split()
)
_READ = frozenset(
    "modules_to_save num_attention_heads num_frozen_tokens num_layers num_transformer_submodules num_virtual_tokens "
    "peft_type token_dim".split()
)


class KVPrefix(NamedTuple):
    """k (rotated to 0 ... P - 1), v [L, P, K, H]; frozen: how many of the first tokens were not trained."""

    k: np.ndarray
    v: np.ndarray
    frozen: int


def is_kv_prefix(folder: Path) -> bool:
    """Whether a folder holds such a prefix, by its adapter_config.json."""
    path = Path(folder) / CONFIG_FILE
    return path.is_file() and parse_json(path, read_file(path)).get("peft_type") in KINDS


def read_kv_prefix(folder: Path, shape: tuple[int, int, int]) -> KVPrefix:
    """The prefix in a folder that PEFT's `save_pretrained` wrote; shape: (L, K, H) of the base that will read it.

    ArtefactError, naming what it is, for a pickle, an option that this version does not know, further modules, an encoder
    and a decoder, values that are not finite, or a tensor that does not have the base's shape.
    """
    folder, (layers, heads, size) = Path(folder), shape
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ArtefactError(
            f"{folder} holds adapter_model.bin, a pickle, which is never read; save it again as safetensors"
        )
    path = folder / CONFIG_FILE
    config = parse_json(path, read_file(path))
    count, frozen = _check_config(path, config)
    path = folder / WEIGHTS_FILE
    tensors = parse_safetensors(path, read_file(path))
    if set(tensors) != {_TENSOR}:
        missing, unexpected = sorted({_TENSOR} - set(tensors)), sorted(set(tensors) - {_TENSOR})
        raise ArtefactError(f"{path} is no prefix: missing {listed(missing)}; unexpected {listed(unexpected)}")
    found, wanted = tensors[_TENSOR], (count, layers * 2 * heads * size)
    told = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * size}
    wrong = [f"{name} {config[name]}, not {value}" for name, value in told.items() if config.get(name) not in (None, value)]
    if found.shape != wanted or wrong:
        shapes = f"{_TENSOR} is {list(found.shape)}, not {list(wanted)}"
        raise ArtefactError(f"{folder} does not fit this base: {'; '.join([*wrong, shapes] if wrong else [shapes])}")
    if not np.isfinite(found.astype(np.float32)).all():
        raise ArtefactError(f"{path} has values that are not finite; train it again")
    parted = found.reshape(count, layers, 2, heads, size).transpose(2, 1, 0, 3, 4)
    return KVPrefix(np.ascontiguousarray(parted[0]), np.ascontiguousarray(parted[1]), frozen)


def _check_config(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """(virtual tokens, frozen ones among them), or ArtefactError naming what cannot be honoured."""
    if config.get("peft_type") not in KINDS:
        raise ArtefactError(f"{path} has peft_type {config.get('peft_type')!r}; a prefix is one of {', '.join(KINDS)}")
    if unknown := sorted(set(config) - _SILENT - _READ):
        raise ArtefactError(
            f"{path} has options that this version does not know: {', '.join(unknown)}; remove those without effect"
        )
    if config.get("modules_to_save") or config.get("num_transformer_submodules") not in (None, 1):
        refused = [name for name in ("modules_to_save", "num_transformer_submodules") if config.get(name) not in (None, 1)]
        raise ArtefactError(f"{path} needs what memjax cannot apply: {', '.join(refused)}; train a plain prefix instead")
    count, frozen = config.get("num_virtual_tokens"), config.get("num_frozen_tokens") or 0
    if type(count) is not int or type(frozen) is not int or not 0 <= frozen <= count or count < 1:
        raise ArtefactError(
            f"{path} has num_virtual_tokens = {count!r} and num_frozen_tokens = {frozen!r}; whole numbers are needed"
        )
    return count, frozen
