"""A buffer on disk: read back bit for bit, an id of its own, and every damage or misfit refused by name."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from memjax import ids
from memjax.errors import ArtefactError, BaseMismatchError
from memjax.memory.buffer import Buffer
from memjax.memory.buffer_file import BUFFER_FILE, KeyValues
from memjax.memory.files import MANIFEST, Meta, check_folder, read_artefact, write_artefact
from memjax.memory.peft import Factors

LAYERS, SLOTS, HEADS, SIZE = 2, 5, 3, 4
META = Meta("b" * 64, "t" * 64, "", {"writer": "compile", "ratio": 4}, "s" * 64, kind="buffer", base_name="tiny")


def made(seed=0, **changes):
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(LAYERS, SLOTS, HEADS, SIZE)).astype(np.float32) for _ in "kv")
    return KeyValues(k, v, 3, 20, "compact")._replace(**changes)


def read(folder, layers=LAYERS, heads=(HEADS, SIZE), **options):
    return read_artefact(folder, {}, layers, {}, heads=heads, **options)


@pytest.fixture
def folder(tmp_path):
    write_artefact(tmp_path / "m", made(), {}, META)
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_write_returned(tmp_path, dtype):
    memory = write_artefact(tmp_path / "m", made(), {}, META, dtype)
    again = read(tmp_path / "m", base_id=META.base_id)
    assert (again.id, again.key, again.kind, again.provenance) == (memory.id, META.key, "buffer", memory.provenance)
    for name in ("k", "v"):
        mine, kept = getattr(memory.artefact, name), getattr(again.artefact, name)
        assert kept.dtype == mine.dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
        np.testing.assert_array_equal(kept, mine)
    assert again.artefact[2:] == (3, 20, "compact")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [BUFFER_FILE, MANIFEST]


def test_a_buffer_of_jax_is_written_alike(tmp_path):
    first = write_artefact(tmp_path / "1", made(), {}, META)
    assert write_artefact(tmp_path / "2", Buffer(*made()), {}, META).id == first.id
    assert write_artefact(tmp_path / "3", made(seed=1), {}, META).id != first.id
    assert write_artefact(tmp_path / "4", made(layout="in_place"), {}, META).id != first.id
    assert Buffer(*read(tmp_path / "2").artefact).slots == SLOTS


@pytest.mark.parametrize("name", [BUFFER_FILE, MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_every_damaged_file_is_named(folder, name, harm):
    path = folder / name
    data = path.read_bytes()
    if harm == "delete":
        path.unlink()
    else:
        at = data.index(b'"ratio": 4') + 9 if name == MANIFEST else len(data) - 3
        path.write_bytes(
            data[: len(data) // 2] if harm == "truncate" else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        )
    with pytest.raises(ArtefactError) as caught:
        read(folder)
    assert str(path) in str(caught.value)
    assert check_folder(folder)


def rewritten(folder, tensors, **about):
    """The folder with another buffer file in it, and a manifest that says so."""
    save_file(tensors, folder / BUFFER_FILE, metadata={"buffer": json.dumps(about)} if about else None)
    files = {BUFFER_FILE: ids.file_hash(folder / BUFFER_FILE)}
    told = json.loads((folder / MANIFEST).read_text())
    told |= {"files": files, "id": ids.memory_id(told["key"], ids.files_hash(files))}
    (folder / MANIFEST).write_text(json.dumps(told))
    return folder


def test_what_is_no_buffer_is_refused(folder):
    k, v = made()[:2]
    about = {"header": 3, "context": 20, "layout": "compact", "holds": "text"}
    earlier = {name: value for name, value in about.items() if name != "holds"}
    for tensors, told, message in (
        ({"k": k}, about, r"missing \['v'\]; unexpected nothing"),
        ({"k": k, "v": v, "w": v}, about, r"unexpected \['w'\]"),
        ({"k": k, "v": v[:, :2]}, about, r"\[2, 5, 3, 4\] and v \[2, 2, 3, 4\]"),
        ({"k": k, "v": np.full_like(v, np.inf)}, about, "not finite in v"),
        ({"k": k, "v": v}, {}, "metadata are not header, context and layout"),
        ({"k": k, "v": v}, earlier, "of an earlier memjax"),
        ({"k": k, "v": v}, {**about, "more": 1}, "metadata are not header, context and layout"),
        ({"k": k, "v": v}, {**about, "header": -1}, "metadata are not header, context and layout"),
        ({"k": k, "v": v}, {**about, "layout": "heap"}, "'heap' is unknown"),
        ({"k": k, "v": v}, {**about, "layout": "spread", "context": 4}, "cannot be spread"),
    ):
        with pytest.raises(ArtefactError, match=message):
            read(rewritten(folder, tensors, **told))


def test_another_base_is_refused(folder):
    with pytest.raises(BaseMismatchError, match="b" * 64):
        read(folder, base_id="c" * 64)
    for layers, heads in ((3, (HEADS, SIZE)), (LAYERS, (HEADS, 8))):
        with pytest.raises(ArtefactError, match="2 layers of 3 heads of 4, the base"):
            read(folder, layers, heads)
    with pytest.raises(ArtefactError, match="is a buffer, and an adapter is wanted"):
        read_artefact(folder, {}, LAYERS, {})


def test_nothing_is_written_that_could_not_be_read(tmp_path):
    bad = made()
    bad.k[0, 0, 0, 0] = np.nan
    adapter = Factors({"q": np.ones((1, 1, 4))}, {"q": np.ones((1, 1, 4))}, 1.0)
    for artefact, meta, message in (
        (bad, META, "the buffer to be written to .* not finite in k"),
        (made(layout="heap"), META, "'heap' is unknown"),
        (adapter, dataclasses.replace(META, kind="adapters"), "one of adapter, buffer, not 'adapters'"),
    ):
        with pytest.raises(ArtefactError, match=message):
            write_artefact(tmp_path / "bad", artefact, {"q": "self_attn.q_proj"}, meta)
        assert not (tmp_path / "bad").exists()
