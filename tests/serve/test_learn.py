"""What a bank learns from its held-out questions: a router that the engine then uses, and gates of every rule."""

import dataclasses

import numpy as np
import pytest

from memjax.bank.calibrate import read_gate
from memjax.bank.gate import RULES
from memjax.bank.route import RouterConfig, read_router
from memjax.bank.store import open_bank
from memjax.errors import BankError
from memjax.serve import learn as n
from memjax.serve.choose import Candidate, Observed, pick
from memjax.serve.engine import EngineConfig
from tests.small_bank import BASE, SAMPLING, TEXTS, add, engine

CONFIG = RouterConfig(epochs=3, batch=4, validation=0.0)
HELD = {
    "ferry": ["When does the ferry to Vask leave?", "Where does the ferry go?"],
    "harp": ["How many strings has the harp?", "What has 72 strings?"],
    "oven": ["What does the oven of Brindle bake?", "Which oven bakes bread?"],
}


@pytest.fixture
def bank(tmp_path):
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        for seed, name in enumerate(TEXTS, start=1):
            held = [{"question": q, "entropy": 1.0, "base_entropy": 2.0} for q in HELD[name]]
            add(bank, name, seed, questions={"held_out": held, "general": []})
        yield bank


def test_a_router_and_every_gate_are_learned_and_used(bank):
    warm = engine(bank)
    seen = n.see_questions(warm, general=4)
    assert [s.memory for s in seen].count(None) == 4
    assert [s.question for s in seen if s.memory == bank.get("harp").id] == HELD["harp"]
    assert warm.ask("Which oven?", gate=False, sampling=SAMPLING).choice.candidates[0].route is None
    trained = n.learn_router(warm, RouterConfig(epochs=3, batch=4, validation=0.0, none=True), seen, progress=False)
    assert trained.metrics["questions"] == 10
    assert read_router(BASE, bank).none
    answer = warm.ask("Which oven?", gate=False, sampling=SAMPLING)
    best = max(answer.choice.candidates, key=lambda c: c.route)
    assert answer.choice.memory == best.name
    assert "router" in answer.choice.reason
    for rule in RULES:
        gate = n.learn_gate(warm, rule, seen, trained)
        assert gate == read_gate(BASE, bank)
        choice = warm.ask("Which oven?", sampling=SAMPLING).choice
        assert choice.rule == rule
        assert (choice.memory is not None) == (choice.value < choice.threshold)
    bank.delete("oven")
    assert "retrieval" in warm.ask("When?", gate=False, sampling=SAMPLING).choice.reason
    with pytest.raises(BankError, match="memjax train router"):
        engine(bank, route="router").ask("When?", sampling=SAMPLING)


def test_reading_all_candidates_ahead_is_reading_each(bank):
    warm = engine(bank)
    together = warm.observe("Which oven?", ahead=True).candidates
    assert len(together) == 3
    for one in together:
        (alone,) = warm.observe("Which oven?", memory=one.name, ahead=True).candidates
        assert alone.said == one.said
        assert alone.mean_entropy == pytest.approx(one.mean_entropy, abs=1e-4)
    assert len({one.said for one in together}) > 1  # or this test tests nothing


def test_routes_by_entropy_and_retrieval_are_options(bank):
    low = engine(bank, route="entropy").ask("When does the ferry leave?", gate=False, sampling=SAMPLING).choice
    assert low.memory == min(low.candidates, key=lambda c: c.entropy).name
    first = engine(bank, route="retrieval").ask("When does the ferry leave?", gate=False, sampling=SAMPLING).choice
    assert first.memory == "ferry"


def test_questions_without_their_memory_among_the_candidates_teach_nothing(bank):
    seen = n.see_questions(engine(bank, candidates=2), general=2)
    for example in n.router_examples(seen, none=False):
        assert example.right.sum() == 1
        assert example.group >= 0
    alone = n.see_questions(engine(bank, candidates=1), general=2)
    assert n.router_examples(alone, none=False) == []


