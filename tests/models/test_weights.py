"""Hugging Face folders: what is loaded, what is refused and how, and the identity of a base."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memjax.errors import WeightsError
from memjax.models.config import ModelConfig
from memjax.models.decoder import abstract_params
from memjax.models.weights import SITE_MODULES, load_folder
from memjax.models.weights.hf import ID_FILE, Shards, folder_id, save_tensors
from memjax.models.weights.names import check_targets, flatten, hf_table, match, unflatten
from tests.models import golden

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tied Llama of two layers."""
    return golden.write_folder(tmp_path / "base", golden.read("llama_grouped_tied"))


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """Rewrites the folder's weights after `edit` changed the dict."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def shard(folder: Path, parts: int = 3) -> Path:
    """Splits model.safetensors into an index and shards."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{i % parts}.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def edit_config(folder: Path, **traits: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | traits))
    return folder


def test_projections_are_stacked_and_transposed(folder: Path) -> None:
    weights, params = load_file(folder / "model.safetensors"), load_folder(folder).params
    for site, module in SITE_MODULES.items():
        for layer in range(2):
            np.testing.assert_array_equal(params["layers"][site][layer], weights[f"model.layers.{layer}.{module}.weight"].T)
    np.testing.assert_array_equal(params["embed"], weights["model.embed_tokens.weight"])
    assert "head" not in params


def test_tree_is_the_models_tree(folder: Path) -> None:
    loaded = load_folder(folder)
    wanted = {path: leaf.shape for path, leaf in flatten(abstract_params(loaded.config)).items()}
    assert {path: leaf.shape for path, leaf in flatten(loaded.params).items()} == wanted
    assert flatten(unflatten(wanted)) == wanted


def test_shards_give_the_same_base(folder: Path) -> None:
    single = load_folder(folder)
    sharded = load_folder(shard(folder))
    assert sharded.base_id == single.base_id
    for path, leaf in flatten(single.params).items():
        np.testing.assert_array_equal(leaf, flatten(sharded.params)[path])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bfloat16_storage_is_read_exactly_and_cast(folder: Path, dtype: Any) -> None:
    change(folder, lambda w: w.update({k: v.astype(ml_dtypes.bfloat16) for k, v in w.items()}))
    stored = load_file(folder / "model.safetensors")[Q0].T
    loaded = load_folder(folder, dtype)
    assert loaded.params["layers"]["q"].dtype == dtype
    np.testing.assert_array_equal(loaded.params["layers"]["q"][0].astype(np.float32), stored.astype(np.float32))
    assert load_folder(folder).params["embed"].dtype == ml_dtypes.bfloat16


def test_error_names_both_missing_and_unexpected(folder: Path) -> None:
    change(folder, lambda w: w.update({"model.layers.0.self_attn.qq.weight": w.pop(Q0)}))
    with pytest.raises(WeightsError, match=rf"missing: {Q0}; unexpected: model.layers.0.self_attn.qq.weight"):
        load_folder(folder)


def test_a_layer_too_many_is_unexpected(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing: none; unexpected: model\.layers\.1\.") as raised:
        load_folder(edit_config(folder, num_hidden_layers=1))
    assert "and 1 more" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_shapes_that_disagree_with_the_config_are_named(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"gate_proj\.weight is \[48, 32\], not \[56, 32\]"):
        load_folder(edit_config(folder, intermediate_size=56))


def test_old_rotary_buffers_are_ignored(folder: Path) -> None:
    before = load_folder(folder).base_id
    change(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert load_folder(folder).base_id == before


def test_a_tied_head_may_be_stored_but_must_be_the_embedding(folder: Path) -> None:
    before = load_folder(folder).base_id
    change(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].copy()}))
    assert load_folder(folder).base_id == before
    change(folder, lambda w: w.update({"lm_head.weight": w["lm_head.weight"] + 1}))
    with pytest.raises(WeightsError, match="differs from the embedding"):
        load_folder(folder)
    untied = load_folder(edit_config(folder, tie_word_embeddings=False))
    np.testing.assert_array_equal(untied.params["head"], untied.params["embed"].T + 1)


