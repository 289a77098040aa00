"""Bytes of the files that memories are made of: JSON and safetensors, checked as they are read, and never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from memjax import ids
from memjax.errors import ArtefactError

SAVED_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
READ_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


def saved_dtype(name: str) -> np.dtype:
    """The dtype of this name in which values are stored; ArtefactError for another."""
    if name not in SAVED_DTYPES:
        raise ArtefactError(f"a memory cannot be stored as {name!r}; choose one of {', '.join(SAVED_DTYPES)}")
    return SAVED_DTYPES[name]


def json_bytes(value: Any) -> bytes:
    """A JSON file's bytes: sorted keys, so that the same value is the same file."""
    try:
        text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False, default=ids.plain_scalar)
        return text.encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"the memory's metrics and recipe must be plain, finite JSON values: {error}") from None


def read_file(path: Path) -> bytes:
    """The bytes of a file of a memory; ArtefactError, naming it, where it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtefactError(f"{path} is missing; the folder is not a whole memory") from None
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror or error}") from None


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in a file's bytes, or ArtefactError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ArtefactError(f"{path} is damaged: it is not a JSON object")
    return value


def parse_safetensors(path: Path, data: bytes) -> dict[str, np.ndarray]:
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


def listed(names: list[str], most: int = 8) -> str:
    """A list for one line: the first few names and how many more there are."""
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