def seen_with(said, own=0):
    candidates = tuple(Candidate(str(i), str(i), 1.0, 1.0, said=tokens) for i, tokens in enumerate(said))
    return n.Seen("Which?", str(own), Observed(candidates, 2.0, np.zeros((len(said) + 1, 8), np.float32)))


def test_who_says_the_same_is_right_too_and_what_most_say_tells_nothing():
    (two,) = n.router_examples([seen_with([(7, 8), (7, 9), (7, 8), (5, -1)])], none=False)
    assert two.right.tolist() == [True, False, True, False]
    (two,) = n.router_examples([seen_with([(7, 8), (7, 9), (7, 8), (5, -1)])], none=True)
    assert two.right.tolist() == [True, False, True, False, False]
    shared = seen_with([(7, 8), (7, 8), (7, 8), (5, -1)])
    assert n.router_examples([shared], none=False) == []
    (alone,) = n.router_examples([seen_with([(7, 8), (7, 8), (7, 8), (5, -1)], own=3)], none=False)
    assert alone.right.tolist() == [False, False, False, True]


def test_near_duplicates_that_abstain_give_way_and_others_do_not_step_in():
    of = lambda *told: tuple(
        Candidate(str(i), str(i), score, entropy, abstains=abstains, route=route)
        for i, (score, entropy, abstains, route) in enumerate(told)
    )
    tied = of((1.0, 0.1, True, 3.0), (1.0, 2.0, False, 1.0), (1.0, 1.0, False, 0.5), (0.2, 0.0, False, 9.0))
    assert pick(tied[:3], "router") == 1
    assert pick(tied[:3], "entropy") == 2
    assert pick(tied, "retrieval") == 2  # of equals the surest, whatever the router would say
    assert pick(of((1.0, 2.0, False, 1.0), (1.0, 1.0, False, 0.5)), "retrieval") == 1
    assert pick(of((0.0, 2.0, False, 1.0), (0.0, 1.0, False, 0.5)), "retrieval") == 0  # nothing found in either
    apart = of((1.0, 0.1, True, 3.0), (0.9, 2.0, False, 1.0))
    assert [pick(apart, how) for how in ("retrieval", "entropy", "router")] == [0, 0, 0]
    assert pick(of((1.0, 0.1, True, 3.0), (1.0, 0.2, True, 1.0)), "router") == 0


def test_a_router_that_finds_no_more_than_retrieval_is_not_kept(bank):
    warm = engine(bank)
    seen = n.see_questions(warm, general=0)
    first = [dataclasses.replace(s, memory=s.observed.candidates[0].id) for s in seen]  # retrieval is always right
    trained = n.learn_router(warm, RouterConfig(epochs=2, batch=4, validation=0.0), first, progress=False)
    assert trained.metrics["accuracy_retrieval"] == 1.0
    assert not trained.helps
    assert read_router(BASE, bank) is None
    assert n.learned(trained, None)["kept"] is False
    with_none = n.learn_router(warm, RouterConfig(epochs=2, batch=4, validation=0.0, none=True), first, progress=False)
    assert with_none.helps
    assert read_router(BASE, bank) is not None
    n.learn_router(warm, RouterConfig(epochs=2, batch=4, validation=0.0), first, progress=False)
    assert read_router(BASE, bank) is None  # the one before is not left behind


def test_of_many_questions_some_of_every_memory_are_seen(bank):
    of = lambda memories, questions: [
        s.question for s in n.see_questions(engine(bank), memories=memories, questions=questions, general=0)
    ]
    names = [entry.name for entry in bank.list()]
    assert of(3, 5) == [HELD[name][0] for name in names]
    assert of(3, 6) == [question for name in names for question in HELD[name]]
    assert of(2, 4) == [*HELD[names[0]], *HELD[names[2]]]


def test_a_bank_without_questions_says_what_to_do(tmp_path):
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id) as bank:
        add(bank, "ferry", 1)
        with pytest.raises(BankError, match="memjax write"):
            n.see_questions(engine(bank))
        assert EngineConfig().route == "auto"
