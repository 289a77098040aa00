"""The latent memory's algebra: nothing written changes nothing, sums are true sums, mass restores the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.evict.latent import absorb, empty_latent, init_memory, state_of, write, write_delta
from memjax.kernels.segment_attention import Segment, attend
from memjax.memory.latent import Latent, Residual, Rule, add, log_features, merge_mass, read_latent
from memjax.memory.latent import residual_of as residual
from tests.support import small_config

B, T, S, N, K, H, M = 2, 3, 7, 4, 2, 4, 5
RNG = np.random.default_rng(0)
Q, V = RNG.normal(size=(B, T, N, H)).astype(np.float32), RNG.normal(size=(B, S, K, H)).astype(np.float32)
KEYS = RNG.normal(size=(B, S, K, H)).astype(np.float32)
PHI_Q, PHI_K = RNG.normal(size=(B, T, N, M)).astype(np.float32), RNG.normal(size=(B, K, S, M)).astype(np.float32)
EVICTED = RNG.random((B, K, S)) < 0.5
EVICTED[1, 0] = False  # a head that lost nothing
OUT, LSE = RNG.normal(size=(B, T, N, H)).astype(np.float32), RNG.normal(size=(B, T, N)).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gate_of_zero_and_an_empty_state_change_no_bit(dtype):
    out = jnp.asarray(OUT, dtype)
    full = write(empty_latent(B, K, M, H), PHI_K, V, EVICTED)
    np.testing.assert_array_equal(add(out, residual(full, PHI_Q), 0.0), out)
    empty = write(empty_latent(B, K, M, H), PHI_K, V, np.zeros_like(EVICTED), decay=0.5)
    for root in (False, True):
        np.testing.assert_array_equal(add(out, residual(empty, PHI_Q, root=root), 1.0), out)
    np.testing.assert_array_equal(merge_mass(out, LSE, empty, np.exp(PHI_Q)), out)


def test_write_and_read_are_the_papers():
    """Loops over tokens and heads; events in sequence, the decay once per event and only where something was lost."""
    latent = empty_latent(B, K, M, H)
    a, z = np.zeros((B, K, M, H)), np.zeros((B, K, M))
    for event in (EVICTED, ~EVICTED):
        latent = write(latent, PHI_K, V, event, decay=0.9, rate=0.1)
        for b, k in np.ndindex(B, K):
            if event[b, k].any():
                a[b, k], z[b, k] = 0.9 * a[b, k], 0.9 * z[b, k]
            for s in np.flatnonzero(event[b, k]):
                a[b, k] += 0.1 * np.outer(PHI_K[b, k, s], V[b, s, k])
                z[b, k] += 0.1 * PHI_K[b, k, s] ** 2
    np.testing.assert_allclose(latent.a, a, atol=1e-6)
    np.testing.assert_allclose(latent.z, z, atol=1e-6)
    got, rooted = residual(latent, PHI_Q), residual(latent, PHI_Q, root=True)
    for b, t, n in np.ndindex(B, T, N):
        phi, k = PHI_Q[b, t, n], n // (N // K)
        mass = phi**2 @ z[b, k]
        np.testing.assert_allclose(got[b, t, n], phi @ a[b, k] / (mass + 1e-6), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rooted[b, t, n], phi @ a[b, k] / np.sqrt(mass + 1e-6), rtol=1e-4, atol=1e-5)


def test_scales_behave_as_the_algebra_says():
    """A constant rate cancels; features scaled by c scale the paper's read by 1/c^2 and leave the rooted one."""
    event = np.ones_like(EVICTED)
    states = [write(empty_latent(B, K, M, H), c * PHI_K, V, event, rate=r) for c, r in ((1, 1.0), (1, 7.0), (3, 1.0))]
    one, fast, scaled = (residual(s, c * PHI_Q) for s, c in zip(states, (1, 1, 3), strict=True))
    np.testing.assert_allclose(one, fast, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(one, 9 * scaled, rtol=1e-3, atol=1e-5)
    rooted = [residual(s, c * PHI_Q, root=True) for s, c in zip((states[0], states[2]), (1, 3), strict=True)]
    np.testing.assert_allclose(*rooted, rtol=1e-3, atol=1e-5)


def test_a_chunk_is_the_sum_of_its_tokens():
    """Pitfall 14: means of keys and values would add products of different tokens."""
    whole = write(empty_latent(B, K, M, H), PHI_K, V, EVICTED)
    parts = empty_latent(B, K, M, H)
    for s in range(S):
        parts = write(parts, PHI_K[:, :, s : s + 1], V[:, s : s + 1], EVICTED[:, :, s : s + 1])
    np.testing.assert_allclose(whole.a, parts.a, atol=1e-5)
    np.testing.assert_allclose(whole.z, parts.z, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 60.0])  # a large offset of the logits must not overflow
