"""Published checkpoints: parity with torch on random weights, what is refused, and the converter's fence."""

import pickle
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.convert_doc_to_lora import Fenced, Shell
from memjax.errors import ArtefactError
from memjax.write.hypernet.files import load_hyper, save_hyper
from memjax.write.hypernet.network import chunk_factors
from memjax.write.hypernet.published import read_published
from tests.support import small_base
from tests.write.hypernet.support import AFFIXES, BASE

GOLDEN = Path(__file__).parents[2] / "goldens" / "doc_to_lora.npz"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def weights(golden, kind):
    before = f"{kind}/weights/"
    return {name.removeprefix(before): x for name, x in golden.items() if name.startswith(before)}


@pytest.mark.parametrize("kind", ["layers", "early"])
def test_what_it_emits_is_what_torch_emits(golden, kind, tmp_path):
    save_file({f"_orig_mod.{name}": x for name, x in weights(golden, kind).items()}, tmp_path / "net.safetensors")
    network = read_published(tmp_path / "net.safetensors", BASE, head_size=8)
    config = network.config
    assert (config.features, config.rank, config.width, config.heads, config.kv_heads) == (kind, 2, 16, 4, 2)
    assert (config.blocks, config.latents) == ((2, 3) if kind == "layers" else (1, 5))
    assert network.max_chunk == BASE.config.max_positions - sum(map(len, AFFIXES))
    features = golden[f"{kind}/features"]
    features = features[:, None] if kind == "layers" else features[None]
    owner = jnp.zeros((1, features.shape[-2]), jnp.int32)
    a, b = chunk_factors(config, BASE.config, network.params, features, owner)
    for site in config.sites:
        np.testing.assert_allclose(a[site][:, 0], golden[f"{kind}/A/{site}_proj"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(b[site][:, 0], golden[f"{kind}/B/{site}_proj"], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(network.params["sites"][site]["a_bias"], weights(golden, kind)[f"bias_A.{site}_proj"])
    save_hyper(tmp_path / "ours", network)
    again = load_hyper(tmp_path / "ours", BASE)
    np.testing.assert_array_equal(again.params["head"], network.params["head"])


def test_what_is_no_such_checkpoint_is_refused(golden, tmp_path):
    tensors = weights(golden, "early")

    def refused(says, changed, base=BASE, name="net.safetensors"):
        save_file(changed, tmp_path / name)
        with pytest.raises(ArtefactError, match=says):
            read_published(tmp_path / name, base, head_size=8)

    refused("convert it", tensors, name="pytorch_model.bin")
    refused("no checkpoint of Doc-to-LoRA", {"head.weight": tensors["head.weight"]})
    refused(r"lacks layers\.0\.layers\.3\.bias", {k: v for k, v in tensors.items() if k != "layers.0.layers.3.bias"})
    refused("no Doc-to-LoRA has: extra", {**tensors, "extra": tensors["head.weight"]})
    refused("not finite", {**tensors, "head.weight": np.full_like(tensors["head.weight"], np.nan)})
    refused("is for a base of 3 layers", tensors, small_base(num_layers=2))
    refused("load its own base", tensors, small_base(width=40))


def test_the_converter_makes_no_object_of_a_pickle(tmp_path, monkeypatch, capsys):
    """The fence finds no function that a file names, not even under the name of a module of torch."""
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    sys.modules["torch"].dtype = type("dtype", (), {})

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'came')!r}, 'w')",))

    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"a": Evil(), "b": Path("x")}))
    with (tmp_path / "evil.bin").open("rb") as file:
        made = Fenced(file).load()
    assert isinstance(made["a"], Shell)
    assert isinstance(made["b"], Shell)
    assert not (tmp_path / "came").exists()
    assert "not made: builtins.exec" in capsys.readouterr().err
