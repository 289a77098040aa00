"""Cartridges and prefixes that PEFT wrote become buffers: the same logits, and refusals by name."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from memjax.bank.prefix_import import import_prefix
from memjax.errors import ArtefactError
from memjax.memory.buffer import Buffer
from memjax.memory.files import read_artefact
from memjax.memory.kv_prefix import is_kv_prefix, read_kv_prefix
from memjax.models.buffers import read_buffer, rotate_layers
from memjax.models.decoder import make_model, unembed
from memjax.write.reading import split_prompts
from tests.bank.test_exchange import GOLDEN, golden_llama
from tests.serve.test_buffers import ASKED, LAMP, engine
from tests.small_bank import BASE, SAMPLING, STYLE, read_text, whole_buffer
from tests.support import read as run

PREFIXES = Path(__file__).parents[1] / "goldens" / "kv_prefix"
HEADS = (BASE.config.num_layers, BASE.config.num_kv_heads, BASE.config.head_size)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return golden_llama(tmp_path_factory.mktemp("base"), dict(np.load(GOLDEN / "golden.npz")))


@pytest.mark.parametrize("kind", ["cartridge", "prefix_tuning"])
def test_logits_behind_a_prefix_are_those_of_peft(kind, llama):
    config, arrays = llama.config, np.load(PREFIXES / "golden.npz")
    net = make_model(config)
    found = read_kv_prefix(PREFIXES / kind, (config.num_layers, config.num_kv_heads, config.head_size))
    assert found.frozen == (1 if kind == "cartridge" else 0)
    k = rotate_layers(config, jnp.asarray(found.k), np.arange(5), back=True)
    segment, following = read_buffer(config, Buffer(k, jnp.asarray(found.v), 0, 5, "compact"))
    ids = jnp.asarray(arrays["input_ids"])
    positions = jnp.broadcast_to(following + jnp.arange(ids.shape[1]), ids.shape)
    logits = unembed(net, llama.params, run(net, llama.params, ids, positions, segments=[segment]).hidden)
    np.testing.assert_allclose(logits, arrays[f"logits/{kind}"], atol=5e-5)
    alone = unembed(net, llama.params, run(net, llama.params, ids, positions - following).hidden)
    assert np.abs(np.asarray(alone) - arrays[f"logits/{kind}"]).max() > 1e-2


def saved(folder, text=LAMP, **changes):
    """A cartridge of the base's own cache of header and text, as PEFT makes one from a prefill, and its config."""
    whole = whole_buffer(text)
    count = whole.header + whole.slots
    split = split_prompts(BASE.tokenizer, STYLE, text)
    ids = np.asarray([[*split.header, *split.context]], np.int32)
    out = run(BASE.model, BASE.params, ids, np.arange(count)[None], taps=("k_raw", "v"))
    k = np.asarray(rotate_layers(BASE.config, out.taps["k_raw"][:, 0], np.arange(count)))
    packed = np.stack([k, np.asarray(out.taps["v"][:, 0])]).transpose(2, 1, 0, 3, 4).reshape(count, -1)
    config = {"peft_type": "CARTRIDGE", "num_virtual_tokens": count, "num_frozen_tokens": whole.header, **changes}
    folder.mkdir()
    save_file({"prompt_embeddings": packed}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_cartridge_of_a_text_is_read_as_the_text(bank, tmp_path):
    folder = saved(tmp_path / "theirs")
    assert is_kv_prefix(folder)
    entry = import_prefix(bank, BASE, STYLE, folder, "lamp", text=LAMP)
    assert entry.kind == "buffer"
    whole = whole_buffer(LAMP)  # frozen first tokens are the header, which the reader has itself
    made = read_artefact(bank.folder(entry.id), {}, HEADS[0], {}, BASE.id, HEADS[1:]).artefact
    assert (made.header, made.layout, made.k.shape) == (whole.header, "compact", whole.k.shape)
    np.testing.assert_allclose(made.k, whole.k, atol=1e-4)
    assert engine(bank).ask(ASKED, memory="lamp", sampling=SAMPLING).text == read_text(LAMP, ASKED)
    assert import_prefix(bank, BASE, STYLE, folder, "lamp", text=LAMP).id == entry.id


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ({"num_virtual_tokens": 3}, r"prompt_embeddings is \["),
        ({"num_layers": 7}, "num_layers 7, not 2"),
        ({"num_frozen_tokens": -1}, "num_frozen_tokens = -1"),
        ({"magic": 1}, "does not know: magic"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, changes, named):
    folder = shutil.copytree(PREFIXES / "cartridge", tmp_path / "edited")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ArtefactError, match=named):
        read_kv_prefix(folder, (2, 2, 4))


def test_a_prefix_of_frozen_tokens_alone_is_refused(bank, tmp_path):
    folder = saved(tmp_path / "theirs")
    tensor = np.zeros((1, HEADS[0] * 2 * HEADS[1] * HEADS[2]), np.float32)
    save_file({"prompt_embeddings": tensor}, folder / "adapter_model.safetensors")
    told = {"peft_type": "CARTRIDGE", "num_virtual_tokens": 1, "num_frozen_tokens": 1}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ArtefactError, match="nothing to read"):
        import_prefix(bank, BASE, STYLE, folder, "lamp")
