"""Block prefill and decode under a fixed capacity: exact where nothing goes, conserving, bounded, one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import InputError
from memjax.evict import bounded
from memjax.evict.bounded import make_plan, read, read_block
from memjax.evict.compact import SINKS, Budget, empty_kept
from memjax.evict.policies import POLICIES, policy_named
from memjax.models import generate as g
from memjax.models.decoder import empty_cache, init_params, make_model
from tests.support import read as read_at_once
from tests.support import small_config

FAMILIES = {
    "llama": small_config(num_layers=2),
    "qwen3": small_config(family="qwen3", num_layers=2, qk_norm=True, head_size=16, query_scale=0.25),
    "mistral": small_config(family="mistral", num_layers=2, window=16, local=(True, True), num_kv_heads=1),
    "gemma3": small_config(
        family="gemma3", window=16, local=(True, False, True), rope_local_theta=1e3, qk_norm=True, post_norms=True,
        norm_offset=1.0, attn_softcap=5.0,
    ),
}  # fmt: skip
MODELS = {name: make_model(config) for name, config in FAMILIES.items()}
PARAMS = {name: jax.tree.map(lambda x: x * 3, init_params(config, jax.random.key(0))) for name, config in FAMILIES.items()}
SNAPKV = policy_named("snapkv")
TEXT = np.random.default_rng(0).integers(3, 97, 200).tolist()
BLOCK = 32
# Every policy compiles a program of its own, so by default those walk that differ in more than their score; with slow, all.
FAST = ("h2o", "snapkv", "adakv")
WALK = [pytest.param(p, id=p.name, marks=[] if p.name in FAST else pytest.mark.slow) for p in POLICIES]


def blocks(name, text, policy, capacity, plan, block=BLOCK):
    """The bounded cache after every block."""
    model, params = MODELS[name], PARAMS[name]
    kept = empty_kept(model.config, 1, capacity, jnp.float32)
    ids, positions = bounded.pad_left([text], 1, -(-len(text) // block) * block)
    for begin in range(0, ids.shape[1], block):
        part = slice(begin, begin + block)
        _, kept = read_block(model, params, ids[:, part], positions[:, part], kept, plan, policy=policy)
        yield jax.tree.map(np.array, kept)


@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "qwen3", "mistral"))]
)
def test_room_for_all_is_the_full_cache_bit_for_bit(name):
    model, params, count = MODELS[name], PARAMS[name], 3 * BLOCK
    cache = empty_cache(model.config, 1, count)
    kept = empty_kept(model.config, 1, count, jnp.float32)
    plan = make_plan(SNAPKV, count, count, model.config.num_layers)
    for begin in range(0, count, BLOCK):
        ids = np.asarray([TEXT[begin : begin + BLOCK]], np.int32)
        positions = np.arange(begin, begin + BLOCK, dtype=np.int32)[None]
        plain, cache = g.prefill(model, params, ids, positions, cache)
        hidden, kept = read_block(model, params, ids, positions, kept, plan, policy=SNAPKV)
        np.testing.assert_array_equal(hidden, plain)
    np.testing.assert_array_equal(kept.k, cache.k)
    np.testing.assert_array_equal(kept.v, cache.v)
    assert (np.asarray(kept.position) == np.arange(count)).all()


def test_a_budget_that_holds_the_text_runs_the_plain_program(monkeypatch):
    model, params = MODELS["llama"], PARAMS["llama"]
    monkeypatch.setattr(bounded, "read", None)
    sampling = g.Sampling(max_tokens=6, temperature=1.0, seed=3)
    for budget in (Budget(tokens=46), Budget(share=1.0)):
        got = g.collect(bounded.stream(model, params, [TEXT[:40]], [], sampling, policy=SNAPKV, budget=budget))
        assert got == g.generate(model, params, [TEXT[:40]], [], sampling)


@pytest.mark.parametrize("policy", WALK)
def test_every_policy_keeps_its_budget_sinks_and_recent_tokens_and_loses_for_good(policy):
    name, keep, count = "qwen3", 24, 130
    model = MODELS[name]
    plan = make_plan(policy, keep, count, model.config.num_layers)
    capacity = policy.slots(keep, model.config.num_kv_heads)
    full = read_at_once(model, PARAMS[name], jnp.asarray([TEXT[:count]]), jnp.arange(count)[None], taps=("k", "v")).taps
    before = np.zeros((model.config.num_layers, 1, model.config.num_kv_heads, count), bool)
    read_so_far = 0
    for kept in blocks(name, TEXT[:count], policy, capacity, plan):
        length = int(kept.length[0])
        held = np.zeros_like(before)
        for where in np.ndindex(before.shape[:3]):
            position = kept.position[where]
            position = position[position >= 0]
            assert (np.diff(position) > 0).all()  # once each, in the order of the text
            held[where][position] = True
        assert (held.sum(axis=-1).mean(axis=2) == min(keep, length)).all()  # AdaKV: on the mean of a layer's heads
        assert held[..., : min(SINKS, length)].all()
        assert held[..., length - min(int(plan.recent), length) : length].all()
        new = np.zeros_like(before)
        new[..., read_so_far:length] = True
        assert not (held & ~(before | new)).any()  # what was evicted never comes back, what was not read is not there
        # The first layer's keys and values do not depend on what was evicted: they stand at their true positions.
        for head in range(before.shape[2]):
            position = kept.position[0, 0, head]
            rows = position >= 0
            for got, taps in ((kept.k, full["k"]), (kept.v, full["v"])):
                np.testing.assert_allclose(got[0, 0, rows, head], taps[0, 0, position[rows], head], atol=1e-5)
        before, read_so_far = held, length
    assert read_so_far == count


def test_a_local_layers_cache_loses_nothing_that_its_window_reaches():
    model, params = MODELS["mistral"], PARAMS["mistral"]
    reading = read(model, params, [TEXT], policy_named("random"), Budget(tokens=16), block=BLOCK)
    cache = empty_cache(model.config, 1, len(TEXT))
    plain, _ = g.prefill(model, params, np.asarray([TEXT], np.int32), np.arange(len(TEXT), dtype=np.int32)[None], cache)
    np.testing.assert_allclose(reading.hidden, plain, atol=1e-4)


def test_rows_know_no_other_rows_and_tails_are_taken_in(monkeypatch):
    monkeypatch.setattr(bounded, "TAIL", BLOCK)
    model, params, sampling = MODELS["llama"], PARAMS["llama"], g.Sampling(max_tokens=70)
    prompts = [TEXT[:70], TEXT[100:141]]

    def made(prompts, keep, stops=()):
        reading = read(model, params, prompts, SNAPKV, Budget(tokens=160), room=70, block=BLOCK)
        reading = dataclasses.replace(reading, plan=make_plan(SNAPKV, keep, 140, model.config.num_layers))
        return g.collect(bounded.stream_from(model, params, reading, stops, sampling, policy=SNAPKV))

    plain = g.generate(model, params, prompts, [], sampling)
    assert made(prompts, 160) == plain  # room for all: 70 tokens in three parts, two of them taken in by the cache
    narrow = made(prompts, 24)
    assert narrow != plain
    assert [len(tokens) for tokens in narrow] == [70, 70]
    assert made([TEXT[50:53], prompts[0]], 24)[1] == narrow[0]
    stop = narrow[0][40]
    assert made(prompts, 24, [stop]) == [t[: t.index(stop)] if stop in t else t for t in narrow]


def test_texts_of_many_lengths_and_plans_share_one_program():
    model, params = MODELS["llama"], PARAMS["llama"]
    read_block.clear_cache()
    for count in (64, 65, 100, 200):
        reading = read(model, params, [TEXT[:count]], SNAPKV, Budget(tokens=24), block=BLOCK)
        assert reading.kept.tokens().tolist() == [24]
    assert read_block._cache_size() == 1
    for count in (130, 150, 155):
        reading = read(model, params, [TEXT[:count]], SNAPKV, Budget(share=0.2), block=BLOCK)
        assert reading.kept.tokens().tolist() == [count // 5]
        assert reading.kept.capacity == 32
    assert read_block._cache_size() == 2


def used(program, *args, **options):
    """(bytes of temporaries, bytes of arguments and results without parameters) as the compiler counts them."""
    memory = program.lower(*args, **options).compile().memory_analysis()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(args[1]))
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes + memory.output_size_in_bytes - weights


def test_memory_is_bounded_by_the_budget_not_by_the_text():
    """Measured on what the compiler allocates: the bounded step is the same at any length, the full cache's is not."""
    model, params, keep = MODELS["llama"], PARAMS["llama"], 24
    ids = jnp.zeros((1, BLOCK), jnp.int32)
    plan = make_plan(SNAPKV, keep, 4096, model.config.num_layers)
    small = used(read_block, model, params, ids, ids, empty_kept(model.config, 1, keep, jnp.float32), plan, policy=SNAPKV)
    full = {count: used(g.prefill, model, params, ids, ids, empty_cache(model.config, 1, count)) for count in (256, 512)}
    assert sum(full[512]) > 1.7 * sum(full[256])
    assert sum(small) < 0.25 * sum(full[512])
    sizes = {
        count: read(model, params, [TEXT[:count]], SNAPKV, Budget(tokens=keep), block=BLOCK).kept.bytes
        for count in (64, 200)
    }
    assert sizes[64] == sizes[200]


