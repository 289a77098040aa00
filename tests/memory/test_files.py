"""The artefact format: exact round trips, PEFT in both directions, and a refusal by name for everything else."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from memjax import ids
from memjax.errors import ArtefactError, BaseMismatchError
from memjax.memory.files import Meta, check_folder, read_artefact, read_manifest, write_artefact
from memjax.memory.peft import Factors

LAYERS = 2
META = Meta("b" * 64, "t" * 64, "", {"writer": "distill", "steps": 4}, "s" * 64, base_name="tiny", metrics={"loss": 0.25})


def make_factors(shapes, rank=3, seed=0, scale=0.5):
    rng = np.random.default_rng(seed)
    a = {site: rng.normal(size=(LAYERS, rank, i)).astype(np.float32) for site, (i, _) in shapes.items()}
    b = {site: rng.normal(size=(LAYERS, rank, f)).astype(np.float32) for site, (_, f) in shapes.items()}
    return Factors(a, b, scale)


@pytest.fixture
def written(tmp_path, shapes, modules):
    folder = tmp_path / "memory"
    return folder, write_artefact(folder, make_factors(shapes), modules, META)


def assert_same(left, right):
    assert set(left.a) == set(right.a)
    assert left.scale == right.scale
    for site in left.a:
        assert left.a[site].dtype == right.a[site].dtype
        np.testing.assert_array_equal(left.a[site], right.a[site])
        np.testing.assert_array_equal(left.b[site], right.b[site])


# --------------------------------------------------------------------------------------------------------- round trips


def test_layers_that_are_left_alone_take_no_room(tmp_path, shapes, modules):
    factors = make_factors(shapes)
    for tree in (factors.a, factors.b):
        for array in tree.values():
            array[0] = 0.0
    memory = write_artefact(tmp_path / "m", factors, modules, META)
    again = read_artefact(tmp_path / "m", shapes, LAYERS, modules)
    assert_same(again.artefact, memory.artefact)
    assert_same(again.artefact, factors)
    assert json.loads((tmp_path / "m" / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    stored = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert stored
    assert not [name for name in stored if ".layers.0." in name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_write_returned(tmp_path, shapes, modules, dtype):
    factors = make_factors(shapes, scale=0.3)
    memory = write_artefact(tmp_path / "m", factors, modules, META, dtype)
    again = read_artefact(tmp_path / "m", shapes, LAYERS, modules, base_id=META.base_id)
    assert_same(memory.artefact, again.artefact)
    assert (again.id, again.key, again.kind) == (memory.id, META.key, "adapter")
    assert again.provenance == memory.provenance
    assert again.provenance["metrics"] == {"loss": 0.25}
    assert again.artefact.scale == float(np.float32(0.3))
    if dtype == "float32":
        assert_same(again.artefact, factors._replace(scale=float(np.float32(0.3))))
    else:
        np.testing.assert_array_equal(again.artefact.a["q"], factors.a["q"].astype(ml_dtypes.bfloat16))


def test_same_memory_same_bytes_and_id_other_values_other_id(tmp_path, shapes, modules):
    first = write_artefact(tmp_path / "1", make_factors(shapes), modules, META)
    shuffled = make_factors(shapes)
    shuffled = Factors(dict(reversed(shuffled.a.items())), shuffled.b, shuffled.scale)
    second = write_artefact(tmp_path / "2", shuffled, dict(reversed(modules.items())), META)
    assert first.id == second.id
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    third = write_artefact(tmp_path / "3", make_factors(shapes, seed=1), modules, META)
    assert third.key == first.key
    assert third.id != first.id


def test_an_adapter_of_some_sites_reads_back_with_those_sites(tmp_path, shapes, modules):
    factors = make_factors({site: shapes[site] for site in ("down", "q")}, rank=1)
    write_artefact(tmp_path / "m", factors, modules, META)
    assert_same(read_artefact(tmp_path / "m", shapes, LAYERS, modules).artefact, factors)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_another_base_is_refused_with_both_ids(written, shapes, modules):
    with pytest.raises(BaseMismatchError) as caught:
        read_artefact(written[0], shapes, LAYERS, modules, base_id="c" * 64)
    assert "b" * 64 in str(caught.value)
    assert "c" * 64 in str(caught.value)
    assert "tiny" in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "memory.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "delete"])
def test_every_damaged_file_is_named(written, shapes, modules, name, harm):
    folder, _ = written
    assert check_folder(folder) == []
    path = folder / name
    data = bytearray(path.read_bytes())
    middle = data.index(b'"steps": 4') + 9 if name == "memory.json" else len(data) // 2
    data[middle] ^= 1
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes({"flip": data, "truncate": data[: len(data) // 2], "empty": b""}[harm])
    with pytest.raises(ArtefactError) as caught:
        read_artefact(folder, shapes, LAYERS, modules)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [line for line in check_folder(folder) if str(path) in line]


@pytest.mark.parametrize(
    ("field", "value"),
    [("id", "0" * 64), ("key", "0" * 64), ("format", 99), ("files", {}), ("files", {"../x": "0"}), ("provenance", {})],
)
def test_a_manifest_that_contradicts_itself_is_refused(written, field, value):
    path = written[0] / "memory.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ArtefactError, match=r"memory\.json"):
        read_manifest(written[0])


def test_files_that_do_not_belong_are_reported(written):
    (written[0] / "notes.txt").write_text("x")
    assert [line for line in check_folder(written[0]) if "notes.txt" in line]
    assert check_folder(written[0] / "nowhere") == [f"{written[0] / 'nowhere'} is missing"]


def test_another_shape_of_base_is_refused(written, shapes, modules):
    with pytest.raises(ArtefactError, match=r"missing .*layers\.2\."):
        read_artefact(written[0], shapes, 3, modules)
    with pytest.raises(ArtefactError, match=r"q_proj\.lora_A\.weight is \[3, 16\], not \[3, 20\]"):
        read_artefact(written[0], shapes | {"q": (20, 16)}, LAYERS, modules)
    with pytest.raises(ArtefactError, match=r"unexpected .*down_proj"):
        read_artefact(written[0], {s: shapes[s] for s in shapes if s != "down"}, LAYERS, modules)


def test_nothing_is_written_that_could_not_be_read(tmp_path, shapes, modules, written):
    bad = make_factors(shapes)
    bad.b["up"][0, 0, 0] = np.nan
    ragged = make_factors(shapes)
    ragged.a["q"] = ragged.a["q"][:, :2]
    cases = [
        (bad, META, "float32", "not finite at up"),
        (ragged, META, "float32", "one L and one R"),
        (make_factors(shapes), META, "int8", "choose one of float32, bfloat16"),
        (make_factors(shapes), Meta("b", "t", "", {}, metrics={"loss": float("nan")}), "float32", "plain, finite JSON"),
        (make_factors({"nose": (4, 4)}), META, "float32", "nose"),
        (make_factors(shapes, scale=float("inf")), META, "float32", "its scale"),
    ]
    for factors, meta, dtype, message in cases:
        with pytest.raises(ArtefactError, match=message):
            write_artefact(tmp_path / "bad", factors, modules, meta, dtype)
        assert not (tmp_path / "bad").exists()
    with pytest.raises(ArtefactError, match="empty folder"):
        write_artefact(written[0], make_factors(shapes), modules, META)


def test_the_key_is_known_before_writing(written):
    assert written[1].key == META.key == ids.memory_key("b" * 64, "t" * 64, "", {"steps": 4, "writer": "distill"}, "s" * 64)
