"""Gate rules: what each looks at, how thresholds are found, what is kept, and when it is set anew."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.bank import calibrate as c
from memjax.bank import gate as t
from memjax.bank.store import open_bank
from memjax.errors import BankError, ConfigError
from memjax.models.decoder import unembed
from memjax.models.generate import Sampling, generate_all, read_prompts
from tests.small_bank import BASE, add
from tests.support import random_adapter


def signals(entropy, base_entropy=3.0, **more):
    return t.Signals(entropy, base_entropy, **{"margin": 1.0, "kl": 0.5, "score": 1.0, "gap": 0.1, **more})


def test_entropy_and_threshold():
    logits = np.array([[0.0, 0.0], [50.0, 0.0]], np.float32)
    np.testing.assert_allclose(t.entropy(logits), [np.log(2), 0], atol=1e-6)
    threshold, accuracy = t.best_threshold([0.5, 1.0, 1.5], [3.0, 4.0])
    assert 1.5 < threshold < 3.0
    assert accuracy == 1.0
    threshold, accuracy = t.best_threshold([0.5, 1.0, 3.5], [3.0, 4.0])
    assert 1.0 < threshold < 3.0
    assert accuracy == pytest.approx(5 / 6)
    with pytest.raises(BankError, match="held-out"):
        t.best_threshold([], [1.0])


def test_a_threshold_is_not_moved_by_one_odd_question():
    rng = np.random.default_rng(0)
    general = -np.abs(rng.normal(0, 0.15, 48))
    asked = -rng.uniform(1.5, 8, 10)
    plain, _ = t.best_threshold(asked, general)
    # One more question among the general prompts would be won by letting two of these pass.
    odd = np.sort(general)[2] - 1e-3
    moved, accuracy = t.best_threshold([*asked, odd], general)
    assert plain < general.min()
    assert moved < general.min()
    assert accuracy == pytest.approx((10 / 11 + 1) / 2)
    assert t.best_threshold([2.0], [1.0])[1] <= 0.5  # nothing parts them
    assert t.best_threshold([1.0], [2.0]) == (pytest.approx(1.5), 1.0)


def test_what_the_first_token_tells():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    told = t.first_token(jnp.log(jnp.asarray([p, q])), jnp.log(jnp.asarray(q)))
    np.testing.assert_allclose(told.margin, [np.log(0.7 / 0.2), np.log(0.5 / 0.3)], rtol=1e-5)
    np.testing.assert_allclose(told.kl, [(p * np.log(p / q)).sum(), 0], atol=1e-6)
    np.testing.assert_allclose(told.entropy[0], -(p * np.log(p)).sum(), rtol=1e-5)


def test_an_adapter_of_no_scale_tells_the_bases_own():
    adapter = random_adapter(BASE.config, 3, 4)
    nothing = dataclasses.replace(adapter, scale=jnp.float32(0))
    (told,), (row,) = (t.probe_prompts(BASE, [[5, 6, 7, 8, 9]], a, 2) for a in (adapter, nothing))
    assert row["entropy"] == row["base_entropy"]
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert told["kl"] > 1e-3


def ahead(tokens, stops=(-2,)):
    hidden, cache, lengths = read_prompts(BASE.model, BASE.params, [tokens], t.TOKENS)
    found = t.read_ahead(BASE.model, BASE.params, hidden, lengths, cache, jnp.asarray(stops, jnp.int32))
    return float(found.entropy[0]), found.tokens[0].tolist()


def test_what_is_read_ahead_is_what_would_be_said_and_its_entropy():
    found, tokens = [], [5, 6, 7, 8, 9]
    for _ in range(t.TOKENS):
        hidden, _, _ = read_prompts(BASE.model, BASE.params, [tokens], 0)
        found.append(float(t.entropy(unembed(BASE.model, BASE.params, hidden))[0]))
        tokens = tokens + generate_all(BASE.model, BASE.params, [tokens], (), Sampling(max_tokens=1))[0]
    value, said = ahead([5, 6, 7, 8, 9])
    assert value == pytest.approx(np.mean(found), abs=1e-4)
    assert said == tokens[5:]
    every = range(BASE.config.vocab_size)
    value, said = ahead([5, 6, 7, 8, 9], every)  # an answer that ends at once
    assert value == pytest.approx(found[0], abs=1e-4)
    assert said == [-1] * t.TOKENS
    assert np.mean(found) != pytest.approx(found[0], abs=1e-3)


@pytest.mark.parametrize("rule", t.RULES)
def test_every_rule_parts_what_its_signals_part(rule):
    fit = [signals(1 + 0.01 * i, mean_entropy=0.5, none=-1.0, kl=2 + 0.02 * i) for i in range(8)]
    unfit = [signals(2.9 + 0.01 * i, mean_entropy=2.5, none=1.0, kl=0.1 - 0.01 * i) for i in range(8)]
    gate = t.fit_gate(rule, fit, unfit, BASE.id, BASE.tokenizer.template_id, 3)
    assert gate.balanced_accuracy == 1.0
    assert all(gate.opens(s) for s in fit)
    assert not any(gate.opens(s) for s in unfit)
    kept = t.Gate(**json.loads(json.dumps(dataclasses.asdict(gate))))
    assert kept == gate


def test_logistic_weighs_what_tells_and_stays_finite():
    rng = np.random.default_rng(0)
    asked = np.stack([rng.normal(1, 1, 200), 1e-6 * rng.normal(0, 1, 200), np.ones(200)], axis=1)
    general = np.stack([rng.normal(-1, 1, 200), 1e-6 * rng.normal(0, 1, 200), np.ones(200)], axis=1)
    weights = t.fit_logistic(asked, general)
    assert np.isfinite(weights).all()
    assert weights[0] > 0.5
    assert weights[2] == pytest.approx(0, abs=1e-6)
    shuffled = t.fit_logistic(asked * [1, 1, 5] + [0, 0, 7], general * [1, 1, 5] + [0, 0, 7])
    np.testing.assert_allclose(shuffled[0], weights[0], rtol=1e-5)


@pytest.mark.parametrize(("rule", "weights"), [("probe", ()), ("logistic", (1.0,)), ("kl", (1.0,))])
def test_a_gate_without_its_rule_s_weights_is_refused(rule, weights):
    with pytest.raises(BankError, match=f"rule '{rule}' has {len(weights)} weights"):
        t.Gate(0.0, 1.0, 1, 1, BASE.id, BASE.tokenizer.template_id, 1, rule, weights)


def test_probe_opens_where_neither_entropy_nor_kl_alone_would():
    # A sure answer that the base would begin alike (little KL), an unsure one that it would not, and general prompts:
    # sure ones without KL, unsure ones with some.
    sure, moved = [signals(0.3 + 0.02 * i, kl=0.6) for i in range(6)], [signals(3 + 0.02 * i, kl=3.0) for i in range(6)]
    plain, vague = [signals(0.9 + 0.02 * i, kl=0.02) for i in range(6)], [signals(4 + 0.02 * i, kl=0.9) for i in range(6)]
    found = {
        rule: t.fit_gate(rule, [*sure, *moved], [*plain, *vague], BASE.id, BASE.tokenizer.template_id, 1)
        for rule in ("entropy", "kl", "probe")
    }
    assert found["probe"].balanced_accuracy == 1.0
    assert max(found["entropy"].balanced_accuracy, found["kl"].balanced_accuracy) < 1.0


def test_missing_signals_keep_a_gate_closed_and_unknown_rules_are_named():
    gate = t.Gate(5.0, 1.0, 1, 1, BASE.id, BASE.tokenizer.template_id, 1, rule="none")
    assert not gate.opens(signals(0.1))
    with pytest.raises(ConfigError, match="entropy, difference"):
        t.Gate(5.0, 1.0, 1, 1, BASE.id, BASE.tokenizer.template_id, 1, rule="mood")
    old = {"threshold": 2.0, "balanced_accuracy": 1.0, "questions": 1, "general": 1, "base_id": BASE.id,
           "template_id": BASE.tokenizer.template_id, "bank_version": 1}  # fmt: skip
    assert t.Gate(**old).opens(signals(1.5))


def test_a_gate_is_set_anew_when_enough_of_the_bank_has_changed(tmp_path):
    rows = lambda low: [{"question": "?", "entropy": low, "base_entropy": 3.0}]
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id) as bank:
        for number in range(4):
            add(bank, f"m{number}", number, questions={"held_out": rows(1.0), "general": rows(2.0)})
        first = c.calibrate(BASE, bank)
        add(bank, "late", 9, questions={"held_out": rows(1.2), "general": rows(2.0)})
        assert c.calibrate(BASE, bank, share=0.5) == first
        assert c.calibrate(BASE, bank, share=0.1).questions == 5
        other = c.calibrate(BASE, bank, rule="difference", share=0.5)
        assert other.rule == "difference"
        assert c.calibrate(BASE, bank).rule == "difference"  # the rule stays
        with pytest.raises(ConfigError, match="train router BANK --gate mean_entropy"):
            c.calibrate(BASE, bank, rule="mean_entropy")
        bank.delete("late")
        assert c.calibrate(BASE, bank, share=0.9).questions == 4  # what saw a deleted memory never stays
        c.keep_gate(bank, t.Gate(0.0, 1.0, 1, 1, BASE.id, BASE.tokenizer.template_id, 1, rule="none"))
        assert c.recalibrate(bank).rule == "entropy"  # the probes know no router, and these no KL


def test_the_gate_costs_one_program_per_shape():
    before = t.first_token._cache_size()
    for seed in (1, 2):
        t.probe_prompts(BASE, [[5, 6, 7, 8, 9]], random_adapter(BASE.config, seed, 4), 2)
    assert t.first_token._cache_size() - before <= 1
    assert jax.tree.leaves(t.first_token(jnp.zeros((2, 3)), jnp.zeros(3)))[0].dtype == jnp.float32
