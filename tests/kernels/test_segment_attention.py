"""Attention over segments: against a NumPy softmax, under every split, and where a query sees nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.kernels.segment_attention import Segment, attend, merge


def numpy_attention(q, k, v, q_position, k_position, scale, softcap=None, window=None):
    batch, length, heads, _ = q.shape
    groups = k.shape[2]
    out = np.zeros_like(q)
    lse = np.full((batch, length, heads), -np.inf)
    for b in range(batch):
        for t in range(length):
            for n in range(heads):
                logits = scale * k[b, :, n // (heads // groups)] @ q[b, t, n]
                if softcap:
                    logits = softcap * np.tanh(logits / softcap)
                seen = (k_position[b] >= 0) & (k_position[b] <= q_position[b, t])
                if window:
                    seen &= q_position[b, t] - k_position[b] < window
                if not seen.any():
                    continue
                weights = np.exp(logits[seen])
                out[b, t, n] = weights @ v[b, seen, n // (heads // groups)] / weights.sum()
                lse[b, t, n] = np.log(weights.sum())
    return out, lse


def make(batch=2, length=3, held=7, heads=6, groups=2, size=4, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, heads, size)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, held, groups, size)).astype(np.float32)
    k_position = np.tile(np.arange(held), (batch, 1))
    k_position[0, -2:] = -1
    q_position = np.tile(np.arange(held - 2, held - 2 + length), (batch, 1))
    return q, k, v, q_position, k_position


@pytest.mark.parametrize(("softcap", "window", "groups"), [(None, None, 2), (5.0, None, 1), (None, 3, 6), (2.0, 2, 3)])
def test_one_segment_equals_numpy(softcap, window, groups):
    q, k, v, qp, kp = make(groups=groups)
    out, lse = attend(q, qp, [Segment(k, v, kp)], scale=0.5, softcap=softcap, window=window)
    expected, expected_lse = numpy_attention(q, k, v, qp, kp, 0.5, softcap, window)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_split_segments_equal_one(cut):
    q, k, v, qp, kp = make()
    whole = attend(q, qp, [Segment(k, v, kp)], scale=0.5)
    parts = [Segment(k[:, :cut], v[:, :cut], kp[:, :cut]), Segment(k[:, cut:], v[:, cut:], kp[:, cut:])]
    for got in (attend(q, qp, parts, scale=0.5), merge([attend(q, qp, [p], scale=0.5) for p in parts])):
        np.testing.assert_allclose(got[0], whole[0], atol=1e-6)
        np.testing.assert_allclose(got[1], whole[1], atol=1e-6)


def test_shared_segment_equals_copies():
    q, k, v, qp, kp = make(batch=3)
    shared = Segment(k[:1], v[:1], kp[1:2])
    copied = Segment(np.repeat(k[:1], 3, 0), np.repeat(v[:1], 3, 0), np.repeat(kp[1:2], 3, 0))
    own = Segment(k, v, kp + 1)
    for a, b in zip(attend(q, qp, [shared, own], scale=0.5), attend(q, qp, [copied, own], scale=0.5), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rows_that_do_not_see_a_shared_segment():
    q, k, v, qp, kp = make()
    position = np.stack([np.full(7, -1), np.arange(7)])
    out, _ = attend(q, qp, [Segment(k[:1], v[:1], position), Segment(k, v, kp)], scale=0.5)
    alone, _ = attend(q[:1], qp[:1], [Segment(k[:1], v[:1], kp[:1])], scale=0.5)
    np.testing.assert_allclose(out[0], alone[0], atol=1e-6)


def test_a_query_that_sees_nothing_gets_zeros_and_empty_segments_are_harmless():
    q, k, v, qp, kp = make()
    empty = Segment(jnp.full_like(k, 1e4), v, np.full_like(kp, -1))
    out, lse = attend(q, qp, [empty], scale=0.5)
    assert not np.asarray(out).any()
    assert np.isneginf(lse).all()
    with_empty = attend(q, qp, [empty, Segment(k, v, kp)], scale=0.5)
    without = attend(q, qp, [Segment(k, v, kp)], scale=0.5)
    np.testing.assert_allclose(with_empty[0], without[0], atol=1e-6)
    np.testing.assert_allclose(merge([(out, lse), without])[0], without[0], atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_equal_those_of_a_plain_softmax(softcap):
    """Through the output and through the log-sum-exp; a query that sees nothing has and gives none."""
    q, k, v, qp, kp = make()
    qp[1, 0] = -1
    to_out, to_lse = np.random.default_rng(1).normal(size=(2, 2, 3, 6, 4)).astype(np.float32)
    seen = (kp[:, None] >= 0) & (kp[:, None] <= qp[:, :, None])

    def value(out, lse):
        return (out * to_out).sum() + (jnp.where(qp[..., None] < 0, 0.0, lse) * to_lse[..., 0]).sum()

    def plain(q, k, v):
        wide_k, wide_v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
        logits = 0.5 * jnp.einsum("btnh,bsnh->btns", q, wide_k)
        logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
        logits = jnp.where(seen[:, :, None], logits, -1e9)
        out = jnp.einsum("btns,bsnh->btnh", jax.nn.softmax(logits), wide_v)
        return value(jnp.where(qp[..., None, None] < 0, 0.0, out), jax.nn.logsumexp(logits, axis=-1))

    ours = jax.grad(lambda *x: value(*attend(x[0], qp, [Segment(*x[1:], kp)], scale=0.5, softcap=softcap)), (0, 1, 2))
    for got, expected in zip(ours(q, k, v), jax.grad(plain, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_heads_with_positions_of_their_own_see_their_own_tokens():
    q, k, v, qp, kp = make(groups=2)
    own = np.stack([kp, kp[:, ::-1]], axis=-1)  # [B, S, K]
    own[1, 3, 1] = -1
    rest = make(seed=1, groups=2)
    segments = [Segment(k, v, own), Segment(rest[1], rest[2], rest[4])]
    out, lse = attend(q, qp, segments, scale=0.5, window=4)
    for head in range(2):
        both_k, both_v = np.concatenate([k, rest[1]], axis=1), np.concatenate([v, rest[2]], axis=1)
        position = np.concatenate([own[..., head], rest[4]], axis=1)
        expected, expected_lse = numpy_attention(q, both_k, both_v, qp, position, 0.5, window=4)
        mine = slice(3 * head, 3 * head + 3)
        np.testing.assert_allclose(out[:, :, mine], expected[:, :, mine], atol=1e-6)
        np.testing.assert_allclose(lse[:, :, mine], expected_lse[:, :, mine], atol=1e-6)
    same = attend(q, qp, [Segment(k, v, np.stack([kp, kp], axis=-1))], scale=0.5)
    np.testing.assert_array_equal(same[0], attend(q, qp, [Segment(k, v, kp)], scale=0.5)[0])
