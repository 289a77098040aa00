"""The router: features as the paper has them, trained on what tells, kept with its statistics, refused elsewhere."""

import dataclasses

import numpy as np
import pytest

from memjax.bank import route as r
from memjax.bank.store import open_bank
from memjax.errors import BankError, BaseMismatchError, ConfigError
from tests.small_bank import BASE, add
from tests.support import small_base

CONFIG = r.RouterConfig(epochs=30, batch=16, learning_rate=1e-2)


def examples(count=80, groups=20, none=False):
    """Retrieval is right every second time; the right candidate's hidden state always shows."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        gold = int(rng.integers(3))
        hidden = rng.normal(size=(3, 8)).astype(np.float32)
        hidden[gold, 2] += 4
        scores = np.sort(rng.uniform(size=3))[::-1]
        rows = r.router_features(scores, rng.uniform(1, 2, 3), hidden)
        if none:
            rows = np.concatenate([rows, r.none_features(scores.max(), 1.5, np.zeros(8))])
        made.append(r.Example(rows, np.arange(len(rows)) == gold, number % groups))
    for _ in range(count // 4 if none else 0):
        hidden = rng.normal(size=(3, 8)).astype(np.float32)
        rows = r.router_features(np.ones(3) * 0.1, rng.uniform(1, 2, 3), hidden)
        rows = np.concatenate([rows, r.none_features(0.1, 1.5, np.zeros(8))])
        made.append(r.Example(rows, np.arange(4) == 3, -1))
    return made


def test_features_are_score_gap_entropy_and_the_first_components():
    hidden = np.arange(2 * 200, dtype=np.float32).reshape(2, 200)
    rows = r.router_features([0.25, 0.75], [1.0, 2.0], hidden)
    assert rows.shape == (2, 131)
    np.testing.assert_array_equal(rows[0, :5], [0.25, 0.5, 1.0, 0, 1])
    np.testing.assert_array_equal(rows[1, :4], [0.75, 0.0, 2.0, 200])
    assert r.router_features([1.0], [1.0], hidden[:1, :32]).shape == (1, 35)


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_it_learns_what_retrieval_does_not_know(loss):
    router = r.train_router(examples(), dataclasses.replace(CONFIG, loss=loss), BASE, 1, progress=False)
    assert router.metrics["accuracy"] > 0.9
    assert router.metrics["accuracy_retrieval"] < 0.6
    assert router.metrics["validation_questions"] == 16


def test_where_retrieval_cannot_tell_a_blind_router_still_can():
    found = examples(count=400)
    for example in found:  # retrieval is always right, and so all that a router needs to look at
        example.features[:, 0] = example.right
        example.features[:, 1] = ~example.right
        example.features[example.right, 5] -= 2  # the state still shows, but less
    tied = [r.Example(np.where([[1, 1, *[0] * 9]], 0.5, e.features), e.right, e.group) for e in found]
    at = {
        blind: r.train_router(found, dataclasses.replace(CONFIG, blind=blind), BASE, 1, progress=False)
        for blind in (True, False)
    }
    right = {blind: np.mean([e.right[router.scores(e.features).argmax()] for e in tied]) for blind, router in at.items()}
    assert right[True] > 0.85
    assert right[True] > right[False]


def test_no_memory_can_win_where_it_is_a_class():
    found = examples(none=True)
    router = r.train_router(found, dataclasses.replace(CONFIG, none=True), BASE, 1, progress=False)
    right = [e.right[router.scores(e.features).argmax()] for e in found]
    assert np.mean(right) > 0.9
    assert any(e.right[-1] for e in found)


def test_validation_memories_are_not_trained_on():
    train, held = r._split(examples(), CONFIG)
    assert {e.group for e in held} & {e.group for e in train} == set()
    assert len(held) + len(train) == 80


def test_it_is_kept_with_its_statistics_and_goes_stale(tmp_path):
    router = r.train_router(examples(), CONFIG, BASE, 1, progress=False)
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id) as bank:
        assert r.read_router(BASE, bank) is None
        add(bank, "ferry", 1)
        add(bank, "harp", 2)
        r.keep_router(bank, router)
        kept = r.read_router(BASE, bank)
        rows = examples()[0].features
        np.testing.assert_array_equal(kept.scores(rows), router.scores(rows))
        np.testing.assert_array_equal(kept.mean, router.mean)
        assert kept.metrics == router.metrics
        with pytest.raises(BaseMismatchError, match=BASE.id[:12]):
            r.read_router(small_base(seed=1), bank)
        add(bank, "oven", 3)
        assert r.read_router(BASE, bank) is not None  # new memories are served
        bank.delete("ferry")
        assert r.read_router(BASE, bank) is None  # it has seen what is to be forgotten
        bank.set_record(r.ROUTER, {"arrays": {}}, "default")
        with pytest.raises(BankError, match="train router again"):
            r.read_router(BASE, bank)


def test_too_few_questions_and_bad_settings_are_refused():
    with pytest.raises(BankError, match="too few"):
        r.train_router(examples(3, 3), CONFIG, BASE, 1, progress=False)
    with pytest.raises(ConfigError, match="epochs is 0"):
        r.RouterConfig(epochs=0)
