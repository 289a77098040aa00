"""Memories in and out of the bank: PEFT folders, one adapter each, and one tar file for a whole namespace.

What comes in is checked in full before anything is kept, and nothing in it is ever unpickled or run. An adapter that was
made elsewhere has no source: it can never pass for the memory of a text, whatever its files say.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memjax import ids
from memjax.bank.store import DEFAULT_NAMESPACE, Bank, Entry
from memjax.errors import ArtefactError, BankError, BaseMismatchError, InputError
from memjax.memory.buffer_file import KeyValues
from memjax.memory.files import FILES, MANIFEST, Memory, Meta, check_folder, read_artefact, read_manifest, write_artefact
from memjax.memory.peft import Factors, read_peft

if TYPE_CHECKING:
    from memjax.models.base import Base

_FORMAT = 1
_LIST = "namespace.json"
_FIELDS = {"name", "id", "text", "questions", "metadata", "expires_at"}


@dataclasses.dataclass(frozen=True)
class BaseShape:
    """What a memory must fit: a base's ids, its layers, {site: (I, F)}, {site: module name}, and heads (K, H)."""

    base_id: str
    base_name: str
    tokenizer_id: str
    template_id: str
    num_layers: int
    site_shapes: Mapping[str, tuple[int, int]]
    module_names: Mapping[str, str]
    heads: tuple[int, int]

    @classmethod
    def of(cls, base: Base) -> BaseShape:
        """That of a loaded base."""
        from memjax.models.decoder import site_shapes
        from memjax.models.weights import SITE_MODULES

        token_ids = (base.tokenizer.id, base.tokenizer.template_id)
        config = base.config
        heads = (config.num_kv_heads, config.head_size)
        return cls(base.id, base.name, *token_ids, config.num_layers, site_shapes(config), SITE_MODULES, heads)


def export_memory(bank: Bank, name: str, to: Path, namespace: str = DEFAULT_NAMESPACE) -> Entry:
    """Copy a memory's folder to `to`, which is new or empty; that of an adapter PEFT and vLLM load as it is.

    Its manifest goes with it, so that `import_memory` can tell which base it is for; neither text nor questions do.
    All or nothing. ArtefactError where a file is damaged, InputError where `to` holds something.
    """
    entry = bank.get(name, namespace)
    folder, to = bank.folder(entry.id), Path(to)
    if problems := check_folder(folder):
        raise ArtefactError(f"memory {name!r} cannot be exported: {problems[0]}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to} is not empty; name a new folder to export to")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        copy = Path(scratch) / "memory"
        shutil.copytree(folder, copy, copy_function=shutil.copyfile)
        if to.exists():
            to.rmdir()
        os.rename(copy, to)
    return entry


