"""What a latent memory learns from: the explained share is 0 and 1 where it must be, and is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.evict import latent_loss as m
from memjax.evict.indexer import IndexerConfig, init_indexer
from memjax.evict.latent import init_memory
from memjax.evict.learned import Learned
from memjax.evict.policies import SnapKV
from memjax.evict.policies.indexer import Indexer
from memjax.memory.latent import Rule
from memjax.models.decoder import make_model
from tests.evict.lessons import small_lessons
from tests.support import random_params, small_config

CONFIG = small_config(family="qwen3", num_layers=2, qk_norm=True, head_size=16, query_scale=0.25)
MODEL, PARAMS = make_model(CONFIG), random_params(CONFIG)
LEARNED = Learned(init_indexer(CONFIG, IndexerConfig.of(CONFIG), jax.random.key(1)))
LESSONS, REMOVED = small_lessons(), jnp.asarray([0.6, 0.8])
explained = jax.jit(m.explained)  # of what is lost, and how much of the output is added


def evicting(rule, policy=Indexer(window=6), learned=LEARNED):
    return m.Evicting(PARAMS, learned, jnp.asarray([0.5, 0.9]), MODEL, policy, rule, events=3)


def test_a_place_for_every_token_explains_all_and_a_closed_gate_nothing():
    np.testing.assert_allclose(explained(evicting(Rule("slots", 20)), {}, LESSONS, REMOVED)[0], 1, atol=1e-4)
    rule = Rule("add", 4)
    closed = {**init_memory(CONFIG, rule, jax.random.key(0)), "gate": jnp.full((2,), -jnp.inf)}
    np.testing.assert_array_equal(explained(evicting(rule), closed, LESSONS, REMOVED), 0)


def test_what_each_head_evicts_by_a_score_of_its_own_is_given_back_too():
    apart = Learned(init_indexer(CONFIG, IndexerConfig.of(CONFIG, per_head=True), jax.random.key(1)))
    got = explained(evicting(Rule("slots", 20), learned=apart), {}, LESSONS, REMOVED)[0]
    np.testing.assert_allclose(got, 1, atol=1e-4)


def test_a_gate_that_closes_shows_in_what_is_logged():
    """Pitfall 2: beside the loss stand the gate, how much is added, and how much is explained; each falls as it closes."""
    rule = Rule("add", 4)
    trained = init_memory(CONFIG, rule, jax.random.key(0))
    told = evicting(rule)
    logged = [
        m.latent_loss(told, {**trained, "gate": jnp.full((2,), gate)}, LESSONS, jax.random.key(7))[1]
        for gate in (0.0, -4.0, -8.0)
    ]
    for name in ("gate", "strength"):
        values = [float(line[name]) for line in logged]
        assert values[0] > 2 * values[1] > 4 * values[2] > 0
    assert abs(float(logged[2]["explained"])) < abs(float(logged[0]["explained"]))


@pytest.mark.parametrize(
    "merge", ["mass", *(pytest.param(merge, marks=pytest.mark.slow) for merge in ("add", "root", "delta"))]
)
def test_every_rule_learns(merge):
    """Gradients reach map and gate through write and read, are finite, and a few steps explain more."""
    rule = Rule(merge, 8, gate="query", constant=merge == "add")
    trained = init_memory(CONFIG, rule, jax.random.key(0))
    told = evicting(rule, SnapKV(window=6))
    value = jax.jit(jax.value_and_grad(lambda trained: m.latent_loss(told, trained, LESSONS, jax.random.key(7))[0]))
    losses = []
    for _ in range(12):
        loss, grad = value(trained)
        losses.append(float(loss))
        norm = jnp.sqrt(sum(jnp.square(x).sum() for x in grad.values()))
        trained = jax.tree.map(lambda x, g, norm=norm: x - 0.3 * g / norm, trained, grad)
        assert all(np.isfinite(x).all() for x in grad.values())
    assert min(losses) < losses[0]
    moved = {"phi", "gate", "gate_in", "gate_out"} | ({"scale", "norm"} if merge == "mass" else set())
    assert all(float(jnp.abs(grad[name]).max()) > 0 for name in moved)
