"""What is learned for a bounded cache, as folders: safetensors and a JSON file about them. Nothing is ever pickled.

indexer.safetensors, latent.safetensors  the parameters, by their names
indexer.json, latent.json                format, shape, base id and name, how it was trained, the parameters' sha256
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as to_safetensors

from memjax import ids
from memjax.config import from_dict, to_dict
from memjax.errors import ArtefactError, BaseMismatchError
from memjax.evict.indexer import IndexerConfig, abstract_indexer
from memjax.evict.latent import abstract_memory
from memjax.evict.learned import Learned
from memjax.memory.latent import Rule
from memjax.memory.raw import json_bytes, parse_json, parse_safetensors, saved_dtype
from memjax.memory.trees import check_finite, fitted, named
from memjax.models import fetch
from memjax.models.base import Base
from memjax.models.decoder import Params

FORMAT = 1
SHIPPED = Path(__file__).parent / "shipped"
INDEXER, LATENT = "indexer", "latent"
_FIELDS = {"format", "shape", "base_id", "base_name", "training", "weights"}


def save_indexer(
    folder: Path,
    params: Params,
    shape: IndexerConfig,
    base: Base,
    training: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> None:
    """Write an indexer of a base into `folder`; files that are there are replaced.

    training: plain values about how it was made. dtype: "float32" or "bfloat16", of the stored values. ArtefactError for
    values that are not finite.
    """
    _save(folder, INDEXER, params, to_dict(shape), base, training, dtype)


def load_indexer(folder: str | Path, base: Base) -> Params:
    """The parameters [L, …] of the indexer in a folder, float32, checked in full against the base that it is for.

    ArtefactError where a file is missing or damaged, or names, shapes or values do not fit; BaseMismatchError with both ids
    where it was trained for another base.
    """
    about, tensors, where = _load(folder, INDEXER, base)
    shape = from_dict(IndexerConfig, about["shape"], where=f"{where}: ")
    return fitted(tensors, abstract_indexer(base.config, shape), where)


def indexer_hash(folder: str | Path, base: Base) -> str:
    """The sha256 of the parameters in an indexer's folder, which is checked to be of this base; what is made with it
    names it so, since the path of a folder says nothing elsewhere and something about the machine."""
    return str(_load(folder, INDEXER, base)[0]["weights"])


def save_memory(
    folder: Path,
    params: Params,
    rule: Rule,
    base: Base,
    training: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> None:
    """Write a latent memory of a base into `folder`, as `save_indexer` does an indexer."""
    _save(folder, LATENT, params, to_dict(rule), base, training, dtype)


def load_memory(folder: str | Path, base: Base) -> tuple[Params, Rule]:
    """(parameters [L, …], rule) of the latent memory in a folder, checked as `load_indexer` checks."""
    about, tensors, where = _load(folder, LATENT, base)
    rule = from_dict(Rule, about["shape"], where=f"{where}: ")
    return fitted(tensors, abstract_memory(base.config, rule), where), rule


def shipped(kind: str, base_name: str) -> Path | None:
    """The folder of the `INDEXER` or `LATENT` that ships with memjax for an embedded base; None where nothing does."""
    return fetch.shipped(SHIPPED, base_name, kind)


def load_learned(base: Base, indexer: str | Path | None = None, latent: str | Path | None = None) -> Learned:
    """What was trained for a base, from the folders that are given. ArtefactError, BaseMismatchError."""
    memory, rule = load_memory(latent, base) if latent else (None, None)
    return Learned(load_indexer(indexer, base) if indexer else None, memory, rule)


def _save(
    folder: Path,
    kind: str,
    params: Params,
    shape: Mapping[str, Any],
    base: Base,
    training: Mapping[str, Any] | None,
    dtype: str,
) -> None:
    saved = saved_dtype(dtype)
    tensors = {name: np.ascontiguousarray(np.asarray(x).astype(saved)) for name, x in named(params).items()}
    check_finite(tensors, f"the {kind} to be written to {folder}")
    weights = to_safetensors(tensors)
    about = {
        "format": FORMAT,
        "shape": dict(shape),
        "base_id": base.id,
        "base_name": base.name,
        "training": dict(training or {}),
        "weights": ids.bytes_hash(weights),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}.safetensors").write_bytes(weights)
    (folder / f"{kind}.json").write_bytes(json_bytes(about))


def _load(folder: str | Path, kind: str, base: Base) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """(the description, the tensors, what errors call them) of one kind of file in a folder, for this base."""
    folder = Path(folder).expanduser()
    path, values = folder / f"{kind}.json", folder / f"{kind}.safetensors"
    about = parse_json(path, _read(path, kind))
    if about.get("format") != FORMAT or set(about) != _FIELDS:
        raise ArtefactError(f"{path} does not describe {kind} parameters of format {FORMAT}; train it again")
    if about["base_id"] != base.id:
        raise BaseMismatchError(
            f"the {kind} in {folder} was trained for base {about['base_id']} ({about['base_name']}), not for base "
            f"{base.id} ({base.name}); load the base it was trained for"
        )
    data = _read(values, kind)
    if ids.bytes_hash(data) != about["weights"]:
        raise ArtefactError(f"{values} is damaged: its bytes are not those that {path.name} tells of")
    return about, parse_safetensors(values, data), str(values)


def _read(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read ({error.strerror}); give the folder of one, as `memjax train {kind}` leaves it"
        ) from None