def import_memory(
    bank: Bank,
    base: BaseShape,
    folder: Path,
    name: str,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    text: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    licence: str = "",
) -> Entry:
    """Keep the adapter of a PEFT folder, or an exported buffer, as a memory of this base; its entry. Twice is one memory.

    text: what to retrieve it by; without it, it is found by name only. What is more than a plain LoRA of this base's shape
    is refused by name (`memory.peft.read_peft`). A folder with a manifest is also compared with its hashes and its base;
    BaseMismatchError if that is another. Without one only the shapes can tell whose adapter it is.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; name one that PEFT's save_pretrained wrote")
    shape = (base.site_shapes, base.num_layers, base.module_names)
    kind, artefact = "adapter", None
    if (folder / MANIFEST).exists():
        memory = read_artefact(folder, *shape, base_id=base.base_id, heads=base.heads)
        kind, artefact, licence = memory.kind, memory.artefact, licence or memory.provenance["licence"]
        if kind == "buffer" and memory.provenance["template_id"] != base.template_id:
            raise BaseMismatchError(f"the buffer in {folder} was written with another prompt template; write it again")
    else:
        artefact = read_peft(folder, *shape)
    files = {each: ids.file_hash(folder / each) for each in FILES[kind]}
    recipe = {"writer": "import", "files": ids.files_hash(files)}
    ids_of_base = (base.base_id, base.tokenizer_id, base.template_id)
    meta = Meta(*ids_of_base, recipe, kind=kind, base_name=base.base_name, licence=licence)

    def write(new: Path) -> Memory:
        return write_artefact(new, artefact, base.module_names, meta, _kept_dtype(artefact))

    return bank.add(name, meta.key, write, namespace=namespace, text=text, metadata=metadata)


def export_namespace(bank: Bank, to: Path, namespace: str = DEFAULT_NAMESPACE) -> int:
    """Write the current memories of a namespace, with texts, questions and metadata, to one new tar file; their number.

    Past versions and calibrations stay behind. ArtefactError where a memory is damaged, InputError where `to` exists.
    """
    to, rows = Path(to), []
    if to.exists():
        raise InputError(f"{to} exists; name a new file to export to")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        whole = Path(scratch) / "bank.tar"
        with tarfile.open(whole, "w") as tar:
            packed = set()
            for entry in bank.list(namespace):
                if entry.id not in packed:
                    if problems := check_folder(bank.folder(entry.id)):
                        raise ArtefactError(f"memory {entry.name!r} cannot be exported: {problems[0]}")
                    tar.add(bank.folder(entry.id), f"memories/{entry.id}", filter=_anonymous)
                    packed.add(entry.id)
                kept = {"text": bank.text(entry.name, namespace), "questions": bank.questions(entry.name, namespace)}
                rows.append({field: kept.get(field, getattr(entry, field, None)) for field in sorted(_FIELDS)})
            about = {"format": _FORMAT, "base_id": bank.base_id, "base_name": bank.base_name, "memories": rows}
            data = json.dumps(about, ensure_ascii=False).encode()
            info = tarfile.TarInfo(_LIST)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        os.rename(whole, to)
    return len(rows)


def import_namespace(bank: Bank, source: Path, namespace: str = DEFAULT_NAMESPACE) -> list[Entry]:
    """Add all memories of a file of `export_namespace`; what the namespace holds already is left as it is.

    Every name is compared with the namespace before the first one is added. BankError for a file that is no such export
    or a name that is taken, BaseMismatchError for another base, ArtefactError for damaged files. The keys in the file are
    believed, so import only what comes from a bank of your own.
    """
    with tempfile.TemporaryDirectory(prefix="memjax-") as scratch:
        about = _unpack(Path(source), Path(scratch))
        if bank.base_id is not None:
            _check_base(Path(source), about, bank)
        manifests: dict[str, dict[str, Any]] = {}
        for row in about["memories"]:
            folder = Path(scratch) / row["id"]
            if problems := check_folder(folder):
                raise ArtefactError(f"{source}: memory {row['name']!r}: {problems[0]}")
            manifest = manifests.setdefault(row["id"], read_manifest(folder))
            if manifest["id"] != row["id"] or manifest["provenance"]["base_id"] != about["base_id"]:
                raise ArtefactError(f"{source}: the files of memory {row['name']!r} are those of another memory")
            taken = bank.find(row["name"], namespace)
            if taken is not None and taken.key != manifest["key"]:
                raise BankError(f"the name {row['name']!r} is taken by another memory; import into another namespace")
        return [
            _add_row(bank, row, manifests[row["id"]], Path(scratch) / row["id"], namespace) for row in about["memories"]
        ]


def _add_row(bank: Bank, row: dict[str, Any], manifest: dict[str, Any], folder: Path, namespace: str) -> Entry:
    def write(new: Path) -> Memory:
        shutil.copytree(folder, new, dirs_exist_ok=True, copy_function=shutil.copyfile)
        return Memory(manifest["id"], manifest["key"], manifest["provenance"]["kind"], None, manifest["provenance"])

    kept = {field: row[field] for field in ("text", "questions", "metadata", "expires_at")}
    return bank.add(row["name"], manifest["key"], write, namespace=namespace, **kept)


def _check_base(source: Path, about: Mapping[str, Any], bank: Bank) -> None:
    if about["base_id"] != bank.base_id:
        raise BaseMismatchError(
            f"{source} holds memories of base {about['base_id']} ({about['base_name']}), and bank {bank.path} is for base "
            f"{bank.base_id} ({bank.base_name}); import it into another bank"
        )


def _unpack(source: Path, room: Path) -> dict[str, Any]:
    """The list of an exported namespace; files are put in room/<id>/. Only plain files of known names are read."""
    try:
        with tarfile.open(source, "r:") as tar:
            about = json.loads(_read_member(tar, _LIST))
            if about["format"] != _FORMAT or not all(set(row) == _FIELDS for row in about["memories"]):
                raise ValueError("its list has another format")
            for memory_id in {row["id"] for row in about["memories"]}:
                if len(memory_id) != 64 or set(memory_id) - set("0123456789abcdef"):
                    raise ValueError(f"{memory_id!r} is no id")
                (room / memory_id).mkdir()
                manifest = _read_member(tar, f"memories/{memory_id}/{MANIFEST}")
                (room / memory_id / MANIFEST).write_bytes(manifest)
                for file in FILES[json.loads(manifest)["provenance"]["kind"]]:
                    (room / memory_id / file).write_bytes(_read_member(tar, f"memories/{memory_id}/{file}"))
            return about
    except FileNotFoundError:
        raise BankError(f"{source} does not exist; name a file that `memjax bank export` wrote") from None
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise BankError(f"{source} is no exported namespace, or damaged: {error}") from None


def _read_member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(tar.getmember(name))
    if file is None:
        raise ValueError(f"{name} is no plain file")
    return file.read()


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """A member without the names and times of this machine."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    return info


def _kept_dtype(artefact: Factors | KeyValues) -> str:
    """bfloat16 stays what it is; everything else is kept as float32, which holds float16 exactly."""
    arrays = artefact.a.values() if isinstance(artefact, Factors) else (artefact.k, artefact.v)
    return "bfloat16" if all(x.dtype.name == "bfloat16" for x in arrays) else "float32"
