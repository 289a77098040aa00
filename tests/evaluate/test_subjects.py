"""Subjects: what each is shown, that batches answer as single prompts do, and what happens beyond the window."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from memjax.errors import ConfigError, InputError
from memjax.evaluate import subjects as s
from memjax.memory.adapter import as_slots
from memjax.models import generate as g
from memjax.write.hypernet.chunks import document_tokens
from memjax.write.hypernet.encode import encode
from memjax.write.prompts import ask_tokens, prompt_style, read_tokens
from tests.small_bank import BASE, STYLE, TEXTS
from tests.write.hypernet.support import hyper, logits

TOKENIZER = BASE.tokenizer
QUERIES = [s.Query(f"Where does {name} live?", text) for text in TEXTS.values() for name in ("Bavo", "Koro")]


def setup(**changes):
    return s.Setup(BASE, STYLE, **changes)


def unshared(prompts):
    """Answers of whole prompts in one batch, with nothing read beforehand."""
    made = g.generate(BASE.model, BASE.params, prompts, TOKENIZER.eos_ids, g.Sampling(max_tokens=4))
    return [TOKENIZER.decode(tokens).strip() for tokens in made]


def test_each_subject_is_shown_its_own_prompt():
    query, chat = QUERIES[0], prompt_style("chat")
    assert s.query_tokens(BASE, chat, query) == read_tokens(TOKENIZER, chat, query.context, query.question)
    bare = dataclasses.replace(query, context=None)
    assert s.query_tokens(BASE, chat, bare) == ask_tokens(TOKENIZER, chat, query.question)
    # A benchmark's own wording: nothing of the style, the prefix behind the header.
    worded = s.Query("Who?", "Text.", gap="\n", prefix=" It is")
    assert s.query_tokens(BASE, chat, worded) == TOKENIZER.encode("<bos><q> Text.\nWho?<a> It is")
    plain = dataclasses.replace(worded, chat=False)
    assert s.query_tokens(BASE, chat, plain) == [*TOKENIZER.prefix_ids, *TOKENIZER.encode("Text.\nWho? It is")]


def test_batches_over_shared_contexts_answer_as_whole_prompts_do():
    """Seven questions about one context (read once), five about others; batches of four, the last one not full."""
    queries = [s.Query(f"Who is {i}?", TEXTS["harp"]) for i in range(7)]
    queries[2:2] = QUERIES[:2] + QUERIES[4:] + [s.Query("1 plus 1?")]
    told = []
    (subject,) = s.make_subjects(["in_context"], setup(rows=4, progress=lambda *what: told.append(what)))
    answers = subject.answers(queries, 4)
    assert answers.texts == unshared([s.query_tokens(BASE, STYLE, query) for query in queries])
    assert len(set(answers.texts)) > 6  # a base that always says the same would prove nothing
    assert answers.truncated == 0
    assert told == [("in_context", done, 12) for done in (4, 7, 11, 12)]
    # Other questions, other numbers of them: nothing compiles anew.
    before = g.prefill._cache_size(), g.decode._cache_size()
    subject.answers([s.Query(f"Who was {i}?", TEXTS["harp"]) for i in range(11)], 4)
    assert (g.prefill._cache_size(), g.decode._cache_size()) == before


def test_no_context_forgets_the_context(monkeypatch):
    shown = []
    monkeypatch.setattr(s, "complete", lambda base, prompts, *args, **kw: shown.extend(prompts) or ["x"] * len(prompts))
    (subject,) = s.make_subjects(["no_context"], setup())
    subject.answers(QUERIES, 4)
    assert shown == [ask_tokens(TOKENIZER, STYLE, query.question) for query in QUERIES]


def test_retrieval_finds_passages_in_all_contexts_or_the_querys_own():
    asked = [s.Query("How many strings has the harp?", TEXTS["ferry"]), s.Query("Who bakes?", TEXTS["harp"])]
    asked.append(s.Query("Unknown words only?", TEXTS["oven"]))
    pooled = s.with_passages(asked, 1, pooled=True)
    assert [query.context for query in pooled] == [TEXTS["harp"], TEXTS["oven"], TEXTS["ferry"]]
    own = s.with_passages(asked, 2, pooled=False)
    assert [query.context for query in own] == [query.context for query in asked]
    assert s.with_passages([s.Query("Who?")], 3, pooled=True)[0].context is None


def test_long_contexts_are_cut_into_passages():
    text = " ".join(f"Sentence number {i} is about thing{i}." for i in range(60))
    (found,) = s.with_passages([s.Query("What of thing41?", text)], 1, pooled=False)
    assert "thing41." in found.context
    assert len(found.context.split()) < 100


def test_the_bank_is_asked_the_question_alone(monkeypatch):
    class Asked:
        def __init__(self, base, bank, style, namespace):
            assert (base, bank, style, namespace) == (BASE, "the bank", STYLE, "ours")

        def ask(self, question, sampling):
            return SimpleNamespace(text=f"{question} {sampling.max_tokens}")

    monkeypatch.setattr(s, "Engine", Asked)
    (subject,) = s.make_subjects(["bank"], setup(bank="the bank", namespace="ours"))
    assert subject.answers([s.Query("Who?", "never read")], 4).texts == ["Who? 4"]


@pytest.mark.parametrize(
    ("names", "match"),
    [(["in_contex"], "in_contex.*no_context"), ([], "at least one"), (["bank"], "--bank"), (["retrieval"] * 2, "once")],
)
def test_unknown_subjects_are_named(names, match):
    with pytest.raises(ConfigError, match=match):
        s.make_subjects(names, setup())


def test_a_context_beyond_the_window_is_refused_or_cut_in_the_middle_and_counted():
    words = " ".join(f"{i:03d}" for i in range(400))  # four tokens each
    query = s.Query("Who is it?", f"first {words} last")
    with pytest.raises(InputError, match=r"\d+ tokens with 8 for the answer exceeds the base's window of 1024.*--truncate"):
        s.fit_window(BASE, STYLE, query, 8, truncate=False)
    tokens, cut = s.fit_window(BASE, STYLE, query, 8, truncate=True)
    assert cut
    assert 1024 - 8 - 8 <= len(tokens) <= 1024 - 8
    text = TOKENIZER.decode(tokens)
    assert "first" in text
    assert "last" in text
    assert " 200 " not in text
    assert text.endswith("Who is it?")
    assert s.fit_window(BASE, STYLE, s.Query("Who?", "short"), 8, truncate=True)[1] is False
    with pytest.raises(InputError, match="shorten the question"):
        s.fit_window(BASE, STYLE, s.Query(words), 8, truncate=True)
    with pytest.raises(InputError, match="even without its context"):
        s.fit_window(BASE, STYLE, s.Query(words, "short"), 8, truncate=True)


def test_truncated_contexts_are_counted(monkeypatch):
    monkeypatch.setattr(s, "complete", lambda base, prompts, *args, **kw: [str(len(p)) for p in prompts])
    (subject,) = s.make_subjects(["in_context"], setup(truncate=True))
    answers = subject.answers([s.Query("Who?", "x " * 1200), *QUERIES, s.Query("Who?", "y " * 1200)], 8)
    assert answers.truncated == 2
    assert np.max([int(text) for text in answers.texts]) <= 1024 - 8


@pytest.mark.slow
def test_an_internalised_context_answers_as_the_bank_would_with_its_adapter():
    """Two contexts of different ranks in one batch and a question about nothing: each as by itself."""
    network = dataclasses.replace(hyper(), id="b" * 64, max_chunk=24, base_id=BASE.id)
    long = " ".join(f"Room {n} of the harbour is red." for n in range(12))
    queries = [s.Query("Where does Bavo live?", text) for text in (long, TEXTS["harp"], None, TEXTS["harp"])]
    (subject,) = s.make_subjects(["internalize"], setup(rows=4, hyper=network, overlap=4))
    texts = subject.answers(queries, 4).texts
    assert texts[1] == texts[3]
    assert texts[2] == unshared([ask_tokens(TOKENIZER, STYLE, queries[2].question)])[0]
    tokens = ask_tokens(TOKENIZER, STYLE, queries[0].question)
    ranks = []
    for query, text in ((queries[0], texts[0]), (queries[1], texts[1])):
        adapter = encode(BASE, network, document_tokens(TOKENIZER, STYLE, query.context), max_chunk=24, overlap=4)
        ranks.append(adapter.rank)
        said = list(tokens)
        for _ in range(4):  # all but the question's last token is read with the adapter off
            fed = said + [0] * (len(tokens) + 4 - len(said))
            on = np.arange(len(fed))[None] >= len(tokens) - 1
            said.append(int(logits(as_slots(adapter), rows=(fed,), on=on, base=BASE)[0, len(said) - 1].argmax()))
            if said[-1] in TOKENIZER.eos_ids:
                said.pop()
                break
        assert text == TOKENIZER.decode(said[len(tokens) :]).strip()
    assert ranks[0] > ranks[1]
    with pytest.raises(ConfigError, match="needs a hypernetwork"):
        s.make_subjects(["internalize"], setup())
