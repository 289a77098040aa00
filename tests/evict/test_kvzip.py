"""KVzip against kvpress on a tiny model that repeats a text in three parts, behind first tokens of the template."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import InputError
from memjax.evict.compact import SINKS, Budget
from memjax.evict.kvzip import KVzip, RepeatPrompt
from memjax.evict.once import read_dense
from memjax.models.decoder import make_model
from memjax.models.tokenizer import Tokenizer
from memjax.models.weights import load_folder
from tests.models import golden
from tests.support import TOKENIZER

with np.load(Path(__file__).parents[1] / "goldens" / "kvzip.npz") as file:
    FROZEN = dict(file)
META = json.loads(str(FROZEN["meta"]))
IDS = FROZEN["ids"].tolist()
PROMPT = RepeatPrompt(**{name: tuple(ids) for name, ids in META["prompts"].items()})
KVZIP = KVzip(chunk=META["chunk"])


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(model, params, the text read, its scores)."""
    loaded = load_folder(golden.write_folder(tmp_path_factory.mktemp("qwen3"), golden.read("qwen3")))
    model, params = make_model(loaded.config), jax.tree.map(jnp.asarray, loaded.params)
    dense = read_dense(model, params, [IDS], 0)
    return model, params, dense, KVZIP.score(model, params, dense, IDS, PROMPT, META["header"])


def of_text(dense, x):
    """x [L, 1, K, S] of the places that hold the text, [L, K, S]."""
    return np.asarray(x)[:, 0][..., np.asarray(dense.cache.position)[0] >= 0]


def test_scores_equal_kvpress(scored):
    _, _, dense, score = scored
    got = of_text(dense, score)
    np.testing.assert_allclose(got, FROZEN["scores"], atol=1e-6, rtol=1e-5)
    assert (got[..., :SINKS] > got[..., SINKS:].max()).all()
    assert (got[..., SINKS : META["header"]] == 0).all()


def test_kept_sets_equal_kvpress_over_all_layers_and_heads(scored):
    _, _, dense, score = scored
    counts = set()
    for ratio, expected in zip(META["ratios"], FROZEN["kept"], strict=True):
        kept = KVZIP.cut(dense, score, Budget(share=1 - ratio))
        held = np.zeros(expected.shape, bool)
        for layer, head in np.ndindex(held.shape[:2]):
            position = np.asarray(kept.position)[layer, 0, head]
            held[layer, head, position[position >= 0]] = True
        np.testing.assert_array_equal(held, expected)
        counts |= {*held.sum(axis=-1).ravel().tolist()}
        assert int(kept.length[0]) == len(IDS)
    assert len(counts) > len(META["ratios"])  # heads share one budget


def test_nothing_removed_keeps_the_cache_as_it_is(scored):
    _, _, dense, score = scored
    kept = KVZIP.cut(dense, score, Budget(share=1.0))
    whole = np.asarray(dense.cache.position[0]) >= 0
    np.testing.assert_array_equal(kept.k[:, 0, : len(IDS)], dense.cache.k[:, 0, whole])
    np.testing.assert_array_equal(kept.v[:, 0, : len(IDS)], dense.cache.v[:, 0, whole])


def test_parts_are_as_long_as_the_window_leaves_room_for(scored):
    model, params, dense, score = scored
    narrow = make_model(dataclasses.replace(model.config, max_positions=len(IDS) + 20 + 12))
    whole = KVzip().score(narrow, params, dense, IDS, PROMPT, META["header"])
    np.testing.assert_array_equal(whole, score)  # 20 tokens fit: the same parts
    full = make_model(dataclasses.replace(model.config, max_positions=len(IDS) + 3 + 12))
    with pytest.raises(InputError, match="room for 3 more"):
        KVzip().score(full, params, dense, IDS, PROMPT)


def test_the_template_stands_behind_the_request():
    prompt = RepeatPrompt.of(Tokenizer.from_folder(TOKENIZER))
    text = Tokenizer.from_folder(TOKENIZER).decode
    assert text(prompt.first).strip() == "Repeat the previous context exactly."
    assert list(prompt.answer) == Tokenizer.from_folder(TOKENIZER).encode("<a>")
