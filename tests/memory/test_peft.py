"""PEFT's folder layout in both directions, and a refusal by name for whatever is more than plain LoRA."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memjax.errors import ArtefactError
from memjax.memory.files import Meta, read_artefact, write_artefact
from memjax.memory.peft import read_peft
from tests.memory.conftest import GOLDEN
from tests.memory.test_files import LAYERS, assert_same


@pytest.mark.parametrize("folder", ["theirs", "rslora", "ours", "upper"])
def test_deltas_equal_those_of_peft(folder, arrays, shapes, modules):
    factors = read_peft(GOLDEN / folder, shapes, LAYERS, modules) if folder != "ours" else None
    factors = factors or read_artefact(GOLDEN / folder, shapes, LAYERS, modules).artefact
    checked = 0
    for site, module in modules.items():
        for layer in range(LAYERS):
            expected = arrays.get(f"delta/{folder}/{layer}.{module}")
            if expected is None:
                assert site not in factors.a or not factors.a[site][layer].any()
                continue
            actual = factors.scale * factors.b[site][layer].T @ factors.a[site][layer]
            np.testing.assert_allclose(actual, expected, atol=1e-6)
            checked += 1
    assert checked == {"theirs": 14, "rslora": 2, "ours": 14, "upper": 7}[folder]


@pytest.mark.parametrize("folder", ["ours", "upper"])
def test_we_still_write_the_bytes_that_peft_loaded(tmp_path, golden, shapes, modules, folder):
    factors = read_artefact(GOLDEN / folder, shapes, LAYERS, modules).artefact
    meta = Meta("0" * 64, "1" * 64, "", {"writer": "golden", "seed": golden["seed"]}, licence="none: random numbers")
    write_artefact(tmp_path / folder, factors, modules, meta)
    for path in sorted((GOLDEN / folder).iterdir()):
        assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes(), path.name


def edited_peft(tmp_path, **changes):
    folder = shutil.copytree(GOLDEN / "theirs", tmp_path / "edited")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r = 0"),
        ({"r": 4}, r"is \[3, 16\], not \[4, 16\]"),
        ({"lora_alpha": "big"}, "lora_alpha = 'big'"),
        ({"use_shiny_new_thing": False}, "use_shiny_new_thing"),
        ({"layers_to_transform": [2]}, "layers 0 to 1"),
        ({"layers_to_transform": [0]}, r"unexpected .*layers\.1\."),
    ],
)
def test_peft_options_that_cannot_be_honoured_are_refused_by_name(tmp_path, shapes, modules, changes, named):
    with pytest.raises(ArtefactError, match=named):
        read_peft(edited_peft(tmp_path, **changes), shapes, LAYERS, modules)


def test_trivial_patterns_are_accepted(tmp_path, shapes, modules):
    folder = edited_peft(tmp_path, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 7}, modules_to_save=[])
    assert_same(read_peft(folder, shapes, LAYERS, modules), read_peft(GOLDEN / "theirs", shapes, LAYERS, modules))


def test_missing_and_unexpected_tensors_are_both_listed(tmp_path, shapes, modules):
    folder = edited_peft(tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "layers.0.self_attn.q_proj.lora_A" in name)
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(gone)
    save_file(tensors, path)
    with pytest.raises(ArtefactError) as caught:
        read_peft(folder, shapes, LAYERS, modules)
    assert f"missing {gone}" in str(caught.value)
    assert "unexpected base_model.model.lm_head.lora_A.weight" in str(caught.value)


def test_pickles_other_dtypes_and_infinities_are_refused(tmp_path, shapes, modules):
    folder = edited_peft(tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].astype(np.float64)}, path)
    with pytest.raises(ArtefactError, match="is F64"):
        read_peft(folder, shapes, LAYERS, modules)
    save_file(tensors | {name: np.full_like(tensors[name], np.inf)}, path)
    with pytest.raises(ArtefactError, match=r"adapter_model\.safetensors has values that are not finite"):
        read_peft(folder, shapes, LAYERS, modules)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ArtefactError, match="pickle"):
        read_peft(folder, shapes, LAYERS, modules)
