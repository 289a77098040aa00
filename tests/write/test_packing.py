"""Packed rows give what single rows give."""

import jax.numpy as jnp
import numpy as np

from memjax.models.decoder import unembed
from memjax.models.generate import read_prefix, read_prompts
from memjax.write.packing import Packed, read_hidden, read_keys, top_k_logp
from tests.support import read_alone, small_base

BASE = small_base()
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 97, size=n).tolist() for n in (200, 30, 90, 1, 60, 256, 40)]
PREFIX_TOKENS = [5, 6, 7]


def test_sequences_stay_whole_and_rows_are_filled():
    packed = Packed.of(SEQUENCES)
    for i, sequence in enumerate(SEQUENCES):
        assert packed.take(packed.ids, i).tolist() == sequence
        assert packed.take(packed.offset, i).tolist() == list(range(len(sequence)))
    assert packed.ids.shape == (4, 256)  # 677 tokens fill three rows; rows come in pairs
    assert (packed.owner >= 0).sum() == sum(map(len, SEQUENCES))


def test_hidden_states_and_keys_equal_those_of_single_rows():
    packed = Packed.of(SEQUENCES)
    prefix = read_prefix(BASE.model, BASE.params, PREFIX_TOKENS)
    hidden = read_hidden(BASE.model, BASE.params, packed, prefix)
    k, v = read_keys(BASE.model, BASE.params, packed, prefix, 256)
    for i in (1, 3, 4):
        alone = read_alone(BASE.model, BASE.params, PREFIX_TOKENS + SEQUENCES[i])[3:]
        np.testing.assert_allclose(packed.take(hidden, i), alone, atol=2e-5)
        _, cache, _ = read_prompts(BASE.model, BASE.params, [SEQUENCES[i]], 0, prefix)
        length = len(SEQUENCES[i])
        np.testing.assert_allclose(k[:, i, :length], cache.k[:, 0, :length], atol=2e-5)
        np.testing.assert_allclose(v[:, i, :length], cache.v[:, 0, :length], atol=2e-5)
        assert not k[:, i, length:].any()


def test_top_k_is_that_of_the_full_distribution():
    hidden = RNG.normal(size=(3, 2, BASE.config.width)).astype(np.float32)
    ids, logp = top_k_logp(BASE.model, BASE.params, hidden, 5)
    logits = np.asarray(unembed(BASE.model, BASE.params, jnp.asarray(hidden)), np.float64)
    full = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(np.sort(full, -1)[..., :-6:-1], logp, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(full, ids, -1), logp, atol=1e-4)
