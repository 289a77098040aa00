"""The artefact format: a memory as a folder of one adapter or buffer, with a manifest beside it.

    adapter_config.json, adapter_model.safetensors    an adapter, as PEFT and vLLM read it (`memory.peft`)
    buffer.safetensors                                or a buffer (`memory.buffer_file`)
    memory.json                                       the manifest: id, key, what it was written from, each file's sha256

The same memory always has the same bytes, and nothing is ever pickled. Everything here is NumPy, so that a process that
only keeps memories need not load JAX.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memjax import ids
from memjax.errors import ArtefactError, BaseMismatchError
from memjax.memory.buffer_file import BUFFER_FILE, BufferLike, buffer_files, parse_buffer
from memjax.memory.peft import CONFIG_FILE, WEIGHTS_FILE, AdapterLike, adapter_files, parse_adapter
from memjax.memory.raw import json_bytes, parse_json, read_file

FORMAT = 1
MANIFEST = "memory.json"
FILES = {"adapter": (CONFIG_FILE, WEIGHTS_FILE), "buffer": (BUFFER_FILE,)}  # of each kind of memory


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
    """A memory: id, key, kind, the artefact (`peft.Factors` or `buffer_file.KeyValues`), and its `Meta` as a dict."""

    id: str
    key: str
    kind: str
    artefact: Any
    provenance: dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- writing


def write_artefact(
    folder: Path, artefact: AdapterLike | BufferLike, module_names: Mapping[str, str], meta: Meta, dtype: str = "float32"
) -> Memory:
    """Write an adapter or a buffer (`meta.kind`) and its manifest into `folder` (new or empty); the memory as read back.

    module_names: {site: module path within a layer}, e.g. {"q": "self_attn.q_proj"}; names every site of an adapter.
    dtype: "float32" or "bfloat16", of the stored values. ArtefactError if a value is not finite, the shapes do not
    agree, or the folder holds files already. The files are not fsynced here; the bank does that before it commits.
    """
    folder = Path(folder)
    where = f"the {meta.kind} to be written to {folder}"
    stored: Any
    if meta.kind == "adapter":
        stored, contents = adapter_files(artefact, module_names, meta.base_name, dtype, where)  # type: ignore[arg-type]
    elif meta.kind == "buffer":
        stored, contents = buffer_files(artefact, dtype, where)  # type: ignore[arg-type]
    else:
        raise ArtefactError(f"a memory is one of {', '.join(FILES)}, not {meta.kind!r}")
    hashes = {name: ids.bytes_hash(data) for name, data in contents.items()}
    memory_id = ids.memory_id(meta.key, ids.files_hash(hashes))
    provenance = {field.name: getattr(meta, field.name) for field in dataclasses.fields(Meta)}
    provenance |= {"recipe": dict(meta.recipe), "metrics": dict(meta.metrics)}
    manifest = {"format": FORMAT, "id": memory_id, "key": meta.key, "files": hashes, "provenance": provenance}
    contents[MANIFEST] = json_bytes(manifest)

    folder.mkdir(parents=True, exist_ok=True)
    if present := sorted(path.name for path in folder.iterdir()):
        raise ArtefactError(f"{folder} already holds {', '.join(present[:3])}; a memory is written into an empty folder")
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return Memory(memory_id, meta.key, meta.kind, stored, json.loads(contents[MANIFEST])["provenance"])


# -------------------------------------------------------------------------------------------------------------- reading


def read_artefact(
    folder: Path,
    site_shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    module_names: Mapping[str, str],
    base_id: str | None = None,
    heads: tuple[int, int] | None = None,
) -> Memory:
    """The memory in `folder`, checked in full: hashes, ids, tensor names, shapes, finite values.

    site_shapes {site: (I, F)}, num_layers and, for buffers, heads (K, H) come from the base's config; an adapter may carry
    some of the sites only.
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
    artefact: Any
    if provenance["kind"] == "adapter":
        artefact = parse_adapter(folder, contents, site_shapes, num_layers, module_names)
    elif heads is not None:
        artefact = parse_buffer(folder, contents, (num_layers, *heads))
    else:
        raise ArtefactError(f"the memory in {folder} is a buffer, and an adapter is wanted here")
    return Memory(manifest["id"], manifest["key"], provenance["kind"], artefact, provenance)


def read_manifest(folder: Path) -> dict[str, Any]:
    """memory.json of a folder, its fields checked and its ids recomputed, or ArtefactError; no other file is opened."""
    path = Path(folder) / MANIFEST
    manifest = parse_json(path, read_file(path))
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
        contents[name] = read_file(folder / name)
        if ids.bytes_hash(contents[name]) != expected:
            raise ArtefactError(
                f"{folder / name} is damaged: its bytes are not those that were written; "
                "delete this memory and write it again"
            )
    kind = manifest["provenance"]["kind"]
    if kind not in FILES:
        raise ArtefactError(f"{folder / MANIFEST} describes a {kind!r}; this version of memjax reads {' and '.join(FILES)}")
    if missing := sorted(set(FILES[kind]) - set(contents)):
        raise ArtefactError(f"{folder / MANIFEST} does not list {', '.join(missing)}; write this memory again")
    return manifest, contents


def _in_brackets(name: str) -> str:
    return f" ({name})" if name else ""
