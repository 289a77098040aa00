"""One-shot eviction: a context read whole, cut once, questions afterwards on what is left."""

import jax
import numpy as np
import pytest

from memjax.errors import InputError
from memjax.evict.compact import Budget
from memjax.evict.once import cut, read_dense
from memjax.evict.policies import policy_named
from memjax.models import generate as g
from memjax.models.decoder import init_params, make_model
from tests.support import small_config

CONFIG = small_config(num_layers=2, qk_norm=True)
MODEL = make_model(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 3, init_params(CONFIG, jax.random.key(0)))
TEXT = np.random.default_rng(1).integers(3, 97, 150).tolist()
QUESTION = [5, 9, 13]


@pytest.fixture(scope="module")
def dense():
    return read_dense(MODEL, PARAMS, [TEXT], None, block=64)


def read_question(prefix, question):
    """hidden [1, D] of the question's last token behind the prefix."""
    return g.read_prompts(MODEL, PARAMS, [question], 0, prefix)[0]


def positions(kept):
    return [set(kept.position[where][kept.position[where] >= 0].tolist()) for where in np.ndindex(kept.position.shape[:3])]


def test_nothing_removed_is_the_full_cache_bit_for_bit(dense):
    kept = cut(MODEL, dense, policy_named("snapkv"), Budget(share=1.0))
    whole = np.asarray(dense.cache.position[0]) >= 0
    np.testing.assert_array_equal(kept.k[:, 0, : len(TEXT)], dense.cache.k[:, 0, whole])
    np.testing.assert_array_equal(kept.v[:, 0, : len(TEXT)], dense.cache.v[:, 0, whole])
    whole, _, _ = g.read_prompts(MODEL, PARAMS, [TEXT + QUESTION], 0)
    np.testing.assert_allclose(read_question(kept.prefix(), QUESTION), whole, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["adakv", "snapkv", *(pytest.param(n, marks=pytest.mark.slow) for n in ("h2o", "pyramidkv"))]
)
def test_policies_keep_the_floor_of_the_share(name, dense):
    for share, expected in ((0.5, 75), (0.48, 72)):
        kept = cut(MODEL, dense, policy_named(name), Budget(share=share))
        sets = positions(jax.tree.map(np.asarray, kept))
        assert np.mean([len(s) for s in sets]) == expected
        assert all(s <= set(range(len(TEXT))) for s in sets)
        assert int(kept.length[0]) == len(TEXT)  # later tokens go on from the true length


def test_a_share_that_rounds_to_nothing_keeps_one_token(dense):
    kept = cut(MODEL, dense, policy_named("snapkv"), Budget(share=0.001))
    assert {len(s) for s in positions(jax.tree.map(np.asarray, kept))} == {1}


def test_questions_share_a_cut_context_without_changing_it(dense):
    """Pitfalls 6 and 7: what is kept is decided before any question, and a question leaves nothing behind."""
    prefix = cut(MODEL, dense, policy_named("snapkv"), Budget(share=0.9)).prefix()
    before = jax.tree.map(np.array, prefix)
    first = np.array(read_question(prefix, QUESTION))
    assert not np.allclose(read_question(prefix, [80, 81, 82, 83]), first, atol=1e-3)
    np.testing.assert_array_equal(read_question(prefix, QUESTION), first)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, prefix), before)


def test_rows_of_different_lengths_are_cut_like_single_ones():
    policy, budget = policy_named("snapkv"), Budget(tokens=80)
    rows = [TEXT, TEXT[20:120]]
    both = cut(MODEL, read_dense(MODEL, PARAMS, rows, None, block=64), policy, budget)
    for row, text in enumerate(rows):
        one = cut(MODEL, read_dense(MODEL, PARAMS, [text], None, block=64), policy, budget)
        np.testing.assert_array_equal(both.position[:, row], one.position[:, 0])
        np.testing.assert_allclose(both.k[:, row], one.k[:, 0], atol=3e-5)


def test_what_cannot_be_cut_is_refused_by_name():
    few = read_dense(MODEL, PARAMS, [TEXT], 8, block=64)
    assert few.queries.q.shape[2] == 8
    with pytest.raises(InputError, match="snapkv reads the last 64 queries"):
        cut(MODEL, few, policy_named("snapkv"), Budget(share=0.5))
    two = cut(
        MODEL, read_dense(MODEL, PARAMS, [TEXT, TEXT[20:120]], None, block=64), policy_named("snapkv"), Budget(tokens=80)
    )
    with pytest.raises(InputError, match="one row at a time"):
        two.prefix()
    with pytest.raises(InputError, match="at most 512"):
        read_dense(MODEL, PARAMS, [TEXT * 4], 1)
