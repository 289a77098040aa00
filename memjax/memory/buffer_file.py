"""A buffer as a file: keys before rotary embedding and values of its slots, and where they lie when read.

buffer.safetensors         k, v [L, M, K, H]; its metadata hold header, context and layout of `memory.buffer.Buffer`, and
                           what the slots stand for: the text, without the turn's markers behind it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors.numpy import save as to_safetensors

from memjax.errors import ArtefactError
from memjax.memory.layout import places
from memjax.memory.raw import parse_safetensors, saved_dtype

BUFFER_FILE = "buffer.safetensors"
_ABOUT = "buffer"
_HOLDS = "text"


class BufferLike(Protocol):
    """Anything with the fields of `memory.buffer.Buffer`."""

    @property
    def k(self) -> Any: ...
    @property
    def v(self) -> Any: ...
    @property
    def header(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def layout(self) -> str: ...


class KeyValues(NamedTuple):
    """A buffer as plain NumPy, k and v [L, M, K, H]. `Buffer(*key_values)` makes the JAX one."""

    k: np.ndarray
    v: np.ndarray
    header: int
    context: int
    layout: str


def buffer_files(buffer: BufferLike, dtype: str, where: str) -> tuple[KeyValues, dict[str, bytes]]:
    """(the buffer as it will be read back, {file name: bytes}); `where` is what a refusal calls it."""
    saved = saved_dtype(dtype)
    k, v = (np.ascontiguousarray(np.asarray(x).astype(saved)) for x in (buffer.k, buffer.v))
    made = _check(KeyValues(k, v, int(buffer.header), int(buffer.context), str(buffer.layout)), where)
    # One value, for several are written in no order, and the same buffer is to be the same bytes.
    about = {"context": made.context, "header": made.header, "holds": _HOLDS, "layout": made.layout}
    return made, {BUFFER_FILE: to_safetensors({"k": k, "v": v}, metadata={_ABOUT: json.dumps(about, sort_keys=True)})}


def parse_buffer(folder: Path, contents: Mapping[str, bytes], shape: tuple[int, int, int]) -> KeyValues:
    """The buffer in a folder's file; shape: (L, K, H) of the base that will read it. ArtefactError if it does not fit."""
    path = folder / BUFFER_FILE
    tensors = parse_safetensors(path, contents[BUFFER_FILE])
    if set(tensors) != {"k", "v"}:
        missing, unexpected = sorted({"k", "v"} - set(tensors)), sorted(set(tensors) - {"k", "v"})
        raise ArtefactError(f"{path} is no buffer: missing {missing or 'nothing'}; unexpected {unexpected or 'nothing'}")
    made = _check(KeyValues(tensors["k"], tensors["v"], *_places(path, contents[BUFFER_FILE])), str(path))
    layers, _, heads, size = made.k.shape
    if (layers, heads, size) != shape:
        raise ArtefactError(
            f"{path} does not fit this base: its slots have {layers} layers of {heads} heads of {size}, the base "
            f"{shape[0]} of {shape[1]} of {shape[2]}"
        )
    return made


def _places(path: Path, data: bytes) -> tuple[int, int, str]:
    """(header, context, layout) from the metadata of a safetensors file that was parsed before; ArtefactError."""
    size = int.from_bytes(data[:8], "little")
    try:
        about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_ABOUT])
        header, context, layout = about["header"], about["context"], about["layout"]
        holds = about.get("holds")
        if len(about) == 4 and holds == _HOLDS and type(header) is type(context) is int and min(header, context) >= 0:
            return header, context, layout
    except (ValueError, TypeError, KeyError):
        pass
    else:
        if holds != _HOLDS:
            raise ArtefactError(f"{path} is of an earlier memjax, whose slots held what follows a text; write it again")
    raise ArtefactError(f"{path} is no buffer: its metadata are not header, context and layout")


def _check(buffer: KeyValues, where: str) -> KeyValues:
    if buffer.k.ndim != 4 or buffer.k.shape != buffer.v.shape or 0 in buffer.k.shape:
        raise ArtefactError(f"{where} has k {list(buffer.k.shape)} and v {list(buffer.v.shape)}; both must be [L,M,K,H]")
    if bad := [name for name in ("k", "v") if not np.isfinite(getattr(buffer, name)).all()]:
        raise ArtefactError(f"{where} has values that are not finite in {', '.join(bad)}; write it again")
    places(buffer.k.shape[1], buffer.header, buffer.context, buffer.layout)
    return buffer
