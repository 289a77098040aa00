"""Adapters and namespaces on their way in and out: PEFT's logits, exact round trips, refusals by name."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from memjax.bank import exchange as x
from memjax.bank.retrieve import search
from memjax.bank.store import open_bank
from memjax.errors import ArtefactError, BankError, BaseMismatchError, InputError
from memjax.memory.adapter import Adapter, as_slots
from memjax.memory.files import read_artefact
from memjax.memory.peft import read_peft
from memjax.models.decoder import make_model, site_shapes, unembed
from memjax.models.weights import SITE_MODULES, load_folder
from tests.bank.test_store import writer
from tests.support import read

GOLDEN = Path(__file__).parents[1] / "goldens" / "peft"


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(GOLDEN / "golden.npz"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, arrays):
    return golden_llama(tmp_path_factory.mktemp("base"), arrays)


def golden_llama(folder, arrays):
    """The golden's Llama, read as any Hugging Face folder is."""
    config = json.loads((GOLDEN / "golden.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    tensors = {k.removeprefix("base/"): v for k, v in arrays.items() if k.startswith("base/")}
    tensors.pop("lm_head.weight", None)  # tied
    save_file(tensors, folder / "model.safetensors")
    return load_folder(folder, np.float32)


@pytest.fixture(scope="module")
def shape(model):
    config = model.config
    heads = (config.num_kv_heads, config.head_size)
    return x.BaseShape("0" * 64, "llama", "1" * 64, "", config.num_layers, site_shapes(config), SITE_MODULES, heads)


@pytest.fixture
def bank(tmp_path):
    with open_bank(tmp_path / "bank", create=True) as bank:
        yield bank


def logits(model, ids, adapter):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    net = make_model(model.config)
    return unembed(net, model.params, read(net, model.params, ids, positions, slots=as_slots(adapter)).hidden)


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["theirs", "rslora", "ours", "upper"])
def test_an_adapter_that_went_in_and_out_gives_pefts_logits(bank, tmp_path, model, shape, arrays, name):
    entry = x.import_memory(bank, shape, GOLDEN / name, name)
    assert bank.verify().ok
    x.export_memory(bank, name, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(bank.folder(entry.id))
    fits = (shape.site_shapes, shape.num_layers, SITE_MODULES)
    adapter = Adapter(*read_peft(_without_manifest(tmp_path / "out"), *fits))
    actual = np.asarray(logits(model, arrays["input_ids"], adapter))
    np.testing.assert_allclose(actual, arrays[f"logits/{name}"], atol=2e-5)
    assert np.abs(actual - arrays["logits/base"]).max() > 1e-2


def _without_manifest(folder):
    (folder / "memory.json").unlink()
    return folder


def test_an_imported_adapter_has_no_source_and_is_found_by_what_it_is_said_to_be_about(bank, shape):
    entry = x.import_memory(bank, shape, GOLDEN / "theirs", "boats", text="ferries and boats", metadata={"n": 1})
    provenance = read_artefact(bank.folder(entry.id), shape.site_shapes, shape.num_layers, SITE_MODULES).provenance
    assert (provenance["source_hash"], provenance["recipe"]["writer"]) == ("none", "import")
    assert entry.metadata == {"n": 1}
    assert search(bank, "When does the ferry leave?", 3)[0][0] == entry.id
    assert x.import_memory(bank, shape, GOLDEN / "theirs", "boats") == entry
    assert x.import_memory(bank, shape, GOLDEN / "theirs", "ships").id == entry.id


def test_a_manifest_cannot_make_an_adapter_pass_for_another_texts_memory(bank, shape, tmp_path):
    key, write = writer(1.0, "0" * 64)
    entry = bank.add("a", key, write)
    x.export_memory(bank, "a", tmp_path / "out")
    small = x.BaseShape("0" * 64, "", "t" * 64, "", 1, {"q": (4, 4)}, {"q": "self_attn.q_proj"}, (1, 4))
    imported = x.import_memory(bank, small, tmp_path / "out", "b")
    assert imported.key != entry.key
    assert bank.find_key(key) == entry


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"use_shiny_new_thing": False}, "use_shiny_new_thing"),
        ({"use_rslora": True, "alpha_pattern": {"q_proj": 1}}, "alpha_pattern"),
    ],
)
def test_what_is_more_than_a_plain_lora_is_refused_and_nothing_is_kept(bank, shape, tmp_path, changes, named):
    folder = shutil.copytree(GOLDEN / "theirs", tmp_path / "edited")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ArtefactError, match=named):
        x.import_memory(bank, shape, folder, "a")
    assert bank.count() == 0
    assert list((bank.path / "memories").iterdir()) == []


