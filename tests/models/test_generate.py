"""Generation: greedy against a loop without a cache, batches against singles, prefixes, stops, sampling, compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import InputError
from memjax.models import generate as g
from memjax.models.decoder import make_model, unembed
from tests.support import random_params, read_alone, small_config

CONFIG = small_config()
MODEL = make_model(CONFIG)
PARAMS = random_params(CONFIG)
PROMPTS = [[3, 5, 7, 11, 13], [2, 4], [50, 60, 70]]


def slow_greedy(prompt, steps, stops=()):
    tokens = list(prompt)
    for _ in range(steps):
        hidden = read_alone(MODEL, PARAMS, tokens)
        token = int(jnp.argmax(unembed(MODEL, PARAMS, hidden[-1])))
        if token in stops:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected():
    return [slow_greedy(p, 6) for p in PROMPTS]


def test_batches_equal_singles_and_the_loop_without_a_cache(expected):
    sampling = g.Sampling(max_tokens=6)
    assert g.generate(MODEL, PARAMS, PROMPTS, [], sampling) == expected
    assert [g.generate(MODEL, PARAMS, [p], [], sampling)[0] for p in PROMPTS] == expected


def test_a_shared_prefix_changes_nothing(expected):
    prefix = g.read_prefix(MODEL, PARAMS, PROMPTS[0][:3])
    got = g.generate(MODEL, PARAMS, [PROMPTS[0][3:]], [], g.Sampling(max_tokens=6), prefix=prefix)
    assert got == expected[:1]


def test_reading_in_blocks_equals_reading_at_once(expected, monkeypatch):
    monkeypatch.setattr(g, "PREFILL_BLOCK", 2)
    assert g.generate(MODEL, PARAMS, PROMPTS, [], g.Sampling(max_tokens=6)) == expected


def test_stop_tokens_end_a_row_and_are_left_out(expected):
    stop = expected[0][3]
    got = g.generate(MODEL, PARAMS, PROMPTS, [stop], g.Sampling(max_tokens=6))
    assert got == [slow_greedy(p, 6, [stop]) for p in PROMPTS]
    assert stop not in got[0]


def test_streamed_pieces_add_up(expected):
    pieces = list(g.stream(MODEL, PARAMS, PROMPTS[:1], [], g.Sampling(max_tokens=6), every=2))
    assert [len(p[0]) for p in pieces] == [1, 2, 2, 1]
    assert g.collect(iter(pieces)) == expected[:1]


def test_sampling_follows_the_seed_and_top_p_narrows_to_greedy(expected):
    draw = lambda **k: g.generate(MODEL, PARAMS, PROMPTS, [], g.Sampling(max_tokens=6, temperature=1.0, **k))
    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    assert draw(top_p=1e-6) == expected


def test_nucleus_keeps_the_smallest_set():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = jax.jit(jax.vmap(lambda key: g.sample(logits, key, jnp.float32(1), jnp.float32(0.6))))(keys)
    assert set(np.asarray(drawn).ravel().tolist()) == {0, 1}


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_a_sorted_vocabulary(top_p):
    p = np.random.default_rng(0).dirichlet(np.full(500, 0.05), size=6).astype(np.float32)
    p[5] = 0
    p[5, 7] = 1  # one sure token
    kept = np.asarray(jax.jit(g.nucleus)(p, np.float32(top_p)))
    for row, chosen in zip(p, kept, strict=True):
        ranked = np.sort(row)[::-1]
        count = int(np.searchsorted(np.cumsum(ranked), top_p)) + 1
        assert set(np.flatnonzero(chosen)) == set(np.argsort(-row, kind="stable")[:count])


def test_prompts_of_one_bucket_share_the_compiled_programs():
    sampling = g.Sampling(max_tokens=6)
    g.generate(MODEL, PARAMS, [[1, 2, 3]], [], sampling)
    before = (g.prefill._cache_size(), g.start._cache_size(), g.decode._cache_size())
    for prompt in ([4], [5] * 9, [6, 7]):
        g.generate(MODEL, PARAMS, [prompt], [9], g.Sampling(max_tokens=4, temperature=0.5))
    assert (g.prefill._cache_size(), g.start._cache_size(), g.decode._cache_size()) == before


def test_a_prompt_beyond_the_window_is_refused_with_its_length():
    with pytest.raises(InputError, match="510 tokens and 6 more"):
        g.generate(MODEL, PARAMS, [[1] * 510], [], g.Sampling(max_tokens=6))
    with pytest.raises(InputError, match="empty"):
        g.generate(MODEL, PARAMS, [[]], [])


def test_buckets_hold_and_grow():
    lengths = np.arange(1, 3000)
    sizes = np.array([g.bucket(int(n)) for n in lengths])
    assert (sizes >= lengths).all()
    assert len(set(sizes)) < 16
    assert [g.batch_bucket(n) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]


def test_common_prefix_leaves_every_prompt_a_token():
    assert g.common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert g.common_prefix([[1, 2, 3], [1, 5]]) == 1
    assert g.common_prefix([[1], [1, 5]]) == 0


def test_many_prompts_are_answered_like_each_alone():
    prompts = [[9, 8, *p] for p in PROMPTS]
    alone = [slow_greedy(p, 4) for p in prompts]
    assert g.generate_all(MODEL, PARAMS, prompts, (), g.Sampling(max_tokens=4), rows=2) == alone
    prefix = g.read_prefix(MODEL, PARAMS, [9, 8])
    assert g.generate_all(MODEL, PARAMS, PROMPTS, (), g.Sampling(max_tokens=4), prefix=prefix, rows=2) == alone
    assert g.generate_all(MODEL, PARAMS, [], ()) == []


def test_rows_continue_prefixes_of_their_own():
    rng = np.random.default_rng(5)
    texts = [rng.integers(3, 97, count).tolist() for count in (20, 40, 9)]
    rests = [rng.integers(3, 97, count).tolist() for count in (3, 5, 4)]
    prefix = g.side_by_side([g.read_prefix(MODEL, PARAMS, text) for text in texts])
    assert prefix.length.tolist() == [20, 40, 9, 0]
    got = g.generate(MODEL, PARAMS, rests, [], g.Sampling(max_tokens=6), prefix=prefix)
    whole = [text + rest for text, rest in zip(texts, rests, strict=True)]
    assert got == g.generate(MODEL, PARAMS, whole, [], g.Sampling(max_tokens=6))
    with pytest.raises(InputError, match="4 prefixes stand side by side, but 2 rows"):
        g.generate(MODEL, PARAMS, rests[:2], [], prefix=prefix)
