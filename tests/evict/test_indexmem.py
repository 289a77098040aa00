"""The bounded cache with a latent memory: exact where it must be, nothing lost or twice, no row in another's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import InputError
from memjax.evict import bounded
from memjax.evict.bounded import make_plan, pad_left, read, read_block
from memjax.evict.compact import Budget, empty_kept
from memjax.evict.indexer import IndexerConfig, init_indexer
from memjax.evict.latent import init_memory
from memjax.evict.learned import Learned
from memjax.evict.once import cut, read_dense
from memjax.evict.policies import policy_named
from memjax.memory.latent import Rule
from memjax.models import generate as g
from memjax.models.decoder import empty_cache
from tests.evict.test_bounded import BLOCK, MODELS, PARAMS, TEXT
from tests.support import read as read_at_once

INDEXER, INDEXMEM = policy_named("indexer"), policy_named("indexmem")
FAMILIES = [pytest.param(f, marks=[] if f == "qwen3" else pytest.mark.slow) for f in ("qwen3", "llama", "mistral")]


def learned_of(name, rule, **changes):
    config = MODELS[name].config
    indexer = init_indexer(config, IndexerConfig.of(config), jax.random.key(2))
    return Learned(indexer, {**init_memory(config, rule, jax.random.key(3)), **changes}, rule)


def blocks(name, text, policy, capacity, learned):
    """(hidden, the bounded cache) after every block."""
    model, params = MODELS[name], PARAMS[name]
    size = learned.index_shape if policy.judged else None
    kept = empty_kept(model.config, 1, capacity, jnp.float32, size, learned.rule if policy.remembers else None)
    plan = make_plan(policy, capacity, len(text), model.config.num_layers)
    ids, positions = pad_left([text], 1, -(-len(text) // BLOCK) * BLOCK)
    for begin in range(0, ids.shape[1], BLOCK):
        part = slice(begin, begin + BLOCK)
        hidden, kept = read_block(model, params, ids[:, part], positions[:, part], kept, plan, learned, policy=policy)
        yield np.array(hidden), jax.tree.map(np.array, kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_is_in_the_cache_or_in_the_memory_and_in_one_only(name):
    """By counts, by positions, and by the sums of values: nothing is lost, nothing is counted twice (pitfall 7)."""
    model, count = MODELS[name], 5 * BLOCK
    learned = learned_of(name, Rule("slots", 4))
    at = np.arange(count, dtype=np.int32)[None]
    v = read_at_once(model, PARAMS[name], np.asarray([TEXT[:count]], np.int32), at, taps=("v",)).taps["v"]
    reach = model.config.window if model.config.local else None
    for seen, (_, kept) in enumerate(blocks(name, TEXT[:count], INDEXMEM, 24, learned), start=1):
        length, held = seen * BLOCK, kept.position >= 0
        kept_in = kept.v[0, 0].sum(axis=0, where=held[0, 0].T[..., None])
        total = kept_in + kept.latent.a[0, 0].sum(axis=1)
        if reach is None:
            assert (held.sum(axis=-1) + kept.latent.count == length).all()
            # The first layer's values do not depend on what was evicted.
            np.testing.assert_allclose(total, v[0, 0, :length].sum(axis=0), atol=1e-3)
        else:  # what left the window was out of every later query's reach, and is forgotten as the full cache forgets it
            assert (held.sum(axis=-1) + kept.latent.count <= length).all()
        np.testing.assert_allclose(kept.latent.z.sum(axis=-1), kept.latent.count)


@pytest.mark.parametrize("merge", ["slots", *(pytest.param(m, marks=pytest.mark.slow) for m in ("add", "mass"))])
def test_room_for_all_is_the_full_cache_bit_for_bit(merge):
    model, params, count = MODELS["qwen3"], PARAMS["qwen3"], 3 * BLOCK
    cache = empty_cache(model.config, 1, count)
    made = blocks("qwen3", TEXT[:count], INDEXMEM, count, learned_of("qwen3", Rule(merge, 4)))
    for begin, (hidden, remembered) in zip(range(0, count, BLOCK), made, strict=True):
        kept = remembered
        at = np.arange(begin, begin + BLOCK, dtype=np.int32)[None]
        plain, cache = g.prefill(model, params, np.asarray([TEXT[begin : begin + BLOCK]], np.int32), at, cache)
        np.testing.assert_array_equal(hidden, plain)
    np.testing.assert_array_equal(kept.k, cache.k)
    assert not kept.latent.count.any()


@pytest.mark.parametrize("merge", ["mass", *(pytest.param(m, marks=pytest.mark.slow) for m in ("add", "root", "delta"))])
def test_a_closed_gate_is_plain_eviction_bit_for_bit(merge):
    closed = learned_of("qwen3", Rule(merge, 4), gate=jnp.full((2,), -jnp.inf))
    plain = blocks("qwen3", TEXT[:160], INDEXER, 24, closed)
    for (hidden, kept), (other, remembered) in zip(plain, blocks("qwen3", TEXT[:160], INDEXMEM, 24, closed), strict=True):
        np.testing.assert_array_equal(hidden, other)
        for name in ("k", "v", "position", "score", "index"):
            np.testing.assert_array_equal(getattr(kept, name), getattr(remembered, name))
    assert remembered.latent.count.min() > 0
    assert remembered.bytes == kept.bytes + remembered.latent.bytes  # what it holds is charged to the budget


@pytest.mark.parametrize("name", ["qwen3", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_memory_with_a_place_for_every_token_reads_like_the_full_cache(name):
    """Prefill by blocks and decoding with intake: the merge by masses is attention itself where its features are exact."""
    model, params, sampling = MODELS[name], PARAMS[name], g.Sampling(max_tokens=8)
    learned = learned_of(name, Rule("slots", 200))
    reading = read(model, params, [TEXT[:150]], INDEXMEM, Budget(tokens=24), learned=learned, block=BLOCK, room=8)
    plain, _, _ = g.read_prompts(model, params, [TEXT[:150]], 0)
    np.testing.assert_allclose(reading.hidden, plain, atol=1e-3)
    without = read(model, params, [TEXT[:150]], INDEXER, Budget(tokens=24), learned=learned, block=BLOCK, room=8)
    assert not np.allclose(without.hidden, plain, atol=1e-2)
    made = g.collect(bounded.stream_from(model, params, reading, [], sampling, policy=INDEXMEM, learned=learned))
    assert made == g.generate(model, params, [TEXT[:150]], [], sampling)


def test_a_cut_context_is_shared_by_questions_and_rows_keep_apart():
    """Pitfall 7: a question leaves nothing in the state; contexts side by side read their own."""
    model, params = MODELS["qwen3"], PARAMS["qwen3"]
    learned = learned_of("qwen3", Rule("delta", 8))
    asked, texts = [5, 9, 13], (TEXT[:100], TEXT[60:140])
    prefixes = []
    for text in texts:
        dense = read_dense(model, params, [text], 128, learned=learned, block=64)
        kept = cut(model, dense, INDEXMEM, Budget(share=0.2), learned=learned)
        assert (np.asarray(kept.latent.count) == len(text) - (np.asarray(kept.position) >= 0).sum(axis=-1)).all()
        prefixes.append(kept.prefix(learned))
    before = jax.tree.map(np.array, prefixes[0])
    alone = [np.asarray(g.read_prompts(model, params, [asked], 0, prefix)[0][0]) for prefix in prefixes]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, prefixes[0]), before)
    together = g.read_prompts(model, params, [asked, asked], 0, g.side_by_side(prefixes))[0]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    forgotten = dataclasses.replace(prefixes[0], latent=None)
    assert not np.allclose(g.read_prompts(model, params, [asked], 0, forgotten)[0][0], alone[0], atol=1e-3)


def test_what_was_not_trained_is_asked_for_by_name():
    model, params = MODELS["qwen3"], PARAMS["qwen3"]
    with pytest.raises(InputError, match="--indexer DIR"):
        read(model, params, [TEXT], INDEXMEM, Budget(tokens=24))
    with pytest.raises(InputError, match="--latent DIR"):
        read(model, params, [TEXT], policy_named("snapkv+latent"), Budget(tokens=24))
