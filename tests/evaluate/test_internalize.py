"""What internalised documents do beside answering: the measures are what they say, on a random hypernetwork."""

import json
import re
from random import Random

import jax
import numpy as np
import pytest

from memjax.evaluate import internalize as i
from memjax.models.decoder import forward, unembed
from memjax.train.base import load
from memjax.write.hypernet.chunks import affixes_of, document_tokens
from memjax.write.hypernet.encode import Hyper
from memjax.write.hypernet.files import save_hyper
from memjax.write.hypernet.network import init_hyper
from memjax.write.prompts import prompt_style
from tests.cli.test_cli import run
from tests.write.hypernet.support import BASE, CONFIG, EARLY, hyper

STYLE = prompt_style("plain")
TEXTS = ("Tavin lives in Orvale.", "Mira keeps the oven of Halvic. The harp is old.", "Halvic has three gates.")


@pytest.fixture(scope="module")
def network():
    return hyper(CONFIG)


@pytest.fixture(scope="module")
def adapters(network):
    return [i.write_document(BASE, network, STYLE, text) for text in TEXTS]


def test_a_cosine_is_that_of_the_updates_themselves(adapters):
    deltas = []
    for x in adapters[:2]:
        parts = [np.einsum("lri,lrf->lif", np.float64(x.a[s]), np.float64(x.b[s])).ravel() for s in sorted(x.a)]
        deltas.append(float(x.scale) * np.concatenate(parts))
    assert i.inner(*adapters[:2]) == pytest.approx(float(deltas[0] @ deltas[1]), rel=1e-6)
    expected = deltas[0] @ deltas[1] / np.linalg.norm(deltas[0]) / np.linalg.norm(deltas[1])
    assert i.cosine(*adapters[:2]) == pytest.approx(expected, rel=1e-6)
    assert i.cosine(adapters[0], adapters[0]) == pytest.approx(1.0)


def test_an_adapter_that_changes_nothing_moves_and_surprises_as_none_does(adapters):
    nothing = [i.nothing_of(x) for x in adapters]
    asked = ["Where does Tavin live?", "Who keeps the oven?", "How many gates?"]
    assert i.moved(BASE, STYLE, asked, nothing) == [0.0] * 3
    moved = i.moved(BASE, STYLE, asked, adapters)
    assert min(moved) > 1e-6
    # One at a time gives the same: rows of other lengths beside it do not matter.
    alone = [i.moved(BASE, STYLE, [q], [x])[0] for q, x in zip(asked, adapters, strict=True)]
    np.testing.assert_allclose(moved, alone, rtol=2e-3, atol=1e-6)
    bare = i.surprise(BASE, STYLE, TEXTS, None)
    np.testing.assert_allclose(i.surprise(BASE, STYLE, TEXTS, nothing), bare, rtol=1e-5)
    assert np.abs(np.subtract(i.surprise(BASE, STYLE, TEXTS, adapters), bare)).max() > 1e-4


def test_surprise_is_the_mean_over_a_texts_own_tokens():
    tokens = np.asarray(document_tokens(BASE.tokenizer, STYLE, TEXTS[0]), np.int32)[None]
    hidden = forward(BASE.model, BASE.params, tokens, np.arange(tokens.shape[1], dtype=np.int32)[None]).hidden
    logits = np.float64(unembed(BASE.model, BASE.params, hidden[0, :-1]))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -logp[np.arange(tokens.shape[1] - 1), tokens[0, 1:]].mean()
    # Beside a longer text, so that there is padding.
    assert i.surprise(BASE, STYLE, TEXTS[:2], None)[0] == pytest.approx(expected, rel=1e-4)


def test_a_stack_holds_its_own_document_once_and_strangers_beside_it(network):
    beside = [f"text {n}" for n in range(8)]
    for count in (1, 2, 4):
        stack = i.companions("text 3", beside, count, Random(count))
        assert len(set(stack)) == len(stack) == count
        assert "text 3" in stack
    by_rule = {rule: i.write_together(BASE, network, STYLE, TEXTS, rule) for rule in i.RULES}
    assert by_rule["sum"].rank == (len(TEXTS) + 1) * CONFIG.rank
    assert by_rule["svd"].rank <= i.SVD_RANK
    norms = {rule: i.inner(x, x) for rule, x in by_rule.items()}
    assert norms["mean"] < norms["root"] < norms["sum"]
    assert norms["svd"] == pytest.approx(norms["sum"], rel=1e-3)  # eight ranks fit sixteen


def test_a_perplexitys_ratio_has_its_interval_and_its_number_of_texts():
    found = i.stack_numbers(
        {"surprise/sum-2": 0.0, "surprise/sum-2_high": np.log(2), "surprise/sum-2_items": 24, "right/x": 1}
    )
    assert found == pytest.approx({"perplexity/sum-2": 1, "perplexity/sum-2_high": 2, "perplexity/sum-2_items": 24})


@pytest.mark.slow
def test_the_command_writes_its_keys_and_the_picture(capsys, tmp_path):
    """A network that changes nothing harms nothing, whatever is stacked."""
    base = load("tiny")
    params = init_hyper(EARLY, base.config, jax.random.key(0))
    save_hyper(tmp_path / "hyper", Hyper(EARLY, params, affixes_of(base.tokenizer, STYLE), 300, base.id), base.name, {})
    out = tmp_path / "out"
    args = ["eval", "internalize", "--base", "tiny", "--hyper", str(tmp_path / "hyper"), "--limit", "4"]
    args += ["--counts", "1,2", "--out", str(out)]
    code, text, err = run(capsys, *args)
    assert code == 0, err
    found = json.loads((out / "result.json").read_text())
    assert found["harm_points"] == 0.0
    assert found["same"] == 1.0
    assert all(found[key] == pytest.approx(1.0) for key in found if re.fullmatch(r"perplexity/\w+-\d+", key))
    assert (out / "stack.png").stat().st_size > 5000
    assert "documents together" in text
