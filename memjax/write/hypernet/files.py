"""A hypernetwork as a folder: its parameters as safetensors and a JSON file about them. Nothing is ever pickled.

hyper.safetensors    the parameters, named by their paths
hyper.json           format, shape, base id, what wraps every chunk, its longest chunk, how it was trained, and the
                     parameters' sha256
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save as to_safetensors

from memjax import ids
from memjax.config import from_dict, to_dict
from memjax.errors import ArtefactError, BaseMismatchError, InputError
from memjax.memory.raw import json_bytes, parse_json, parse_safetensors, saved_dtype
from memjax.memory.trees import check_finite, fitted, named
from memjax.models import fetch
from memjax.models.base import Base
from memjax.write.hypernet.chunks import Affixes
from memjax.write.hypernet.encode import Hyper
from memjax.write.hypernet.network import HyperConfig, abstract_hyper

FORMAT = 1
SHIPPED = Path(__file__).parent / "shipped"
WEIGHTS_FILE = "hyper.safetensors"
ABOUT_FILE = "hyper.json"
_FIELDS = {"format", "network", "base_id", "base_name", "prefix", "suffix", "max_chunk", "training", "weights"}


def save_hyper(
    folder: Path, hyper: Hyper, base_name: str = "", training: Mapping[str, Any] | None = None, dtype: str = "float32"
) -> Hyper:
    """Write a hypernetwork into `folder`; as it will be read back, with its id. Files that are there are replaced.

    training: plain values about how it was made. dtype: "float32" or "bfloat16", of the stored values. ArtefactError for
    values that are not finite.
    """
    saved = saved_dtype(dtype)
    tensors = {name: np.ascontiguousarray(np.asarray(x).astype(saved)) for name, x in named(hyper.params).items()}
    check_finite(tensors, f"the hypernetwork to be written to {folder}")
    weights = to_safetensors(tensors)
    about = {
        "format": FORMAT,
        "network": to_dict(hyper.config),
        "base_id": hyper.base_id,
        "base_name": base_name,
        "prefix": list(hyper.affixes.prefix),
        "suffix": list(hyper.affixes.suffix),
        "max_chunk": hyper.max_chunk,
        "training": dict(training or {}),
        "weights": ids.bytes_hash(weights),
    }
    written = json_bytes(about)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    (folder / ABOUT_FILE).write_bytes(written)
    params = jax.tree.map(lambda x: np.asarray(x).astype(saved).astype(np.float32), hyper.params)
    return dataclasses.replace(hyper, params=params, id=_identity(about))


def shipped_hyper(base_name: str, learnt: str) -> Path:
    """The folder of the hypernetwork that ships for an embedded base, by what it was trained on: `niah` (needles alone) or
    `world` (questions about documents of the invented world). InputError where none does."""
    folder = fetch.shipped(SHIPPED, base_name, learnt)
    if folder is None:
        raise InputError(
            f"no hypernetwork that was trained on {learnt} ships for base {base_name}; train one (memjax train hypernet) "
            "and name its folder: --hyper DIR"
        )
    return folder


def load_hyper(folder: str | Path, base: Base) -> Hyper:
    """The hypernetwork in a folder, parameters float32, checked in full against the base that it is for.

    ArtefactError where a file is missing or damaged, or names, shapes or values do not fit; BaseMismatchError with both ids
    where it was trained for another base.
    """
    folder = Path(folder).expanduser()
    path = folder / ABOUT_FILE
    about = parse_json(path, _read(path))
    if about.get("format") != FORMAT or set(about) != _FIELDS:
        raise ArtefactError(f"{path} is not a hypernetwork of format {FORMAT}; train or export it again")
    if about["base_id"] != base.id:
        raise BaseMismatchError(
            f"the hypernetwork in {folder} was trained for base {about['base_id']} ({about['base_name']}), not for base "
            f"{base.id} ({base.name}); load the base it was trained for"
        )
    whole = all(isinstance(about[name], list) and all(type(i) is int for i in about[name]) for name in ("prefix", "suffix"))
    if not whole or type(about["max_chunk"]) is not int or about["max_chunk"] < 1:
        raise ArtefactError(f"{path} is damaged: prefix and suffix must be lists of ids and max_chunk a positive number")
    config = from_dict(HyperConfig, about["network"], where=f"{path}: ")
    data = _read(folder / WEIGHTS_FILE)
    if ids.bytes_hash(data) != about["weights"]:
        raise ArtefactError(f"{folder / WEIGHTS_FILE} is damaged: its bytes are not those that {ABOUT_FILE} tells of")
    abstract = abstract_hyper(config, base.config)
    params = fitted(parse_safetensors(folder / WEIGHTS_FILE, data), abstract, str(folder / WEIGHTS_FILE))
    affixes = Affixes(tuple(about["prefix"]), tuple(about["suffix"]))
    return Hyper(config, params, affixes, about["max_chunk"], base.id, _identity(about))


def _identity(about: Mapping[str, Any]) -> str:
    """What the adapters it writes depend on; how it was trained is not part of it."""
    parts = {name: value for name, value in about.items() if name not in ("training", "base_name")}
    return ids.text_hash(ids.canonical_json(parts))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read ({error.strerror}); give the folder of a hypernetwork, as `memjax train hypernet` "
            "leaves it"
        ) from None
