"""A Hugging Face folder as our parameter tree: config.json, safetensors in one file or in shards, and the base's id."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from memjax.errors import WeightsError
from memjax.ids import base_id
from memjax.models.config import ModelConfig
from memjax.models.weights import names

ID_FILE = "memjax_base_id.json"
REMEMBER_FROM = 64 << 20  # bytes of weights from which hashing at each load takes longer than people care to wait
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a folder holds: the config, Hugging Face's own config dict, the NumPy parameter tree and the base's id."""

    config: ModelConfig
    hf_config: dict[str, Any]
    params: dict[str, Any]
    base_id: str


class Shards:
    """The tensors of a folder's safetensors files, read one at a time through the operating system's page cache."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.files = shard_files(folder)
        self._owner: dict[str, Any] = {}
        for path in self.files:
            try:
                handle = stack.enter_context(safe_open(path, framework="np"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path} cannot be read as safetensors ({error}); fetch or save it again") from None
            for name in list(handle.keys()):
                if name in self._owner:
                    raise WeightsError(f"tensor {name} is in two files of {folder}; keep one of them")
                self._owner[name] = handle
        _check_index(folder, self._owner)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(self._owner[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype; WeightsError for quantised or integer tensors."""
        stored = self._owner[name].get_slice(name).get_dtype()
        if stored not in STORED_DTYPES:
            raise WeightsError(
                f"tensor {name} in {self.folder} is stored as {stored}; supported: {', '.join(STORED_DTYPES)}, "
                "so use an unquantised copy of this base or its GGUF file"
            )
        return STORED_DTYPES[stored]

    def get(self, name: str) -> np.ndarray:
        """The tensor as stored."""
        return self._owner[name].get_tensor(name)


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """The folder's config.json, or another; WeightsError if it is absent or not a JSON object."""
    path = Path(folder) / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{folder} has no {name}, so it is not a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return config


def load_folder(folder: str | Path, dtype: Any = None) -> Loaded:
    """The base in a Hugging Face folder, with parameters in `dtype` (default: that of the stored embedding).

    Per-layer tensors are copied one by one into preallocated stacks [L, ...], so that the peak is the tree plus one
    tensor. Raises WeightsError for an unsupported architecture, for tensors that are missing, unexpected or misshapen
    (both lists are named), for values that are not finite.
    """
    from memjax.models.decoder import abstract_params

    folder = Path(folder)
    hf_config = read_config(folder)
    try:
        config = ModelConfig.from_hf(hf_config)
    except KeyError as error:
        raise WeightsError(f"{folder / 'config.json'} lacks {error.args[0]!r}") from None
    with contextlib.ExitStack() as stack:
        shards = Shards(folder, stack)
        sources = [name for name in shards.names if not (config.tied and name == names.TIED_HEAD)]
        table = names.hf_table(config)
        placements = names.match(table, sources, config.num_layers, where=str(folder), ignored=names.IGNORED)
        shapes = {path: leaf.shape for path, leaf in names.flatten(abstract_params(config)).items()}
        names.check_targets(placements, shapes)
        _check_tied_head(folder, shards, config)
        target_dtype = np.dtype(dtype) if dtype is not None else shards.dtype("model.embed_tokens.weight")
        leaves = fill(shards, placements, shapes, target_dtype)
        identity = folder_id(shards, [place.source for place in placements])
    return Loaded(config, hf_config, names.unflatten(leaves), identity)


def fill(
    shards: Shards, placements: list[names.Placement], shapes: dict[str, tuple[int, ...]], dtype: np.dtype
) -> dict[str, np.ndarray]:
    """{dotted path: array} of these shapes, every tensor in its place; WeightsError for a wrong shape or value."""
    _check_shapes(shards.folder, shards, placements, shapes)
    leaves = {path: np.empty(shape, dtype) for path, shape in shapes.items()}
    for place in placements:
        source = shards.get(place.source)
        if not all_finite(source):
            raise WeightsError(f"tensor {place.source} in {shards.folder} holds NaN or infinite values; fetch it again")
        if place.transform == "transpose":
            source = source.T
        leaves[place.target][... if place.layer is None else place.layer] = source
    return leaves


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a folder's weights; WeightsError if there are none or one is absent."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        others = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {others[0]} is a pickle and is never opened: save it again as safetensors" if others else ""
        raise WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise WeightsError(f"{folder} lacks {', '.join(absent)}, which {INDEX} names; fetch the folder again")
    return files


def save_tensors(path: Path, tensors: Iterable[tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]]) -> None:
    """Writes (name, dtype, shape, make) to a safetensors file, making one tensor at a time to keep memory small."""
    codes = {dtype: code for code, dtype in STORED_DTYPES.items()}
    rows, offset = list(tensors), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, dtype, shape, _ in rows:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape, make in rows:
            array = np.ascontiguousarray(make(), dtype)
            if array.shape != tuple(shape):
                raise WeightsError(f"tensor {name} has shape {array.shape} where {tuple(shape)} was declared")
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; bfloat16 is looked at as bits, which is many times faster."""
    if array.dtype == ml_dtypes.bfloat16:
        return not np.any((array.view(np.uint16) & 0x7F80) == 0x7F80)
    return bool(np.isfinite(array).all())


def folder_id(shards: Shards, sources: list[str], remember_from: int = REMEMBER_FROM) -> str:
    """The base id over the canonical tensors as stored; that of weights of `remember_from` bytes or more is remembered
    beside them until a file changes."""
    stamp = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in shards.files}
    path = shards.folder / ID_FILE
    remember = sum(size for size, _ in stamp.values()) >= remember_from
    if remember:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_text())
            if isinstance(known, dict) and known.get("files") == stamp and isinstance(known.get("base_id"), str):
                return known["base_id"]
    identity = base_id((name, shards.get(name)) for name in sources)
    if remember:
        # A folder that cannot be written (a read-only mount, another user's cache) costs a hash at each load, no more.
        with contextlib.suppress(OSError):
            _write_atomic(path, json.dumps({"base_id": identity, "files": stamp}, indent=1))
    return identity


def _write_atomic(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{index} does not hold a weight_map of tensor names to files") from None


def _check_index(folder: Path, owner: Iterable[str]) -> None:
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return
    named, held = set(_weight_map(folder / INDEX)), set(owner)
    if named != held:
        lists = names.both_lists(sorted(named - held), sorted(held - named))
        raise WeightsError(f"the shards of {folder} are not those of its index: {lists}")


def _check_shapes(
    folder: Path, shards: Shards, placements: list[names.Placement], shapes: dict[str, tuple[int, ...]]
) -> None:
    wrong = []
    for place in placements:
        shards.dtype(place.source)
        want = shapes[place.target][0 if place.layer is None else 1 :]
        want = want[::-1] if place.transform == "transpose" else want
        if shards.shape(place.source) != want:
            wrong.append(f"{place.source} is {list(shards.shape(place.source))}, not {list(want)}")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise WeightsError(f"{folder} does not fit its config.json: {'; '.join(wrong[:4])}{more}")


def _check_tied_head(folder: Path, shards: Shards, config: ModelConfig) -> None:
    if not config.tied or names.TIED_HEAD not in shards.names:
        return
    head, embed = shards.get(names.TIED_HEAD), shards.get("model.embed_tokens.weight")
    if head.dtype != embed.dtype or head.shape != embed.shape or not np.array_equal(head, embed):
        raise WeightsError(
            f"{folder} says tie_word_embeddings but its {names.TIED_HEAD} differs from the embedding; "
            "set tie_word_embeddings to false in config.json if the head is meant"
        )