def test_an_untied_head_must_be_there(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        load_folder(edit_config(folder, tie_word_embeddings=False))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_must_be_finite(folder: Path, bad: float, dtype: Any) -> None:
    def spoil(weights: dict[str, np.ndarray]) -> None:
        weights[Q0] = weights[Q0].astype(dtype)
        weights[Q0][3, 2] = bad

    with pytest.raises(WeightsError, match=rf"{Q0} in .* NaN or infinite"):
        load_folder(change(folder, spoil))


def test_unsupported_architecture_is_refused_with_the_list(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"MambaForCausalLM is not supported; supported: LlamaForCausalLM, .*Gemma3"):
        load_folder(edit_config(folder, architectures=["MambaForCausalLM"]))


def test_quantised_tensors_are_refused(folder: Path) -> None:
    change(folder, lambda w: w.update({Q0: w[Q0].astype(np.int8)}))
    with pytest.raises(WeightsError, match=rf"{Q0} .* stored as I8"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "config.json lacks"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle and is never opened"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08" + 30 * b"\0"), "cannot be read as safetensors"),
        (lambda f: (shard(f) / "model-1.safetensors").unlink(), r"lacks model-1\.safetensors, which .*index"),
        (lambda f: (shard(f) / "model-0.safetensors").write_bytes((f / "model-1.safetensors").read_bytes()), "two"),
        (lambda f: (shard(f) / "model.safetensors.index.json").write_text("[]"), "does not hold a weight_map"),
    ],
)  # fmt: skip
def test_damaged_folders(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        load_folder(folder)


def test_id_is_of_the_weights_as_stored(folder: Path) -> None:
    before = load_folder(folder, np.float32).base_id
    assert load_folder(folder, ml_dtypes.bfloat16).base_id == before
    change(folder, lambda w: w[Q0].__setitem__((0, 0), w[Q0][0, 0] + 1))
    assert load_folder(folder).base_id != before


def remembered_id(folder: Path) -> str:
    """The id of the folder's weights, remembered however small they are."""
    with contextlib.ExitStack() as stack:
        shards = Shards(folder, stack)
        return folder_id(shards, shards.names, remember_from=0)


def test_id_is_remembered_until_a_file_changes(folder: Path) -> None:
    before = remembered_id(folder)
    assert before == load_folder(folder).base_id
    known = json.loads((folder / ID_FILE).read_text())
    assert known["base_id"] == before
    (folder / ID_FILE).write_text(json.dumps(known | {"base_id": "f" * 64}))
    assert remembered_id(folder) == "f" * 64  # not hashed again
    assert load_folder(folder).base_id == before  # small weights always are
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert remembered_id(folder) == before
    (folder / ID_FILE).write_text("{broken")
    assert remembered_id(folder) == before


def test_id_needs_no_write_permission(folder: Path) -> None:
    (folder / ID_FILE).mkdir()  # cannot be replaced by a file
    assert remembered_id(folder) == load_folder(folder).base_id
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", ID_FILE, "model.safetensors"]


def test_loading_small_weights_writes_nothing_beside_them(folder: Path) -> None:
    load_folder(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", golden.NAMES)
def test_tables_fill_the_tree_of_every_family(name: str) -> None:
    config = ModelConfig.from_hf(json.loads(str(golden.read(name)["config"])))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}
    sources = list(golden.weights_of(golden.read(name)))
    placements = match(hf_table(config), sources, config.num_layers, where="golden")
    check_targets(placements, shapes)
    assert sorted(place.source for place in placements) == sorted(sources)
    with pytest.raises(WeightsError, match=r"missing: final_norm; unexpected: none"):
        check_targets([place for place in placements if place.target != "final_norm"], shapes)
    with pytest.raises(WeightsError, match=r"missing: none; unexpected: embed"):
        check_targets([*placements, placements[0]], shapes)


def test_tensors_written_one_by_one_are_a_safetensors_file(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((3,), ml_dtypes.bfloat16),
        "c": np.float16(2) * np.ones((1, 1), np.float16),
    }
    path = tmp_path / "x.safetensors"
    save_tensors(path, [(k, v.dtype, v.shape, lambda v=v: v) for k, v in arrays.items()])
    read = load_file(path)
    assert {k: v.dtype for k, v in read.items()} == {k: v.dtype for k, v in arrays.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
    with pytest.raises(WeightsError, match="tensor a has shape"):
        save_tensors(path, [("a", np.dtype(np.float32), (3, 2), lambda: arrays["a"])])