def test_over_allocation_is_charged():
    """Pitfall 10: what AdaKV and PyramidKV allocate beyond their budget shows in the bytes."""
    config, keep = FAMILIES["llama"], 2048
    places = {
        name: policy_named(name).slots(int(policy_named(name).budgets(keep, 8192, 8).max()), config.num_kv_heads)
        for name in ("snapkv", "pyramidkv", "adakv")
    }
    held = {name: empty_kept(config, 1, count, jnp.float32) for name, count in places.items()}
    assert held["snapkv"].capacity == keep
    assert held["pyramidkv"].bytes > 1.5 * held["snapkv"].bytes
    assert held["adakv"].bytes > 1.5 * held["snapkv"].bytes
    plain = held["snapkv"]
    assert plain.bytes == sum(x.nbytes for x in (plain.k, plain.v, plain.position, plain.score))


def test_scores_last_and_fade():
    """A token that one block's queries attended to stays for a while without being attended to again, then goes."""
    view = None  # SnapKV's rule reads nothing of it
    stored, fresh = jnp.asarray([0.5, -jnp.inf]), jnp.asarray([0.1, 0.2])
    first = SNAPKV.remember(stored, fresh, view, jnp.float32(0.9))
    np.testing.assert_allclose(first, [0.45, 0.2])
    for _ in range(20):
        first = SNAPKV.remember(first, fresh, view, jnp.float32(0.9))
    np.testing.assert_allclose(first, fresh)
    assert (policy_named("knorm").remember(stored, -fresh, view, jnp.float32(0.9)) == -fresh).all()


