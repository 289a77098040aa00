"""Every policy against kvpress on frozen tensors, and what all of them promise."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import InputError
from memjax.evict.compact import split
from memjax.evict.policies import DEFAULT_POLICY, POLICIES, AdaKV, LagKV, PyramidKV, SnapKV, View, policy_named
from memjax.models.rope import rotate, table

GOLDEN = Path(__file__).parents[1] / "goldens" / "evict.npz"
with np.load(GOLDEN) as file:
    FROZEN = dict(file)
META = json.loads(str(FROZEN["meta"]))
LAYERS, LENGTH, HEADS, SIZE = FROZEN["k"].shape
# kvpress' settings in the golden file: windows and parts smaller than the defaults, so that 0.9 removed is a fair case.
SETTINGS = {
    "snapkv": SnapKV(window=META["window"]),
    "pyramidkv": PyramidKV(window=META["window"], beta=2),
    "adakv": AdaKV(inner=SnapKV(window=META["window"])),
    "lagkv": LagKV(lag=META["lag"]),
}
WITH_GOLDEN = [SETTINGS.get(p.name, p) for p in POLICIES if p.name != "random"]  # torch's draws are its own
NAMES = [p.name for p in POLICIES]


SPARE = 40  # empty places among the candidates: they are nobody's neighbour, part or query (pitfall 9)
PLACES = np.sort(np.random.default_rng(0).choice(LENGTH + SPARE, LENGTH, replace=False))


def widen(x, fill):
    """x [B, S, ...] with its tokens at PLACES and `fill` between them."""
    wide = np.full((x.shape[0], LENGTH + SPARE, *x.shape[2:]), fill, np.asarray(x).dtype)
    wide[:, PLACES] = x
    return jnp.asarray(wide)


def frozen_view(policy, keep=100):
    """All frozen layers as the rows of one view, with the queries that the policy reads and three of padding."""
    rows, count = LAYERS, LENGTH if policy.queries is None else policy.queries
    at = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
    q_raw = jnp.asarray(FROZEN["q_raw"])
    q = rotate(q_raw, table(FROZEN["frequency"], at))
    pad = lambda x: jnp.pad(jnp.asarray(x)[:, LENGTH - count :], ((0, 0), (3, 0)) + ((0, 0),) * (x.ndim - 2))
    position = widen(at, -1)
    return View(
        k=widen(FROZEN["k"], 7.0),
        v=widen(FROZEN["v"], -5.0),
        position=jnp.broadcast_to(position[:, None], (rows, HEADS, LENGTH + SPARE)),
        q=pad(q),
        q_raw=pad(q_raw),
        q_position=jnp.pad(at[:, LENGTH - count :], ((0, 0), (3, 0)), constant_values=-1),
        length=jnp.full((rows,), LENGTH, jnp.int32),
        keep=jnp.int32(keep),
        window=jnp.int32(policy.queries or 0),
        reach=jnp.int32(1 << 30),
        frequency=jnp.asarray(FROZEN["frequency"]),
        layer=jnp.int32(0),
        scale=SIZE**-0.5,
    )


@partial(jax.jit, static_argnums=0)
def score_of(policy, view):
    return policy.score(view)


@partial(jax.jit, static_argnums=(0, 4))
def kept_of(policy, score, valid, keep, capacity):
    return split(score, valid, policy.per_head(jnp.where(valid, score, -jnp.inf), keep), capacity).kept


@pytest.mark.parametrize("policy", [p for p in WITH_GOLDEN if p.name != "streaming"], ids=lambda p: p.name)
def test_scores_equal_kvpress(policy):
    score = score_of(policy, frozen_view(policy))
    assert score.dtype == jnp.float32
    np.testing.assert_allclose(score[..., PLACES], FROZEN[f"score/{policy.name}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", WITH_GOLDEN, ids=lambda p: p.name)
def test_kept_sets_equal_kvpress(policy):
    for index, ratio in enumerate(META["ratios"]):
        budgets = policy.budgets(LENGTH * (1 - ratio), LENGTH, LAYERS)
        for layer, budget in enumerate(budgets.tolist()):
            view = frozen_view(policy, budget)
            score = score_of(policy, view)
            kept = kept_of(policy, score, view.valid, jnp.int32(budget), LENGTH)
            assert int(kept.sum(axis=-1).max()) <= policy.slots(budget, HEADS)
            kept, score = np.asarray(kept)[layer, :, PLACES].T, np.asarray(score)[layer, :, PLACES].T
            expected = FROZEN[f"kept/{policy.name}"][index, layer]
            assert kept.sum(axis=-1).tolist() == expected.sum(axis=-1).tolist()
            if policy.name == "lagkv":  # ranks tie between parts; which of the tied ones torch's top-k takes is its own
                for head in range(HEADS):
                    differ = kept[head] != expected[head]
                    assert (score[head][differ] == score[head][kept[head]].min()).all()
            else:
                np.testing.assert_array_equal(kept, expected)


def test_pyramid_budgets_equal_kvpress_and_fall():
    got = [PyramidKV(window=META["window"]).budgets(4096 * (1 - r), 4096, 6) for r in META["ratios"]]
    np.testing.assert_array_equal(got, FROZEN["budgets"])
    assert (np.diff(got[2]) < 0).all()
    assert PyramidKV().budgets(10, 4096, 6).tolist() == [10] * 6  # a last layer below the window: equal budgets


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_every_policy_is_finite_static_and_knows_no_other_row(policy):
    view = frozen_view(policy)
    score = score_of(policy, view)
    assert score.shape == view.position.shape
    assert np.isfinite(score).all()
    other = dataclasses.replace(view, k=view.k.at[1].multiply(3.0), v=view.v.at[1].add(1.0), q=view.q.at[1].add(1.0))
    np.testing.assert_array_equal(score_of(policy, other)[0], score[0])
    assert hash(policy) == hash(dataclasses.replace(policy))  # a static argument of jit


def test_adakv_shares_the_layers_budget_out_and_keeps_each_heads_best():
    policy = AdaKV(safe=0.5)
    score = jnp.asarray(np.stack([np.linspace(5, 6, 40), np.linspace(0, 1, 40)])[None])
    share = jax.jit(lambda policy, keep: policy.per_head(score, keep), static_argnums=0)
    assert share(policy, 10).tolist() == [[15, 5]]
    assert policy.slots(10, 2) == 15
    assert share(AdaKV(), 15).tolist() == [[27, 3]]  # 15 * 0.2 is 3, not 2


def test_bfloat16_keys_are_scored_in_float32():
    """Pitfall 13: scores of a bfloat16 cache do not tie by rounding."""
    view = frozen_view(policy_named("knorm"))
    score = score_of(policy_named("knorm"), dataclasses.replace(view, k=view.k.astype(jnp.bfloat16)))
    assert score.dtype == jnp.float32
    assert len(np.unique(score[0, 0, PLACES])) > 0.9 * LENGTH


def test_random_numbers_stay_with_their_tokens():
    policy = policy_named("random")
    view = frozen_view(policy)
    turned = dataclasses.replace(view, position=view.position[..., ::-1])
    score = score_of(policy, view)
    np.testing.assert_array_equal(score_of(policy, turned)[..., ::-1], score)
    assert float(score.min()) >= 0
    assert float(score.max()) < 1
    assert abs(float(score[..., PLACES].mean()) - 0.5) < 0.05
    assert not np.array_equal(score[0, 0], score[0, 1])
    assert not np.array_equal(score, score_of(dataclasses.replace(policy, seed=1), view))


def test_what_a_local_layer_cannot_reach_gets_no_attention():
    policy = SETTINGS["snapkv"]
    view = dataclasses.replace(frozen_view(policy), reach=jnp.int32(40))
    score = np.asarray(score_of(policy, view))[..., PLACES]
    assert (score[..., : LENGTH - 32 - 40 - 2] == 0).all()
    assert (score[..., LENGTH - 60 : LENGTH - 32] > 0).all()


def test_names():
    assert len(set(NAMES)) == len(NAMES)
    assert DEFAULT_POLICY in NAMES
    with pytest.raises(InputError, match="snapkv"):
        policy_named("snapvk")
