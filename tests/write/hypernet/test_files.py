"""A hypernetwork as files: what is written is read, and what does not fit is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memjax import ids
from memjax.errors import ArtefactError, BaseMismatchError, ConfigError, InputError
from memjax.write.hypernet.files import ABOUT_FILE, WEIGHTS_FILE, load_hyper, save_hyper
from tests.write.hypernet.support import BASE, hyper


def saved(folder, **options):
    return save_hyper(folder, hyper(), "small", {"steps": 3}, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read(tmp_path, dtype):
    written = saved(tmp_path / "net", dtype=dtype)
    read = load_hyper(tmp_path / "net", BASE)
    assert (read.config, read.affixes, read.max_chunk, read.id) == (
        written.config, written.affixes, written.max_chunk, written.id,
    )  # fmt: skip
    assert jax.tree.structure(read.params) == jax.tree.structure(hyper().params)
    for one, other in zip(jax.tree.leaves(read.params), jax.tree.leaves(written.params), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.float32
    assert save_hyper(tmp_path / "again", hyper(), "other", {"steps": 4}, dtype).id == read.id
    other = save_hyper(tmp_path / "other", dataclasses.replace(hyper(), max_chunk=9), "", {}, dtype)
    assert other.id != read.id


def change(folder, **changes):
    about = json.loads((folder / ABOUT_FILE).read_text())
    (folder / ABOUT_FILE).write_text(json.dumps({**about, **changes}))


def tamper(folder, edit):
    """Other weights under a right hash, so that names, shapes and values are what is looked at."""
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    change(folder, weights=ids.file_hash(folder / WEIGHTS_FILE))


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    folder = tmp_path / "net"
    saved(folder)
    with pytest.raises(BaseMismatchError, match=rf"{BASE.id}.*{'f' * 64}"):
        load_hyper(folder, dataclasses.replace(BASE, id="f" * 64))
    change(folder, format=9)
    with pytest.raises(ArtefactError, match="not a hypernetwork of format 1"):
        load_hyper(folder, BASE)
    saved(folder)
    change(folder, max_chunk="9")
    with pytest.raises(ArtefactError, match="max_chunk a positive number"):
        load_hyper(folder, BASE)
    saved(folder)
    change(folder, network={"widht": 3})
    with pytest.raises(ConfigError, match="the nearest is width"):
        load_hyper(folder, BASE)
    saved(folder)
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-4])
    with pytest.raises(ArtefactError, match="bytes are not those"):
        load_hyper(folder, BASE)
    for edit, told in (
        (lambda t: t.update(hed=t.pop("head")), "missing head; unexpected hed"),
        (lambda t: t.update(head=t["head"][:1]), r"head is \[1, 2, 16, 80\], not \[3, 2, 16, 80\]"),
        (lambda t: t["head"].fill(np.nan), "not finite in head"),
    ):
        saved(folder)
        tamper(folder, edit)
        with pytest.raises(ArtefactError, match=told):
            load_hyper(folder, BASE)
    with pytest.raises(ArtefactError, match=r"hyper\.json cannot be read"):
        load_hyper(tmp_path / "none", BASE)
    broken = jax.tree.map(lambda x: x * np.nan, hyper().params)
    with pytest.raises(ArtefactError, match="not finite"):
        save_hyper(tmp_path / "nan", dataclasses.replace(hyper(), params=broken))


def test_what_ships_fits_its_base_and_only_an_embedded_name_finds_it():
    from memjax.models.base import load
    from memjax.write.hypernet.files import SHIPPED, shipped_hyper

    for folder in SHIPPED.iterdir():
        base = load(folder.name)
        for learnt in folder.iterdir():
            assert load_hyper(shipped_hyper(base.name, learnt.name), base).max_chunk > 0
    with pytest.raises(InputError, match=r"trained on niah ships for base smollm2-135m; .* --hyper DIR"):
        shipped_hyper("smollm2-135m", "niah")
    with pytest.raises(InputError, match="no hypernetwork"):
        shipped_hyper(str(SHIPPED / "tiny"), "niah")
