"""One answer from several memories: the vote gives what they say, the mixture what the mean of their distributions says."""

import numpy as np
import pytest

from memjax.errors import BankError, InputError
from memjax.memory.adapter import as_slots
from memjax.models.decoder import unembed
from memjax.models.generate import Sampling
from memjax.serve.compose import compose
from memjax.write.prompts import ask_tokens
from tests.small_bank import BASE, SAMPLING, STYLE, TEXTS, add, engine
from tests.support import random_adapter, read_alone

QUESTION = "When does the ferry to Vask leave?"


def mixed_by_hand(names, count):
    """Greedy tokens of the mean distribution, each memory read in one masked pass and everything read anew each time."""
    tokens, made = ask_tokens(BASE.tokenizer, STYLE, QUESTION), []
    for _ in range(count):
        on = np.arange(64)[None] >= len(tokens) - 1
        each = []
        for name in names:
            slots = as_slots(random_adapter(BASE.config, 1 + list(TEXTS).index(name), 4))
            hidden = read_alone(BASE.model, BASE.params, [*tokens, *made], slots=slots, adapter_mask=on)[-1]
            logits = np.asarray(unembed(BASE.model, BASE.params, hidden), np.float64)
            each.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
        token = int(np.mean(each, axis=0).argmax())
        if token in BASE.tokenizer.eos_ids:
            break
        made.append(token)
    return BASE.tokenizer.decode(made).strip()


def test_a_mixture_is_the_mean_of_the_memories_distributions(bank):
    names = ("ferry", "harp", "oven")
    made = compose(engine(bank), QUESTION, names, "mix", SAMPLING)
    assert made.text == mixed_by_hand(names, SAMPLING.max_tokens)
    singles = {engine(bank).ask(QUESTION, memory=name, sampling=SAMPLING).text for name in names}
    assert len(singles) > 1
    assert compose(engine(bank), QUESTION, names[:2], "mix", SAMPLING).text == mixed_by_hand(names[:2], SAMPLING.max_tokens)


def test_a_vote_gives_the_commonest_of_the_answers(bank):
    names = ("ferry", "harp", "oven")
    asked = engine(bank)
    made = compose(asked, QUESTION, names, "vote", SAMPLING)
    tokens = ask_tokens(asked.base.tokenizer, asked.style, QUESTION)
    assert asked.prefixes.tokens_read == len(tokens) - asked.config.marker  # once for all
    assert len(asked.prefixes) == 0
    said = [engine(bank).ask(QUESTION, memory=name, sampling=SAMPLING).text for name in names]
    assert list(made.said) == said
    assert said.count(made.text) == max(said.count(text) for text in said)
    assert made.share == said.count(made.text) / 3


def test_what_cannot_be_composed_is_refused(bank):
    asks = engine(bank, rank=16)
    with pytest.raises(InputError, match="two different"):
        compose(asks, QUESTION, ["ferry"])
    with pytest.raises(InputError, match="two different"):
        compose(asks, QUESTION, ["ferry", "ferry"])
    with pytest.raises(InputError, match="'sum' is no way"):
        compose(asks, QUESTION, ["ferry", "harp"], "sum")
    with pytest.raises(BankError, match="boat"):
        compose(asks, QUESTION, ["ferry", "boat"], "mix")
    add(bank, "wide", 9, rank=16)
    with pytest.raises(InputError, match="rank buckets"):
        compose(asks, QUESTION, ["ferry", "wide"], "mix", Sampling(max_tokens=2))
