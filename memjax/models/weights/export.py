"""A parameter tree as a Hugging Face folder, which `load_folder`, transformers and other tools read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memjax.models.config import ModelConfig
from memjax.models.weights import names
from memjax.models.weights.hf import SINGLE, save_tensors


def hf_tensors(config: ModelConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor under Hugging Face's names, sorted by name; the inverse of `load_folder`'s table.

    Raises WeightsError where the tree does not fit the config.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in names.flatten(params).items()}
    table = names.hf_table(config)
    sources = [
        rule.source.replace("{layer}", str(layer))
        for rule in table
        for layer in (range(config.num_layers) if rule.layered else (None,))
    ]
    placements = names.match(table, sources, config.num_layers, where="the parameter tree")
    names.check_targets(placements, {path: leaf.shape for path, leaf in leaves.items()})
    for place in sorted(placements, key=lambda p: p.source):
        leaf = leaves[place.target] if place.layer is None else leaves[place.target][place.layer]
        yield place.source, np.ascontiguousarray(leaf.T if place.transform == "transpose" else leaf)


def save_folder(folder: str | Path, config: ModelConfig, params: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Writes model.safetensors and `files` {name: text} (config.json, tokenizer.json, ...) into a folder.

    The weights keep their dtype. Raises WeightsError where the tree does not fit the config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(hf_tensors(config, params))
    for name, text in files.items():
        json.loads(text)
        (folder / name).write_text(text, encoding="utf-8")
    rows = ((name, array.dtype, array.shape, lambda array=array: array) for name, array in tensors)
    save_tensors(folder / SINGLE, rows)