def test_another_base_or_a_damaged_folder_is_refused(bank, shape, tmp_path):
    with pytest.raises(BaseMismatchError, match="ffff"):
        x.import_memory(bank, x.BaseShape("f" * 64, *list(vars(shape).values())[1:]), GOLDEN / "ours", "a")
    folder = shutil.copytree(GOLDEN / "ours", tmp_path / "ours")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtefactError, match=r"adapter_model\.safetensors is damaged"):
        x.import_memory(bank, shape, folder, "a")
    with pytest.raises(InputError, match="is no folder"):
        x.import_memory(bank, shape, tmp_path / "nowhere", "a")


def test_exporting_is_all_or_nothing_and_overwrites_nothing(bank, shape, tmp_path):
    entry = x.import_memory(bank, shape, GOLDEN / "theirs", "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        x.export_memory(bank, "a", tmp_path / "full")
    with pytest.raises(BankError, match="no memory named 'b'"):
        x.export_memory(bank, "b", tmp_path / "b")
    (bank.folder(entry.id) / "adapter_model.safetensors").write_bytes(b"x")
    for export in (lambda: x.export_memory(bank, "a", tmp_path / "b"), lambda: x.export_namespace(bank, tmp_path / "b")):
        with pytest.raises(ArtefactError, match="memory 'a' cannot be exported"):
            export()
    assert {path.name for path in tmp_path.iterdir()} == {"bank", "full"}


# ---------------------------------------------------------------------------------------------------- a whole namespace


@pytest.fixture
def exported(bank, tmp_path):
    bank.add("a", *writer(1.0), text="one", questions=[1], metadata={"n": 1}, namespace="mine")
    bank.add("b", *writer(2.0), text="two", namespace="mine")
    bank.add("also a", writer(1.0)[0], writer(1.0)[1], namespace="mine")
    bank.add("secret", *writer(3.0), text="not yours", namespace="theirs")
    assert x.export_namespace(bank, tmp_path / "mine.tar", "mine") == 3
    return tmp_path / "mine.tar"


def test_a_namespace_comes_back_as_it_was(bank, exported, tmp_path):
    assert b"not yours" not in exported.read_bytes()
    with open_bank(tmp_path / "new", create=True) as new:
        entries = x.import_namespace(new, exported, "copy")
        assert new.verify().ok
        assert [(e.name, e.id, e.metadata) for e in entries] == [(e.name, e.id, e.metadata) for e in bank.list("mine")]
        assert new.base_id == bank.base_id
        assert (new.text("a", "copy"), new.questions("a", "copy")) == ("one", [1])
        assert x.import_namespace(new, exported, "copy") == entries
        assert new.namespaces() == ["copy"]


def test_a_taken_name_or_another_base_stops_the_import_before_it_begins(exported, tmp_path):
    with open_bank(tmp_path / "new", create=True) as new:
        new.add("b", *writer(9.0))
        with pytest.raises(BankError, match="'b' is taken"):
            x.import_namespace(new, exported)
        assert new.names() == ["b"]
    with open_bank(tmp_path / "other", create=True, base_id="e" * 64) as other:
        with pytest.raises(BaseMismatchError, match="eeee"):
            x.import_namespace(other, exported)
        assert other.count(None) == 0


def test_a_file_that_is_no_export_is_refused(bank, exported, tmp_path):
    (tmp_path / "text").write_text("x" * 2000)
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        row = {"name": "a", "id": "../../x", "text": None, "questions": None, "metadata": {}, "expires_at": None}
        data = json.dumps({"format": 1, "base_id": "b" * 64, "base_name": "", "memories": [row]}).encode()
        info = tarfile.TarInfo("namespace.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    (tmp_path / "half.tar").write_bytes(exported.read_bytes()[:5000])
    for name in ("text", "evil.tar", "half.tar"):
        with pytest.raises(BankError, match=r"is no exported namespace, or damaged"):
            x.import_namespace(bank, tmp_path / name)
    with pytest.raises(BankError, match="does not exist"):
        x.import_namespace(bank, tmp_path / "nowhere")
    data = bytearray(exported.read_bytes())
    at = data.index(b'{"format":"pt"}') + 1500
    data[at - 1000 : at] = bytes(1000)
    (tmp_path / "flipped.tar").write_bytes(data)
    with pytest.raises((ArtefactError, BankError), match="damaged"):
        x.import_namespace(bank, tmp_path / "flipped.tar", "new")
