"""The reader: cache, segments, adapters, masks and packed rows, each against the plain forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import WeightsError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Slots, as_slots, concatenate, insert, make_slots, pad_rank
from memjax.models.decoder import (
    abstract_params,
    bind,
    empty_cache,
    init_params,
    make_model,
    site_shapes,
    unembed,
)
from tests.support import random_adapter, random_params, read, small_config

CONFIG = small_config()
MODEL = make_model(CONFIG)
PARAMS = random_params(CONFIG)
IDS = jax.random.randint(jax.random.key(1), (2, 10), 0, CONFIG.vocab_size)
POSITIONS = jnp.tile(jnp.arange(10), (2, 1))


def plain(ids=IDS, positions=POSITIONS, **kwargs):
    return read(MODEL, PARAMS, ids, positions, **kwargs).hidden


def slots_of(*adapters):
    slots = make_slots(site_shapes(CONFIG), CONFIG.num_layers, len(adapters) + 1, 4)
    for slot, adapter in enumerate(adapters, start=1):
        slots = insert(slots, slot, pad_rank(adapter, 4))
    return slots


def test_reading_in_pieces_through_the_cache_equals_reading_at_once():
    cache = empty_cache(CONFIG, 2, 16)
    out = read(MODEL, PARAMS, IDS[:, :6], POSITIONS[:, :6], cache)
    rest = [read(MODEL, PARAMS, IDS[:, 6:7], POSITIONS[:, 6:7], out.cache)]
    rest.append(read(MODEL, PARAMS, IDS[:, 7:], POSITIONS[:, 7:], rest[0].cache))
    np.testing.assert_allclose(out.hidden, plain()[:, :6], atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate([r.hidden for r in rest], 1), plain()[:, 6:], atol=1e-5)
    assert rest[-1].cache.next.tolist() == [10, 10]


def test_padding_takes_no_place_and_changes_nothing():
    positions = POSITIONS.at[0, 6:].set(-1)
    cache = empty_cache(CONFIG, 2, 16)
    out = read(MODEL, PARAMS, IDS, positions, cache)
    assert out.cache.next.tolist() == [6, 10]
    more = read(MODEL, PARAMS, IDS[:, 6:8], jnp.array([[6, 7], [10, 11]]), out.cache)
    np.testing.assert_allclose(more.hidden[0], plain(IDS[:1, :8], POSITIONS[:1, :8])[0, 6:], atol=1e-5)


def test_a_shared_prefix_segment_equals_a_cache():
    cache = read(MODEL, PARAMS, IDS[:1, :6], POSITIONS[:1, :6], empty_cache(CONFIG, 1, 8)).cache
    prefix = Segment(cache.k, cache.v, cache.position)
    tails = jnp.stack([IDS[0, 6:], IDS[1, 6:]])
    out = read(MODEL, PARAMS, tails, POSITIONS[:, 6:], segments=(prefix,)).hidden
    whole = jnp.concatenate([jnp.tile(IDS[:1, :6], (2, 1)), tails], 1)
    np.testing.assert_allclose(out, plain(whole)[:, 6:], atol=1e-5)


def test_packed_rows_equal_single_ones():
    ids = jnp.concatenate([IDS[:1, :4], IDS[1:, :6]], axis=1)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    out = plain(ids, positions, visible=jnp.array([[0] * 4 + [1] * 6]))
    np.testing.assert_allclose(out[:, :4], plain(IDS[:1, :4], POSITIONS[:1, :4]), atol=1e-5)
    np.testing.assert_allclose(out[:, 4:], plain(IDS[1:, :6], POSITIONS[1:, :6]), atol=1e-5)


def test_slot_zero_is_the_base_bit_for_bit_whatever_the_other_slots_hold():
    run = jax.jit(lambda slots, ids: read(MODEL, PARAMS, IDS, POSITIONS, slots=slots, slot_ids=ids).hidden)
    empty = make_slots(site_shapes(CONFIG), CONFIG.num_layers, 3, 4)
    full = slots_of(random_adapter(CONFIG, 1), random_adapter(CONFIG, 2))
    base = run(empty, jnp.array([0, 0]))
    mixed = run(full, jnp.array([0, 2]))
    np.testing.assert_array_equal(mixed[0], base[0])
    np.testing.assert_allclose(base, plain(), atol=1e-6)
    assert np.abs(mixed[1] - base[1]).max() > 1e-2
    assert run._cache_size() == 1


def test_a_batch_with_different_adapters_equals_single_runs():
    adapters = [random_adapter(CONFIG, 1), random_adapter(CONFIG, 2, rank=2)]
    batch = plain(slots=slots_of(*adapters), slot_ids=jnp.array([2, 1]))
    for row, adapter in ((0, adapters[1]), (1, adapters[0])):
        alone = plain(IDS[row : row + 1], POSITIONS[row : row + 1], slots=as_slots(adapter))
        np.testing.assert_allclose(batch[row], alone[0], atol=1e-5)


def test_an_adapter_equals_the_merged_weights():
    adapter = random_adapter(CONFIG, 3)
    merged = {**PARAMS, "layers": dict(PARAMS["layers"])}
    for site in adapter.a:
        delta = adapter.scale * jnp.einsum("lri,lrf->lif", adapter.a[site], adapter.b[site])
        merged["layers"][site] = merged["layers"][site] + delta
    expected = read(MODEL, merged, IDS, POSITIONS).hidden
    np.testing.assert_allclose(plain(slots=as_slots(adapter)), expected, rtol=1e-4, atol=1e-4)


def test_concatenated_adapters_add_up():
    one, two = random_adapter(CONFIG, 3), random_adapter(CONFIG, 4, rank=2)
    both = concatenate([one, two])
    assert both.rank == 6
    for site in both.a:
        total = sum(x.scale * jnp.einsum("lri,lrf->lif", x.a[site], x.b[site]) for x in (one, two))
        got = both.scale * jnp.einsum("lri,lrf->lif", both.a[site], both.b[site])
        np.testing.assert_allclose(got, total, atol=1e-5)


def test_masked_one_pass_equals_two_phases():
    adapter = as_slots(random_adapter(CONFIG, 5))
    mask = (POSITIONS >= 6).astype(jnp.float32)
    one = plain(slots=adapter, adapter_mask=mask)
    prefix = read(MODEL, PARAMS, IDS[:, :6], POSITIONS[:, :6], empty_cache(CONFIG, 2, 6)).cache
    two = read(MODEL, PARAMS, IDS[:, 6:], POSITIONS[:, 6:], prefix, slots=adapter).hidden
    np.testing.assert_allclose(one[:, :6], plain()[:, :6], atol=1e-6)
    np.testing.assert_allclose(one[:, 6:], two, rtol=1e-5, atol=1e-5)


def test_a_changing_bank_compiles_nothing_new():
    # A function of its own: compiled programs of one function are counted together, whoever compiled them.
    write = jax.jit(lambda slots, slot, adapter: insert(slots, slot, adapter), donate_argnums=0)
    ask = jax.jit(lambda slots, ids: read(MODEL, PARAMS, IDS, POSITIONS, slots=slots, slot_ids=ids).hidden)
    slots = make_slots(site_shapes(CONFIG), CONFIG.num_layers, 4, 4)
    for slot in (1, 2, 3, 1):
        slots = write(slots, jnp.int32(slot), random_adapter(CONFIG, slot))
        ask(slots, jnp.array([slot, 0]))
    assert (write._cache_size(), ask._cache_size()) == (1, 1)


def test_insertion_touches_its_slot_only():
    before = slots_of(random_adapter(CONFIG, 1), random_adapter(CONFIG, 2))
    after = insert(before, 1, random_adapter(CONFIG, 9))
    for old, new in zip(jax.tree.leaves((before.a, before.b)), jax.tree.leaves((after.a, after.b)), strict=True):
        np.testing.assert_array_equal(old[:, [0, 2]], new[:, [0, 2]])
        assert not np.array_equal(old[:, 1], new[:, 1])


def test_rematerialised_gradients_are_the_same():
    adapter = random_adapter(CONFIG, 6)

    def loss(b, remat):
        slots = as_slots(type(adapter)(adapter.a, b, adapter.scale))
        return read(MODEL, PARAMS, IDS, POSITIONS, slots=slots, remat=remat).hidden.sum()

    for x, y in zip(*(jax.tree.leaves(jax.grad(loss)(adapter.b, r)) for r in (False, True)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_taps_and_early_exit():
    out = read(MODEL, PARAMS, IDS, POSITIONS, taps=("x", "lse", "k_raw"))
    assert out.taps["x"].shape == (3, 2, 10, 32)
    assert out.taps["k_raw"].shape == (3, 2, 10, 2, 8)
    assert out.taps["lse"].dtype == jnp.float32
    early = read(MODEL, PARAMS, IDS, POSITIONS, layers=2)
    np.testing.assert_allclose(early.hidden, out.taps["x"][2], atol=1e-6)


def test_rotated_taps_as_a_segment_of_own_positions_per_layer_and_head_are_the_cache():
    first = read(MODEL, PARAMS, IDS[:, :6], POSITIONS[:, :6], taps=("q", "k", "v"), tap_last=2)
    assert first.taps["q"].shape == (3, 2, 2, 4, 8)
    assert first.taps["k"].shape == (3, 2, 6, 2, 8)
    whole = read(MODEL, PARAMS, IDS, POSITIONS, empty_cache(CONFIG, 2, 10))
    np.testing.assert_allclose(first.taps["k"], whole.cache.k[:, :, :6], atol=1e-5)
    position = jnp.broadcast_to(POSITIONS[None, :, :6, None], (3, 2, 6, 2))
    segment = Segment(first.taps["k"], first.taps["v"], position)
    rest = read(MODEL, PARAMS, IDS[:, 6:], POSITIONS[:, 6:], segments=[segment]).hidden
    np.testing.assert_allclose(rest, whole.hidden[:, 6:], atol=1e-5)
    blind = Segment(segment.k, segment.v, position.at[1:, :, :, 0].set(-1))
    assert not np.allclose(read(MODEL, PARAMS, IDS[:, 6:], POSITIONS[:, 6:], segments=[blind]).hidden, rest, atol=1e-3)


def test_embeddings_in_place_of_ids():
    np.testing.assert_allclose(plain(PARAMS["embed"][IDS]), plain(), atol=1e-6)


def test_bind_refuses_what_does_not_fit_and_pairs_by_name():
    abstract = abstract_params(CONFIG)
    renamed = {**PARAMS, "embedding": PARAMS["embed"]}
    del renamed["embed"]
    with pytest.raises(WeightsError, match=r"missing: \['embed'\]; unexpected: \['embedding'\]"):
        bind(MODEL.graphdef, abstract, renamed)
    turned = {**PARAMS, "layers": {**PARAMS["layers"], "gate": PARAMS["layers"]["down"]}}
    with pytest.raises(WeightsError, match=r"layers/gate: \(3, 48, 32\) instead of \(3, 32, 48\)"):
        bind(MODEL.graphdef, abstract, turned)
    shuffled = {key: PARAMS[key] for key in reversed(list(PARAMS))}
    np.testing.assert_array_equal(bind(MODEL.graphdef, abstract, shuffled).embed[...], PARAMS["embed"])


def test_untied_heads_and_soft_caps():
    config = small_config(tied=False, final_softcap=2.0)
    params = init_params(config, jax.random.key(0))
    logits = unembed(make_model(config), params, jnp.ones((1, 32)) * 50)
    assert logits.dtype == jnp.float32
    assert np.abs(logits).max() <= 2.0


def test_unused_memory_features_leave_the_program_as_it_is():
    def text(**kwargs):
        return jax.jit(lambda p: read(MODEL, p, IDS, POSITIONS, **kwargs).hidden).lower(PARAMS).as_text()

    assert text() == text(segments=(), slots=None, slot_ids=None, adapter_mask=None)
    assert text() != text(slots=Slots(**vars(as_slots(random_adapter(CONFIG, 0)))))