def test_mass_of_features_that_are_the_softmax_kernel_restores_full_attention(offset):
    """phi(k_i) = e_i and phi(q)_i = exp(q.k_i): then phi(q).phi(k) is the kernel, and nothing is lost."""
    scale, at = 0.5, np.full((B, T), S)
    logits = scale * np.einsum("btkgh,bskh->btkgs", Q.reshape(B, T, K, N // K, H), KEYS).reshape(B, T, N, S) + offset
    everything = np.tile(np.arange(S), (B, 1))
    full, _ = attend(Q, at, [Segment(KEYS, V, everything)], scale=scale)
    position = np.where(EVICTED.swapaxes(1, 2), -1, everything[..., None])
    kept, lse = attend(Q, at, [Segment(KEYS, V, position)], scale=scale)
    one_hot = np.broadcast_to(np.eye(S, dtype=np.float32), (B, K, S, S))
    latent = write(empty_latent(B, K, S, H), one_hot, V, EVICTED, squared=False)
    merged = merge_mass(kept, lse + offset, latent, np.exp(logits).astype(np.float32))
    np.testing.assert_allclose(merged, full, atol=1e-5)
    assert not np.allclose(kept, full, atol=1e-2)


def test_the_state_is_float32_whatever_is_written():
    """Pitfall 13."""
    latent = write(empty_latent(B, K, M, H), jnp.asarray(PHI_K, jnp.bfloat16), jnp.asarray(V, jnp.bfloat16), EVICTED)
    assert isinstance(latent, Latent)
    assert latent.a.dtype == latent.z.dtype == jnp.float32
    assert latent.a.shape == (B, K, M, H)


RULES = [Rule(merge, 6, gate, constant) for merge, gate, constant in (
    ("add", "layer", True), ("root", "query", False), ("delta", "query", True), ("mass", "query", False),
    ("slots", "layer", False),
)]  # fmt: skip
CONFIG = small_config(num_layers=1, num_heads=N, num_kv_heads=K, head_size=H)


def params_of(rule, closed=False):
    made = jax.tree.map(lambda x: x[0], init_memory(CONFIG, rule, jax.random.key(0)))
    if rule.gate == "query":
        made["gate_out"] = made["gate_out"] + 0.3
    return {**made, "gate": jnp.float32(-jnp.inf)} if closed and made else made


def state(rule):
    return jax.tree.map(lambda x: x[0], state_of(CONFIG, rule, B))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.merge)
def test_every_rule_is_plain_eviction_with_nothing_written_and_with_a_closed_gate(rule):
    told = {"scale": 0.5, "softcap": 4.0}
    empty = absorb(rule, params_of(rule), state(rule), KEYS, V, np.zeros_like(EVICTED), 0.5)
    for dtype in (jnp.float32, jnp.bfloat16):
        out = jnp.asarray(OUT, dtype)
        np.testing.assert_array_equal(read_latent(Residual(empty, params_of(rule), rule), Q, out, LSE, **told), out)
    written = absorb(rule, params_of(rule), state(rule), KEYS, V, EVICTED, 0.5)
    np.testing.assert_array_equal(written.count, EVICTED.sum(axis=-1))
    assert not np.allclose(read_latent(Residual(written, params_of(rule), rule), Q, OUT, LSE, **told), OUT, atol=1e-4)
    if rule.merge != "slots":
        closed = Residual(written, params_of(rule, closed=True), rule)
        np.testing.assert_array_equal(read_latent(closed, Q, OUT, LSE, **told), OUT)
    # The head that lost nothing is left as it is, whatever its neighbours lost.
    heads = slice(0, N // K)
    read = read_latent(Residual(written, params_of(rule), rule), Q, OUT, LSE, **told)
    np.testing.assert_array_equal(read[1, :, heads], OUT[1, :, heads])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_centroids_of_one_token_each_restore_full_attention(softcap):
    rule, at = Rule("slots", S), np.full((B, T), S)
    everything = np.tile(np.arange(S), (B, 1))
    told = {"scale": 0.5, "softcap": softcap}
    full, _ = attend(Q, at, [Segment(KEYS, V, everything)], **told)
    kept, lse = attend(Q, at, [Segment(KEYS, V, np.where(EVICTED.swapaxes(1, 2), -1, everything[..., None]))], **told)
    latent = state(rule)
    for part in (slice(0, 3), slice(3, S)):  # in two events, the second beside the centroids of the first
        now = np.zeros_like(EVICTED)
        now[..., part] = EVICTED[..., part]
        latent = absorb(rule, {}, latent, KEYS, V, now, 0.5)
    np.testing.assert_allclose(read_latent(Residual(latent, {}, rule), Q, kept, lse, **told), full, atol=1e-5)


def test_centroids_lose_no_token_where_they_are_fewer():
    rule = Rule("slots", 2)
    latent = absorb(rule, {}, absorb(rule, {}, state(rule), KEYS, V, EVICTED, 0.5), KEYS, V, ~EVICTED, 0.5)
    np.testing.assert_allclose(latent.z.sum(axis=-1), S)
    np.testing.assert_allclose(latent.a.sum(axis=2), V.sum(axis=1), atol=1e-4)
    np.testing.assert_allclose(latent.k.sum(axis=2), KEYS.sum(axis=1), atol=1e-4)


def test_positive_features_have_the_kernel_as_their_mean():
    """Of many features, unlearned: the product is exp(scale q k) to a few per cent."""
    phi = jax.random.normal(jax.random.key(3), (H, 20_000))
    q, k = Q[0, 0, 0], KEYS[0, 0, 0]
    for kernel in (1.0, 0.25):
        params = {"phi": kernel**0.5 * phi, "norm": jnp.float32(kernel)}
        got = (jnp.exp(log_features(params, q, 0.5)) * jnp.exp(log_features(params, k, 0.5))).sum()
        np.testing.assert_allclose(got, np.exp(kernel * 0.5 * q @ k), rtol=0.1)


def test_the_delta_rule_replaces_what_a_key_held():
    """With unit features and a rate of 1 the last value of a key is read back, where a sum gives both."""
    phi = np.zeros((1, 1, 3, 2), np.float32)
    phi[0, 0, :, 0] = 1
    v, every = V[:1, :3, :1], np.ones((1, 1, 3), bool)
    once = write_delta(empty_latent(1, 1, 2, H), phi, v, every, decay=jnp.float32(1), rate=jnp.float32(1))
    np.testing.assert_allclose(once.a[0, 0, 0], v[0, 2, 0], atol=1e-6)
    none = write_delta(once, phi, v, ~every, decay=jnp.float32(0.5), rate=jnp.float32(1))
    np.testing.assert_array_equal(none.a, once.a)  # nothing was evicted, so nothing decays
