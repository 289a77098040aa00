"""Data: order depends on the seed alone, packing loses nothing, a position holds on any number of hosts."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import ConfigError, DataError
from memjax.train.data import DataConfig, Generated, batched, next_token_targets, open_stream, packed


def text(index, rng):
    n = int(rng.integers(1, 15))
    return {"tokens": np.full(n, index + 1, np.int32), "mask": np.arange(n, dtype=np.int32)}


def fixed(index, rng):
    return {"x": np.float32([index, rng.random()])}


TEXTS, POINTS = Generated(text, 60), Generated(fixed, 60)
kinds = pytest.mark.parametrize(("make", "source"), [(batched, POINTS), (packed, TEXTS)], ids=["batched", "packed"])


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def take(dataset, n, state=None):
    iterator = iter(dataset)
    if state is not None:
        iterator.set_state(state)
    found = list(itertools.islice(iterator, n))
    return found, json.loads(json.dumps(iterator.get_state()))


def test_generated_examples_depend_on_seed_and_index_only():
    assert equal(TEXTS[7], TEXTS[7])
    assert equal(POINTS[3], Generated(fixed, 9)[3])
    assert not equal(POINTS[3], Generated(fixed, 60, seed=1)[3])


@kinds
def test_order_is_a_seeded_permutation_each_epoch(make, source):
    def seen(**kwargs):
        found = make(source, DataConfig(batch=6, length=16, window=2, **kwargs))
        return np.concatenate([batch["examples"] for batch in found])

    one = seen(epochs=1, seed=4)
    assert len(set(one)) == len(one)
    if make is batched:
        assert sorted(one) == list(range(60))
    two = seen(epochs=2, seed=4)
    assert np.array_equal(two[: len(one)], one) or make is packed  # packing looks across the end of an epoch
    assert not np.array_equal(seen(epochs=1, seed=5)[:20], one[:20])
    plain = seen(epochs=1, shuffle=False)
    if make is batched:
        assert list(plain) == list(range(60))


@kinds
@pytest.mark.parametrize("at", [0, 1, 4, 5, 9])
def test_a_stream_continues_from_its_saved_position(make, source, at):
    dataset = make(source, DataConfig(batch=4, length=16, window=3, seed=2))
    whole, _ = take(dataset, 14)
    first, state = take(dataset, at)
    rest, _ = take(dataset, 14 - at, state)
    assert all(equal(a, b) for a, b in zip(whole, first + rest, strict=True))


@kinds
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_resuming_on_another_number_of_hosts_sees_the_same_global_batches(make, source, before, after):
    config = DataConfig(batch=8, length=16, window=2, seed=3)

    def gather(hosts, n, state=None):
        parts = [take(make(source, config, host=h, hosts=hosts), n, state) for h in range(hosts)]
        states = [state for _, state in parts]
        assert all(state == states[0] for state in states)  # any host's position serves all
        return [
            {k: np.concatenate([b[k] for b in bs]) if k != "examples" else bs[0][k] for k in bs[0]}
            for bs in zip(*(found for found, _ in parts), strict=True)
        ], states[0]

    whole, _ = gather(1, 9)
    first, state = gather(before, 4)
    rest, _ = gather(after, 5, state)
    assert all(equal(a, b) for a, b in zip(whole, first + rest, strict=True))


def test_packed_rows_hold_every_example_whole_and_once():
    batches = list(packed(TEXTS, DataConfig(batch=1, length=16, window=4, epochs=1)))
    seen = []
    for batch in batches:
        assert batch["tokens"].shape == batch["segments"].shape == batch["positions"].shape == (1, 16)
        assert batch["segments"].dtype == batch["positions"].dtype == np.int32
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segments"][row].max() + 1):
                here = batch["segments"][row] == segment
                tokens = batch["tokens"][row][here]
                example = TEXTS[int(tokens[0]) - 1]
                assert np.array_equal(tokens, example["tokens"])
                assert np.array_equal(batch["mask"][row][here], example["mask"])
                assert np.array_equal(batch["positions"][row][here], np.arange(len(tokens)))
                seen.append(int(tokens[0]) - 1)
        padding = batch["segments"] == 0
        assert not batch["tokens"][padding].any()
        assert not batch["mask"][padding].any()
    assert sorted(seen) == list(range(60))
    assert sorted(np.concatenate([b["examples"] for b in batches])) == list(range(60))


def test_the_examples_of_a_packed_batch_are_those_in_it():
    for batch in itertools.islice(packed(TEXTS, DataConfig(batch=4, length=16, window=2)), 10):
        inside = {int(t) - 1 for t in batch["tokens"].ravel() if t}
        assert inside == {int(i) for i in batch["examples"]}


def test_too_long_examples_are_refused_or_truncated_on_request():
    source = [{"tokens": np.arange(1, 9, dtype=np.int32)}] * 8
    with pytest.raises(DataError, match=r"example [0-7] has 8 tokens and a row 6; set data.too_long=truncate"):
        next(iter(packed(source, DataConfig(batch=2, length=6))))
    batch = next(iter(packed(source, DataConfig(batch=2, length=6, too_long="truncate"))))
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 6]] * 2


def test_bad_sources_are_refused_by_name():
    with pytest.raises(DataError, match="no examples"):
        batched([], DataConfig())
    with pytest.raises(DataError, match="do not stack"):
        next(iter(batched(TEXTS, DataConfig(batch=8))))
    uneven = [{"tokens": np.zeros(3), "mask": np.zeros(2)}] * 2
    with pytest.raises(DataError, match=r"example [01] has fields .*; every one needs mask, tokens, all of one length"):
        next(iter(packed(uneven, DataConfig(batch=1))))
    with pytest.raises(ConfigError, match="multiple of the 3 hosts"):
        batched(POINTS, DataConfig(batch=16), host=0, hosts=3)
    with pytest.raises(ConfigError, match=r"data\.batch is 0"):
        DataConfig(batch=0)


def test_next_token_targets_stay_inside_a_segment():
    tokens = jnp.array([[5, 6, 7, 8, 9, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    targets, weights = next_token_targets(tokens, segments)
    assert targets.tolist() == [[6, 7, 8, 9, 0, 0]]
    assert weights.tolist() == [[1, 1, 0, 1, 0, 0]]
    _, weights = next_token_targets(tokens, segments, jnp.array([[1, 0, 1, 1, 1, 1]]))
    assert weights.tolist() == [[0, 1, 0, 1, 0, 0]]


def test_streams_of_lists_functions_and_iterators():
    stream = open_stream([{"x": 1, "examples": [3]}, {"x": 2}])
    assert [next(stream)[0]["x"] for _ in range(5)] == [1, 2, 1, 2, 1]
    assert next(open_stream([{"x": 1, "examples": [3]}]))[1].tolist() == [3]
    stream = open_stream(lambda step: step * step)
    state = (next(stream), next(stream), stream.get_state())[-1]
    other = open_stream(lambda step: step * step)
    other.set_state(state)
    assert next(stream) == next(other) == (4, None)
    stream = open_stream(iter([7, 8]))
    assert [batch for batch, _ in stream] == [7, 8]
    assert not stream.resumable
