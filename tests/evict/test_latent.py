"""The latent memory's algebra: nothing written changes nothing, sums are true sums, mass restores the softmax."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax.evict.latent import Latent, add, empty_latent, merge_mass, residual, write
from memjax.kernels.segment_attention import Segment, attend

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
