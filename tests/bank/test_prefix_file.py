"""A buffer as a key/value prefix: transformers answers behind it as our reader does; what is no such prefix is refused."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from memjax.bank.prefix_file import ABOUT, TENSORS, export_prefix
from memjax.bank.store import open_bank
from memjax.errors import InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.buffer import Buffer
from memjax.memory.files import Meta, write_artefact
from memjax.models.decoder import unembed
from memjax.models.weights import SITE_MODULES
from memjax.models.weights.export import hf_tensors
from memjax.write.reading import header_tokens, tail_tokens
from tests.small_bank import BASE, STYLE, add
from tests.support import read

GOLDEN = Path(__file__).parents[1] / "goldens" / "prefix.npz"
QUESTION = "Where does the ferry to Vask leave from?"


def sums(base):
    """What tells the weights of a base: the sum of each tensor's magnitudes, by name."""
    tensors = dict(hf_tensors(base.config, base.params))
    return [float(np.abs(np.asarray(tensors[name], np.float64)).sum()) for name in sorted(tensors)]


def add_slots(bank):
    """A buffer of seven slots that nobody has trained, behind a context of thirty tokens."""
    config = BASE.config
    rng = np.random.default_rng(5)
    k, v = rng.normal(size=(2, config.num_layers, 7, config.num_kv_heads, config.head_size)).astype(np.float32)
    buffer = Buffer(jnp.asarray(k), jnp.asarray(v), len(header_tokens(BASE.tokenizer, STYLE)), 30, "in_place")
    meta = Meta(BASE.id, BASE.tokenizer.id, BASE.tokenizer.template_id, {"slots": 7}, kind="buffer", base_name=BASE.name)
    return bank.add("slots", meta.key, lambda folder: write_artefact(folder, buffer, SITE_MODULES, meta))


@pytest.fixture
def held(tmp_path):
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        add_slots(bank)
        yield bank


def test_transformers_reads_it_as_we_do(held, tmp_path):
    golden = np.load(GOLDEN)
    # By sums: last bits of random numbers depend on how they were compiled.
    np.testing.assert_allclose(
        sums(BASE), golden["weights"], rtol=1e-4, err_msg="the small base has other weights; make the golden file anew"
    )
    export_prefix(held, BASE, STYLE, "slots", tmp_path / "prefix")
    tensors, about = load_file(tmp_path / "prefix" / TENSORS), json.loads((tmp_path / "prefix" / ABOUT).read_text())
    header = len(header_tokens(BASE.tokenizer, STYLE))
    assert about["positions"] == [*range(header), *range(header + 30, header + 37)]
    assert about["next_position"] == header + 37
    stacked = {kind: np.stack([tensors[f"layers.{i}.{kind}"] for i in range(about["layers"])]) for kind in ("key", "value")}
    k, v = (jnp.asarray(stacked[kind].transpose(0, 1, 3, 2, 4)) for kind in ("key", "value"))
    segment = Segment(k, v, jnp.asarray([about["positions"]], jnp.int32))
    tail = golden["tail"].tolist()
    assert tail == tail_tokens(BASE.tokenizer, STYLE, QUESTION)
    made = []
    for _ in golden["greedy"]:
        ids = np.zeros((1, 64), np.int32)
        ids[0, : len(tail) + len(made)] = [*tail, *made]
        at = np.where(np.arange(64) < len(tail) + len(made), about["next_position"] + np.arange(64), -1)[None]
        logits = unembed(BASE.model, BASE.params, read(BASE.model, BASE.params, ids, at, segments=[segment]).hidden)[0]
        if not made:
            np.testing.assert_allclose(logits[: len(tail)], golden["logits"], atol=2e-4)
        made.append(int(logits[len(tail) + len(made) - 1].argmax()))
    assert made == golden["greedy"].tolist()


def test_the_prompt_that_asks_is_in_it(held, tmp_path):
    export_prefix(held, BASE, STYLE, "slots", tmp_path / "prefix")
    about = json.loads((tmp_path / "prefix" / ABOUT).read_text())
    asked = about["ask"].replace("{question}", QUESTION)
    assert BASE.tokenizer.encode(asked) == tail_tokens(BASE.tokenizer, STYLE, QUESTION)


def test_what_is_no_prefix_is_refused(held, tmp_path):
    add(held, "ferry", 1)
    with pytest.raises(InputError, match="'ferry' is an adapter"):
        export_prefix(held, BASE, STYLE, "ferry", tmp_path / "prefix")
    with pytest.raises(InputError, match="exists"):
        export_prefix(held, BASE, STYLE, "slots", tmp_path)
    narrow = dataclasses.replace(BASE, config=dataclasses.replace(BASE.config, window=16))
    with pytest.raises(InputError, match="sliding window"):
        export_prefix(held, narrow, STYLE, "slots", tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()
