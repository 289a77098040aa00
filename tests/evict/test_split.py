"""The split of candidates: exact complements whatever ties, and budgets that never keep nothing."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memjax.errors import InputError
from memjax.evict.compact import Budget, split

COUNT, CAPACITY = 12, 7
SPLIT = jax.jit(split, static_argnums=3)
# Few values, so that most scores tie; both infinities, as protected and hopeless tokens have them.
SCORES = st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.0, 2.0, np.inf]), min_size=COUNT, max_size=COUNT)


@settings(max_examples=150, deadline=None)
@given(SCORES, st.lists(st.booleans(), min_size=COUNT, max_size=COUNT), st.integers(1, CAPACITY + 2))
def test_every_token_is_in_exactly_one_of_kept_and_evicted(score, valid, keep):
    score, valid = np.array([[score]], np.float32), np.array([[valid]])
    places, held, kept = (np.asarray(x)[0, 0] for x in SPLIT(score, valid, np.array([[keep]], np.int32), CAPACITY))
    score, valid = score[0, 0], valid[0, 0]
    inside = places[held]
    evicted = valid & ~kept
    assert sorted(inside.tolist()) == np.flatnonzero(kept).tolist()  # the gather and the mask say the same
    assert inside.tolist() == sorted(inside.tolist())  # in the order of the text
    assert (kept ^ evicted).tolist() == valid.tolist()
    assert not (kept & ~valid).any()
    assert kept.sum() == min(keep, CAPACITY, valid.sum())
    if kept.any() and evicted.any():
        assert score[kept].min() >= score[evicted].max()
    assert not held[held.sum() :].any()  # empty places last


@pytest.mark.parametrize(
    ("text", "length", "kept"),
    [
        ("512", 4096, 512),
        ("512", 10, 512),
        ("25%", 100, 25),
        ("29%", 100, 29),
        ("10%", 5, 1),
        ("0.1%", 3, 1),
        ("100%", 7, 7),
    ],
)
def test_budgets_in_tokens_and_shares_are_rounded_down_but_never_to_nothing(text, length, kept):
    assert max(1, int(Budget.parse(text).of(length))) == kept
    assert Budget.parse(text).holds(length) == (kept >= length)


def test_shares_of_a_ratio_are_kvpress_rule():
    for length in (7, 100, 384, 1000):
        for ratio in (0.1, 0.25, 0.5, 0.75, 0.9):
            assert int(Budget(share=1 - ratio).of(length)) == int(length * (1 - ratio))


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-5", "1.5", "many", "", "%"])
def test_what_is_no_budget_is_refused_by_name(text):
    with pytest.raises(InputError, match="512"):
        Budget.parse(text)