def test_the_observing_window_leaves_no_score_behind():
    """SnapKV ranks its window above all; a token that has left the window must be judged anew, not by that rank."""
    plan = make_plan(SNAPKV, 24, 200, 2)
    for kept in blocks("llama", TEXT, SNAPKV, 24, plan):
        observing = kept.position >= int(kept.length[0]) - int(plan.window)
        held = kept.position >= 0
        assert np.isneginf(kept.score[observing & held]).all()
        assert (kept.score[held & ~observing] <= 1).all()  # attention weights


@pytest.mark.slow
def test_h2o_over_blocks_is_the_mean_over_all_queries():
    """With room for all, the block-wise mean equals one pass over the whole text."""
    policy, count = policy_named("h2o"), 3 * BLOCK
    plan = make_plan(policy, count, count, 2)
    *_, kept = blocks("llama", TEXT[:count], policy, count, plan)
    *_, whole = blocks("llama", TEXT[:count], policy, count, plan, block=count)
    np.testing.assert_allclose(kept.score, whole.score, atol=1e-6)


def test_texts_beyond_the_bases_positions_are_refused_by_name():
    model, params = MODELS["llama"], PARAMS["llama"]
    with pytest.raises(InputError, match="at most 512"):
        read(model, params, [TEXT * 3], SNAPKV, Budget(tokens=24))
    with pytest.raises(InputError, match="at most 512"):
        next(bounded.stream(
            model, params, [TEXT * 2], [], g.Sampling(max_tokens=200), policy=SNAPKV, budget=Budget(tokens=24)
        ))  # fmt: skip
    with pytest.raises(InputError, match="empty"):
        read(model, params, [[]], SNAPKV, Budget(tokens=24))


def test_the_smallest_budgets_still_read():
    for keep in (1, 2, 5):
        plan = make_plan(SNAPKV, keep, 96, FAMILIES["gemma3"].num_layers)
        *_, kept = blocks("gemma3", TEXT[:96], SNAPKV, 96, plan)
        assert ((kept.position >= 0).sum(axis=-1) == keep).all()
        assert (kept.position.max(axis=-1) == 95).all()  # the last token is always among them
