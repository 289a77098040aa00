"""Arrays and strings in safetensors files that are memory-mapped: the reader of safetensors for NumPy copies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from memjax.ids import bytes_hash

_DTYPES = {"F32": np.float32, "I32": np.int32, "I64": np.int64, "U8": np.uint8, "U64": np.uint64}


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> str:
    """Write {name: array} as one safetensors file; the file's hash."""
    data = save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    path.write_bytes(data)
    return bytes_hash(data)


def map_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """{name: memory-mapped array} of a safetensors file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    made = {}
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            made[name] = data[begin:end].view(_DTYPES[about["dtype"]]).reshape(about["shape"])
    return made


def id_bytes(ids: np.ndarray) -> np.ndarray:
    """uint8 [n, width]: strings as a tensor file holds them."""
    width = max((len(i.encode()) for i in map(str, ids)), default=1)
    names = np.frombuffer(b"".join(str(i).encode().ljust(width, b"\0") for i in ids), np.uint8)
    return names.reshape(len(ids), width)


def id_strings(names: np.ndarray) -> np.ndarray:
    """str [n] from what `id_bytes` made."""
    names = np.ascontiguousarray(names)
    return np.char.decode(names.view(f"S{names.shape[1]}")[:, 0], "utf-8")
