"""Conversations: history is base cache whatever a turn was read from, read once, and never shared between namespaces."""

import jax
import numpy as np
import pytest

from memjax.errors import BankError, InputError
from memjax.models import generate as g
from memjax.serve import prefix as p
from memjax.serve.chat import Chat
from memjax.serve.engine import Engine, EngineConfig
from memjax.write.prompts import ask_tokens
from tests.small_bank import BASE, SAMPLING, STYLE, engine
from tests.support import small_base


def test_a_turn_answers_as_a_request_with_the_same_history_would(bank):
    talk = Chat(engine(bank), gate=False)
    said = []
    for question in ("When does the ferry to Vask leave?", "How many strings has the harp?"):
        expected = engine(bank).ask(question, gate=False, history=talk.messages(), sampling=SAMPLING)
        answer = talk.ask(question, sampling=SAMPLING)
        assert answer.text == expected.text
        assert answer.choice.memory == expected.choice.memory
        said.append(answer.choice.memory)
    assert said == ["ferry", "harp"]  # the memory changes between turns


def test_each_token_of_a_conversation_is_read_once_by_the_base(bank):
    talk = Chat(engine(bank), memory="ferry")
    for _ in range(3):
        talk.ask("When does it leave?", sampling=SAMPLING)
    whole = ask_tokens(BASE.tokenizer, STYLE, "", talk.messages())
    assert talk.engine.prefixes.tokens_read <= len(whole) + 3 * 4  # what follows a question is read again in its turn


def test_the_history_is_what_the_base_alone_reads(bank):
    talk = Chat(engine(bank), memory="harp")
    talk.ask("How many strings has it?", sampling=SAMPLING)
    ((key, held),) = talk.engine.prefixes._held.items()
    alone = g.read_prefix(BASE.model, BASE.params, held.tokens).segment
    n = len(held.tokens)
    np.testing.assert_allclose(held.cache.k[:, :, :n], alone.k[:, :, :n], atol=1e-5)
    np.testing.assert_allclose(held.cache.v[:, :, :n], alone.v[:, :, :n], atol=1e-5)
    assert key.salt == bank.salt()


def test_a_prefix_is_cut_where_the_tokens_part_and_grown_where_they_go_on():
    tokens = [int(x) for x in np.random.default_rng(0).integers(5, 90, 300)]
    held, known = p.extend(BASE, None, tokens[:200])
    assert (known, held.cache.capacity) == (0, p.CAPACITY)
    held, known = p.extend(BASE, held, [*tokens[:120], 7, 8])
    assert known == 120
    held, known = p.extend(BASE, held, tokens)
    assert known == 120
    assert held.cache.capacity == g.bucket(300)
    fresh = g.read_prefix(BASE.model, BASE.params, tokens).segment
    np.testing.assert_array_equal(held.cache.position[0, :300], np.arange(300))
    np.testing.assert_allclose(held.cache.k[:, :, :300], fresh.k[:, :, :300], atol=1e-5)


def test_prefixes_of_two_namespaces_never_meet(bank):
    prefixes = p.Prefixes(BASE, limit=2)
    for salt in ("one", "two"):
        prefixes.read(p.Key(BASE.id, salt, "talk"), [5, 6, 7, 8])
    assert prefixes.tokens_read == 8  # the second read them all anew
    prefixes.keep_only("two")
    assert len(prefixes) == 1
    prefixes.read(p.Key(BASE.id, "two", "a"), [5])
    prefixes.read(p.Key(BASE.id, "two", "b"), [5])
    assert len(prefixes) == 2


def test_deleting_a_namespace_forgets_its_conversations(bank):
    talk = Chat(engine(bank), memory="ferry")
    talk.ask("When?", sampling=SAMPLING)
    bank.delete_all()
    talk.memory = None
    talk.ask("Hello?", sampling=SAMPLING)
    assert len(talk.engine.prefixes) == 1
    (key,) = talk.engine.prefixes._held
    assert key.salt == bank.salt()


def test_old_turns_leave_where_the_window_ends_and_failures_change_nothing(bank):
    base = small_base(max_positions=256)  # the same base, in a smaller window
    talk = Chat(Engine(base, bank, STYLE, EngineConfig(candidates=3, rank=4)), memory="ferry")
    with pytest.raises(InputError, match="shorten it"):
        talk.ask("When? " * 300, sampling=SAMPLING)
    talk.memory = "nobody"
    with pytest.raises(BankError, match="nobody"):
        talk.ask("When?", sampling=SAMPLING)
    assert talk.turns == []
    talk.memory = "ferry"
    long = "Does the ferry to Vask leave at 6:40 or later? " * 4
    for _ in range(6):
        answer = talk.ask(long, sampling=SAMPLING)
        assert answer.prompt_tokens + SAMPLING.max_tokens <= 256
    assert talk.dropped > 0
    assert len(talk.turns) == 6
    talk.reset()
    assert (talk.turns, talk.dropped, len(talk.engine.prefixes)) == ([], 0, 0)


def test_later_turns_compile_nothing(bank):
    talk = Chat(engine(bank), gate=False)
    talk.ask("When does the ferry leave?", sampling=SAMPLING)
    talk.ask("And the harp?", sampling=SAMPLING)
    programs = (g.prefill, g.start, g.decode, p.cut)
    compiled = [f._cache_size() for f in programs]
    talk.ask("And the oven?", sampling=SAMPLING)
    assert [f._cache_size() for f in programs] == compiled
    assert jax.tree.leaves(talk.engine.prefixes._held)
