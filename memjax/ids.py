"""Content ids: the sha256 of what a thing is, so that a name can move and an id cannot.

Every id is 64 lower-case hex digits. Compound ids hash canonical JSON, which has one spelling per value, so the parts
cannot run into each other and an id does not depend on the order of a dict.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memjax.errors import ConfigError, WeightsError

NO_SOURCE = "none"  # the source hash of a memory that was not written from a text here (imported, merged)


def canonical_json(value: Any) -> str:
    """The one JSON spelling of `value`: sorted keys, no spaces, ASCII.

    NumPy scalars count as the Python numbers they hold. 1 and 1.0 are different values. ConfigError for NaN, infinity,
    and what JSON cannot hold.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=plain_scalar)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"only plain JSON values can be part of an id: {error}") from None


def plain_scalar(value: Any) -> Any:
    """A NumPy scalar as a Python number: the `default=` of json.dumps; TypeError for anything else."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def bytes_hash(data: bytes) -> str:
    """sha256 of raw bytes."""
    return hashlib.sha256(data).hexdigest()


def text_hash(text: str) -> str:
    """sha256 of the text's UTF-8 bytes, as it stands: no normalisation of line ends or Unicode."""
    return bytes_hash(text.encode("utf-8", "surrogatepass"))


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_hash(array: np.ndarray) -> str:
    """sha256 of the values as little-endian bytes in C order; shape and dtype are not part of it."""
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.byteswap()
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def base_id(tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]]) -> str:
    """The id of a base: sha256 over its sorted (tensor name, shape, dtype, tensor hash).

    tensors: {name: array}, or (name, array) pairs that are read one at a time, so that a large base need not be in
    memory at once. The order does not matter. WeightsError if there are none or a name comes twice.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    rows: dict[str, list[Any]] = {}
    for name, array in pairs:
        if name in rows:
            raise WeightsError(f"tensor {name!r} appears twice, so the base has no id; the weight files overlap")
        rows[name] = [name, list(array.shape), array.dtype.name, tensor_hash(array)]
    if not rows:
        raise WeightsError("a base without tensors has no id; check that the weight files are complete")
    return text_hash(canonical_json([rows[name] for name in sorted(rows)]))


def memory_key(base_id: str, tokenizer_id: str, template_id: str, recipe: Mapping[str, Any], source_hash: str) -> str:
    """What a memory was asked to be, known before it is written: writing the same key twice is writing one memory.

    recipe: the writer's name and every setting that changes what is written. source_hash: `text_hash` of the context,
    or `NO_SOURCE`.
    """
    return text_hash(canonical_json([base_id, tokenizer_id, template_id, dict(recipe), source_hash]))


def files_hash(hashes: Mapping[str, str]) -> str:
    """One hash for a set of files, from {file name: sha256}."""
    return text_hash(canonical_json(sorted(hashes.items())))


def memory_id(key: str, artefact_hash: str) -> str:
    """What a memory is: its key and the bytes that were written for it (`files_hash` of the artefact's files)."""
    return text_hash(canonical_json([key, artefact_hash]))
