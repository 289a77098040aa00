"""How an index is cut into parts, and the best of their scores."""

import numpy as np

from memjax.bank.parts import part_digits, shares, top


def test_how_many_parts_there_are():
    assert [part_digits(n) for n in (0, 1, 16_384, 16_385, 100_000, 262_144, 262_145)] == [0, 0, 0, 1, 1, 1, 2]
    assert part_digits(20_000, held=0) == 0  # no to and fro around a size
    assert part_digits(40_000, held=0) == 1
    assert part_digits(10_000, held=1) == 1
    assert part_digits(3_000, held=1) == 0


def test_a_share_keeps_the_part_that_holds_just_that_by_the_same_maker():
    class Held:
        def __init__(self, holds):
            self.holds = holds

    rows = [("a1", "x"), ("a1", "y"), ("b2", "x")]
    fresh = shares(rows, {}, size=2)
    assert {name: share.rows for name, share in fresh.items()} == {"a": rows[:2], "b": rows[2:]}
    old = {name: Held(share.holds) for name, share in fresh.items()}
    assert [share.part for share in shares(rows, old, size=2).values()] == list(old.values())
    changed = shares([*rows, ("b3", "z")], old, size=2)
    assert (changed["a"].part, changed["b"].part) == (old["a"], None)
    assert [share.part for share in shares(rows, old, size=2, maker="another encoder").values()] == [None, None]


def test_the_best_are_the_same_however_many_are_wanted():
    scores = np.random.default_rng(0).integers(0, 9, 400).astype(np.float32)  # with many ties, of which the first go first
    ids = np.array([f"m{i}" for i in range(400)])
    order = np.argsort(-scores, kind="stable")
    for k in (1, 2, 31, 32, 33, 399, 400, 500):
        assert top(ids, scores, k) == [(f"m{i}", scores[i]) for i in order[:k]]
    assert top(ids[:3], scores[:3], 0) == []
