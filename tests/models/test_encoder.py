"""Encoders: what `transformers` computes, one id per set of vectors, few compilations, and refusals that name the fault."""

import json

import numpy as np
import pytest

from memjax.errors import FetchError, InputError, WeightsError
from memjax.models import encoder as e
from memjax.models.tokenizer import Tokenizer
from tests.models import golden as g
from tests.support import TOKENIZER, small_base

GOLDEN = g.MODELS.parent / "encoder.npz"
TEXTS = ["one two", "another", "", "x"]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture
def folder(tmp_path, golden):
    """The tiny golden BERT as a folder with a tokenizer of words."""
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    g.write_folder(tmp_path / "bert", golden)
    words.save(str(tmp_path / "bert" / "tokenizer.json"))
    return tmp_path / "bert"


def test_hidden_states_and_vectors_equal_transformers(folder, golden):
    config, params, _ = e.load_bert(folder)
    mask = golden["mask"]
    hidden = np.asarray(e.bert_hidden(config, params, golden["ids"], mask))
    np.testing.assert_allclose(hidden[mask], golden["hidden"][mask], rtol=0, atol=1e-5)
    made = np.asarray(e.bert_vectors(config, params, golden["ids"], mask))
    np.testing.assert_allclose(made, golden["pooled"], rtol=0, atol=1e-5)
    assert (made * golden["pooled"]).sum(axis=1).min() > 0.99999


def test_texts_in_a_batch_are_what_they_are_alone(folder):
    encoder = e.sentence_encoder(folder)
    texts = ["a b a", "", "b " * 40, "a", "b b"]
    together = e.encode(encoder, texts)
    assert together.shape == (5, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(e.encode(encoder, [text])[0], vector, atol=1e-5)
    assert abs(together[0] @ together[2]) < 0.999
    assert e.encode(encoder, []).shape == (0, 32)


def test_a_text_is_cut_at_what_the_encoder_was_made_for(folder):
    whole = e.sentence_encoder(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    cut = e.sentence_encoder(folder)
    np.testing.assert_allclose(e.encode(cut, ["a b a b b b b"]), e.encode(whole, ["a b a b"]), atol=1e-6)
    assert cut.id != whole.id


def test_any_number_of_texts_compiles_two_programs_for_each_length():
    compiled = []

    def step(ids, mask):
        compiled.append(ids.shape)
        return np.repeat(mask.sum(axis=1)[:, None], 2, axis=1).astype(np.float32)

    for counts in ([1], [3, 5, 9], [16] * 70, [40, 40, 1, 1], [17, 50, 33, 0]):
        made = e.in_batches([[7] * n for n in counts], 50, 2, step)
        assert made[:, 0].tolist() == counts
    assert {length for _, length in compiled} == {16, 32, 50}
    assert len(set(compiled)) <= 6
    with pytest.raises(ValueError, match="longer than 50"):
        e.in_batches([[7] * 51], 50, 2, step)


def test_word_vectors_are_averaged(tmp_path):
    from safetensors.numpy import save_file

    tokenizer = Tokenizer.from_folder(TOKENIZER)
    (tmp_path / "tokenizer.json").write_bytes((TOKENIZER / "tokenizer.json").read_bytes())
    table = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 8)).astype(np.float16)
    save_file({"embedding.weight": table}, tmp_path / "model.safetensors")
    encoder = e.sentence_encoder(tmp_path)
    made = e.encode(encoder, TEXTS)
    wanted = table[tokenizer.encode(TEXTS[0])].astype(np.float32).mean(axis=0)
    np.testing.assert_allclose(made[0], wanted / np.linalg.norm(wanted), atol=1e-6)
    assert not made[2].any()
    save_file({"embedding.weight": table[:5]}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="not a finite row per token"):
        e.sentence_encoder(tmp_path)


def test_a_bases_own_hidden_states_are_an_encoder():
    base = small_base()
    encoder = e.base_encoder(base)
    made = e.encode(encoder, TEXTS)
    assert made.shape == (4, base.config.width)
    np.testing.assert_allclose(e.encode(encoder, TEXTS[:1])[0], made[0], atol=1e-5)
    assert abs(made[0] @ made[1]) < 0.9999
    others = [e.base_encoder(base, 1), e.base_encoder(base, 2), e.base_encoder(small_base(seed=1), 1)]
    assert len({other.id for other in others}) == 3
    assert e.base_encoder(base, 1).id == encoder.id  # half of three layers
    with pytest.raises(InputError, match="layer 4 is not one of the 3 layers"):
        e.base_encoder(base, 4)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda texts: np.zeros((len(texts), 3)), r"gave \[2, 3\] for 2 texts; it must give \[2, 4\]"),
        (lambda texts: np.zeros((1, 4)), r"gave \[1, 4\] for 2 texts"),
        (lambda texts: np.full((len(texts), 4), np.nan), "not finite"),
    ],
)
def test_any_function_is_an_encoder_and_is_checked(run, message):
    fine = e.Encoder("mine", 4, lambda texts: [[len(text), 0, 0, 0] for text in texts])
    assert e.encode(fine, ["a", "bb", ""]).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(InputError, match=message):
        e.encode(e.Encoder("mine", 4, run), ["a", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config, weights: weights.pop("encoder.layer.1.output.dense.bias"),
            "missing: encoder.layer.1.output.dense.bias",
        ),
        (lambda config, weights: weights.update(extra=np.zeros(2, np.float32)), "unexpected: extra"),
        (
            lambda config, weights: config.update(intermediate_size=40),
            r"intermediate.dense.weight is \[48, 32\], not \[40, 32\]",
        ),
        (lambda config, weights: weights["embeddings.LayerNorm.bias"].fill(np.nan), "NaN or infinite"),
        (lambda config, weights: config.update(hidden_act="relu"), "bert, relu, absolute; supported: bert, gelu, absolute"),
        (lambda config, weights: config.update(model_type="roberta"), "roberta, gelu, absolute"),
        (lambda config, weights: config.pop("hidden_size"), "lacks 'hidden_size'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, golden, change, message):
    config, weights = json.loads(str(golden["config"])), {k: v.copy() for k, v in g.weights_of(golden).items()}
    change(config, weights)
    arrays = {f"weights/{key}": value for key, value in weights.items()}
    g.write_folder(tmp_path, {"config": np.array(json.dumps(config)), **arrays})
    with pytest.raises(WeightsError, match=message):
        e.load_bert(tmp_path)


def test_an_encoder_is_fetched_only_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(e, "sentence_encoder", lambda: (_ for _ in ()).throw(FetchError("unreachable")))
    assert e.available_encoder("bm25") is None
    assert e.available_encoder("auto") is None
    with pytest.raises(FetchError, match="unreachable"):
        e.available_encoder("fusion")


@pytest.mark.net
def test_the_real_encoder_equals_transformers(golden):
    try:
        encoder = e.sentence_encoder()
    except FetchError as error:
        pytest.skip(str(error))
    meta = json.loads(str(golden["meta"]))
    made = e.encode(encoder, meta["texts"])
    np.testing.assert_allclose(made, golden["vectors"], rtol=0, atol=1e-5)
    assert (made * golden["vectors"]).sum(axis=1).min() > 0.99999
    # Banks keep keys under this id; another id makes all of them be encoded again.
    assert encoder.id == "afe5b6a01faebf7610ecd198ae0fc2ec4a9134ae3c972aad999a3d70cf4c5e00"
