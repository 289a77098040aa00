"""Resident slots: buckets by rank, the least recently used first out, pins, and nothing left behind."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax.bank.store import open_bank
from memjax.errors import BankError, ConfigError
from memjax.serve.slots import Place, SlotPools
from tests.small_bank import BASE, add


@pytest.fixture
def bank(tmp_path):
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        for seed, (name, rank) in enumerate({"a": 2, "b": 4, "c": 4, "d": 12}.items(), start=1):
            add(bank, name, seed, text=name, rank=rank)
        yield bank


def load(pools, bank, *names):
    entries = [bank.get(name) for name in names]
    places, damaged = pools.fill(entries, pools.read(bank, entries))
    assert not damaged
    return [places[entry.id] for entry in entries]


def test_an_adapter_lies_in_the_smallest_bucket_that_holds_it(bank):
    pools = SlotPools(BASE, resident=2, rank=32)
    assert pools.buckets == (8, 16, 32)
    assert load(pools, bank, "a", "d") == [Place(8, 1), Place(16, 1)]
    assert pools.slots(16).rank == 16
    for rank in (8, 16):  # slot 0 stays the base
        assert not any(np.asarray(x[:, 0]).any() for x in pools.slots(rank).b.values())


def test_the_least_recently_used_goes_first_but_not_what_is_pinned_or_asked_for(bank):
    pools = SlotPools(BASE, resident=2, rank=8)
    ids = {name: bank.get(name).id for name in "abc"}
    load(pools, bank, "a", "b")
    load(pools, bank, "a")
    load(pools, bank, "c")
    assert pools.ids() == (ids["a"], ids["c"])
    with pools.pinned([ids["a"]]):
        load(pools, bank, "b")
        assert pools.ids() == (ids["a"], ids["b"])
        with pools.pinned([ids["b"]]), pytest.raises(BankError, match="2 resident slots"):
            load(pools, bank, "c")
    load(pools, bank, "c")
    assert pools.ids() == (ids["b"], ids["c"])
    with pytest.raises(BankError, match="all in use"):
        load(pools, bank, "a", "b", "c")


def test_an_evicted_memory_leaves_zeros(bank):
    pools = SlotPools(BASE, resident=2, rank=8)
    ((rank, slot),) = load(pools, bank, "a")
    written = lambda: [bool(jnp.any(x[:, slot])) for x in (*pools.slots(rank).a.values(), *pools.slots(rank).b.values())]
    assert all(written())
    pools.evict([bank.get("a").id, "unknown"])
    assert pools.ids() == ()
    assert not any(written())
    assert pools.slots(rank).scale[slot] == 0


def test_what_is_resident_is_not_read_again(bank):
    pools = SlotPools(BASE, resident=2, rank=8)
    load(pools, bank, "a")
    assert set(pools.read(bank, [bank.get("a"), bank.get("b")])) == {bank.get("b").id}


def test_pools_without_room_are_refused():
    with pytest.raises(ConfigError, match="0 slots"):
        SlotPools(BASE, resident=0, rank=8)
