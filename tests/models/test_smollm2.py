"""The embedded default base itself: its pinned identity, and what `transformers` computes with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import FetchError
from memjax.models.decoder import forward, make_model, unembed
from memjax.models.fetch import resolve
from memjax.models.generate import Sampling, generate
from memjax.models.tokenizer import Tokenizer
from memjax.models.weights import load_folder

pytestmark = pytest.mark.net

# The name smollm2-135m means these on every machine; a change here makes every bank written before unreadable.
BASE_ID = "9a4879c5eab99ca356a33792efe2e0f3f2dd71dd8db3f0744bfc75051eab7e22"
TOKENIZER_ID = "71551be1b2484e05857211731897a3aaa1801d739f6e4c8df01200f61f790266"
GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return resolve("smollm2-135m")
    except FetchError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "smollm2.npz") as file:
        return dict(file)


def test_identity_is_the_same_everywhere(folder: Path) -> None:
    loaded, tokenizer = load_folder(folder), Tokenizer.from_folder(folder)
    assert (loaded.base_id, tokenizer.id) == (BASE_ID, TOKENIZER_ID)
    config = loaded.config
    assert (config.family, config.num_layers, config.width, config.mlp_width) == ("llama", 30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (9, 3, 64)
    assert (config.rope_theta, config.tied, config.max_positions, config.norm_eps) == (1e5, True, 8192, 1e-5)


def test_tokenizer_equals_transformers(folder: Path, golden: dict[str, np.ndarray]) -> None:
    tokenizer, meta = Tokenizer.from_folder(folder), json.loads(str(golden["meta"]))
    ids = json.loads(str(golden["text_ids"]))
    assert [tokenizer.encode(text) for text in meta["texts"]] == ids
    assert [tokenizer.decode(row, keep_special=True) for row in ids] == meta["texts"]
    assert tokenizer.encode_chat([{"role": "user", "content": meta["passage"]}]) == golden["ids"].tolist()
    assert tokenizer.template == (GOLDENS / "templates" / "smollm2.jinja").read_text(encoding="utf-8")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.prefix_ids, tokenizer.vocab_size) == (1, (2,), (), 49152)


def test_logits_and_greedy_tokens_equal_transformers(folder: Path, golden: dict[str, np.ndarray]) -> None:
    loaded = load_folder(folder, np.float32)
    model, params = make_model(loaded.config), jax.tree.map(jnp.asarray, loaded.params)
    ids = golden["ids"]
    positions = np.arange(len(ids), dtype=np.int32)[None]

    @jax.jit
    def run(params, ids, positions):
        return unembed(model, params, forward(model, params, ids, positions).hidden)[0]

    logits = np.asarray(run(params, ids[None], positions))
    np.testing.assert_allclose(logits[:, golden["columns"]], golden["logits"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(logits.argmax(-1), golden["best"])
    tokens = generate(model, params, [ids.tolist()], loaded.config.eos_ids, Sampling(max_tokens=24))[0]
    wanted = golden["greedy"].tolist()
    assert tokens == [token for token in wanted if token not in loaded.config.eos_ids]
