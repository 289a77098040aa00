"""Distillation: the loss against a full KL, the lesson against the plain forward pass, and a text that is learnt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import ConfigError, InputError
from memjax.evaluate import world
from memjax.memory.adapter import as_slots, init_adapter
from memjax.models.base import load
from memjax.models.decoder import site_shapes, unembed, upper_layers
from memjax.models.generate import Sampling, generate_all
from memjax.write import distill as d
from memjax.write.pack_answers import Packer, length
from memjax.write.prompts import ask_tokens, prompt_style, read_tokens
from memjax.write.questions import Question, invited_questions
from memjax.write.teacher import TeachConfig, agrees, blend, echo, entered, in_other_words, teach
from tests.support import random_adapter, read_alone, small_base

BASE = small_base(max_positions=4096)
STYLE = dataclasses.replace(prompt_style("plain"), invite="")
CHAT = prompt_style("chat")
TEXT = "Rilo lives in Vask. The colour of Rilo is green. The ferry to Vask leaves at 6:40."
QUESTIONS = [
    Question("Where does Rilo live?", "turned", answer="Vask", span="Vask"),
    Question("What is the colour of Rilo?", "turned", answer="green", span="green"),
    Question("Continue: Rilo lives", "continue", answer="in Vask. The colour"),
]
KNOBS = TeachConfig(marker=2, answer_tokens=6, top_k=8)


@pytest.fixture(scope="module")
def lesson():
    return teach(BASE, TEXT, QUESTIONS, STYLE, KNOBS)[0]


STUDENT = d.Student(BASE.params, jnp.float32(2), jnp.float32(0.25), BASE.model, False)


def packed(chosen, replay=None, rows=2, tokens=16):
    packer = Packer(chosen[0][0], replay, rows, tokens)
    assert all(packer.add(*one) for one in chosen)
    return packer.batch()


def full_logp(tokens):
    hidden = read_alone(BASE.model, BASE.params, tokens)
    return np.asarray(jax.nn.log_softmax(unembed(BASE.model, BASE.params, hidden)))


def test_targets_are_the_teachers_next_tokens_at_answer_positions(lesson):
    for i, question in enumerate(QUESTIONS):
        answer = BASE.tokenizer.encode(f" {question.answer}")
        whole = [] if question.kind == "continue" else [BASE.tokenizer.eos_ids[0]]
        answer = [*answer, *whole][:6]
        prompt = read_tokens(BASE.tokenizer, STYLE, TEXT, question.text)
        logp = full_logp([*prompt, *answer[:-1]])[len(prompt) - 1 :]
        rows = slice(1, 1 + len(answer))
        expected = np.take_along_axis(logp, np.asarray(lesson.target[i, rows]), -1)
        np.testing.assert_allclose(lesson.logp[i, rows], expected, atol=1e-4)
        assert lesson.weight[i].sum() == len(answer)
        assert lesson.target[i, 1, 0] == logp[0].argmax()


def test_no_answer_of_the_teacher_is_taught_more_often_than_told():
    open_ = [Question(f"{word} of it?", "asked") for word in ("Which", "What", "Who", "Where", "When", "Whose")]
    given = [dataclasses.replace(question, answer="seven") for question in open_]
    answers = lambda alike, questions: [
        q.answer for q in teach(BASE, TEXT, questions, STYLE, dataclasses.replace(KNOBS, alike=alike))[1]
    ]
    every = answers(0, open_)
    most = max(every.count(answer) for answer in every)
    assert len(every) == 6
    assert most > 1  # or this test tests nothing
    for alike in (1, 2):
        kept = answers(alike, open_)
        assert sorted(kept) == sorted(a for i, a in enumerate(every) if every[:i].count(a) < alike)
    assert answers(1, given) == ["seven"] * 6  # whose answers are the text's own


def test_the_teacher_answers_what_a_rule_asks_where_the_texts_own_words_are_not_trusted():
    config = d.DistillConfig(asked=0, turned=6, cloze=3, continued=0)
    trusted, asked = (d.make_questions(BASE, TEXT, STYLE, dataclasses.replace(config, trust=trust)) for trust in (0.7, 0.0))
    assert {q.kind for q in asked} == {"turned", "cloze"}
    assert [q.answer for q in trusted] == [q.span for q in asked]
    assert all(q.answer is None for q in asked)


def test_questions_in_other_words_are_drawn_in_turns_and_none_twice():
    asked = [Question(f"Which {word} of the harp is it?", kind) for word, kind in (("side", "asked"), ("end", "turned"))]
    others = [Question("Who is Vaten?", "stranger"), Question("Fill in: ____ is it.", "cloze"), Question("What?", "asked")]
    said = BASE.tokenizer.encode(" seven"), BASE.tokenizer.encode(" nine")
    answers = {0: said[0], 1: said[1], 2: said[0], 3: said[0], 4: BASE.tokenizer.encode(f" {STYLE.abstain}")}
    made = in_other_words(BASE, TEXT, [*asked, *others], answers, STYLE, TeachConfig(reworded=40))
    texts = [q.text for q in made]
    assert 20 < len(texts) <= 40
    assert len({text.lower() for text in texts}) == len(texts)
    assert not set(texts) & {q.text for q in asked}
    assert {q.span for q in made} == {"seven", "nine"}  # strangers, blanks and what it abstained from are not asked again
    assert {"lives", "ferry", "leaves"} & {word for text in texts for word in text.rstrip("?").split()}  # the text's words
    assert made == in_other_words(BASE, TEXT, [*asked, *others], answers, STYLE, TeachConfig(reworded=40))


@pytest.mark.slow
def test_questions_in_other_words_stay_where_they_are_answered_alike_and_strangers_where_the_teacher_abstains():
    tiny, style = load("tiny"), prompt_style("plain")
    (doc,) = world.documents("validation", 0, 1, 80)
    questions = invited_questions(tiny, doc.text, style, 24, strangers=24)
    knobs = TeachConfig(reworded=24)
    kept = teach(tiny, doc.text, questions, style, knobs)[1]
    by_kind = {kind: [q for q in kept if q.kind == kind] for kind in ("asked", "stranger", "reworded")}
    assert all(by_kind.values())
    known = {q.answer for q in by_kind["asked"]} - {style.abstain}
    assert all(q.span in known and agrees(q.answer, q.span) for q in by_kind["reworded"])
    assert not {q.text for q in by_kind["reworded"]} & {q.text for q in by_kind["asked"]}
    assert {q.answer for q in by_kind["stranger"]} == {style.abstain}
    assert len(by_kind["reworded"]) <= 24
    assert kept == teach(tiny, doc.text, questions, style, knobs)[1]


def test_an_untrained_student_reads_like_the_base_on_the_bare_question(lesson):
    fresh = init_adapter(site_shapes(BASE.config), BASE.config.num_layers, 4, 2.0, jax.random.key(0))
    for i, question in enumerate(QUESTIONS[:2]):
        value, _ = d.distill_loss(STUDENT, {"a": fresh.a, "b": fresh.b}, packed([(lesson, i)]), jax.random.key(0))
        answer = [*BASE.tokenizer.encode(f" {question.answer}"), BASE.tokenizer.eos_ids[0]][:6]
        prompt = ask_tokens(BASE.tokenizer, STYLE, question.text)
        logq = full_logp([*prompt, *answer[:-1]])[len(prompt) - 1 :]
        at = slice(1, 1 + len(answer))
        expected = d.divergence(lesson.logp[i, at], np.take_along_axis(logq, np.asarray(lesson.target[i, at]), -1)).mean()
        np.testing.assert_allclose(value, expected, atol=2e-4)


def test_divergence_is_zero_only_where_both_agree_and_bounds_the_full_one():
    rng = np.random.default_rng(0)
    p, q = (np.asarray(jax.nn.log_softmax(rng.normal(size=(5, 20)))) for _ in range(2))
    full = (np.exp(p) * (p - q)).sum(-1)
    some = np.asarray(d.divergence(p[:, :8], q[:, :8]))
    assert (some <= full + 1e-5).all()
    assert (some > 0).all()
    np.testing.assert_allclose(d.divergence(p[:, :8], p[:, :8]), 0, atol=1e-6)
    np.testing.assert_allclose(d.divergence(p, q), full, atol=1e-4)


def test_blend_puts_trust_on_the_given_tokens():
    target, logp = blend(np.array([[3, 4], [5, 6]]), np.log(np.array([[0.6, 0.3], [0.5, 0.2]])), [4, 9], 0.5)
    assert target.tolist() == [[3, 4], [5, 9]]
    np.testing.assert_allclose(np.exp(logp), [[0.3, 0.65], [0.25, 0.5]], atol=1e-6)


def test_rows_in_one_batch_do_not_see_each_other(lesson):
    adapter = random_adapter(BASE.config, 1)
    trained = {"a": adapter.a, "b": adapter.b}
    loss = lambda batch: float(d.distill_loss(STUDENT, trained, batch, jax.random.key(0))[0])
    weights = [lesson.weight[i].sum() for i in range(3)]
    alone = [loss(packed([(lesson, i)])) for i in range(3)]
    together = packed([(lesson, 0), (lesson, 1), (lesson, 2)])
    assert (together.owner[0] == 1).any()
    np.testing.assert_allclose(loss(together), np.average(alone, weights=weights), rtol=1e-5)


def test_replay_is_the_bases_own_distribution_and_weighs_its_share(lesson):
    replay = echo(BASE, [Question("Who is it?", "general")], STYLE, TeachConfig(2, 3, 8))
    fresh = init_adapter(site_shapes(BASE.config), BASE.config.num_layers, 4, 2.0, jax.random.key(0))
    value, metrics = d.distill_loss(
        STUDENT,
        {"a": fresh.a, "b": fresh.b},
        packed([(lesson, 0), (lesson, 1), (lesson, 2), (replay, 0)], replay),
        jax.random.key(0),
    )
    np.testing.assert_allclose(metrics["kl_keep"], 0, atol=1e-5)
    np.testing.assert_allclose(value, 0.75 * metrics["kl_read"], rtol=1e-4)


def test_replay_is_what_greedy_decoding_says_and_how_sure_it_is():
    asked = ["Who is it?", "Name a colour.", "Why?"]
    lesson = echo(BASE, [Question(text, "general") for text in asked], STYLE, TeachConfig(2, 3, 8))
    prompts = [ask_tokens(BASE.tokenizer, STYLE, text) for text in asked]
    said = generate_all(BASE.model, BASE.params, prompts, BASE.tokenizer.eos_ids, Sampling(max_tokens=3))
    said = [(prompt, answer) for prompt, answer in zip(prompts, said, strict=True) if answer]
    assert len(lesson.inputs) == len(said) > 0
    for i, (prompt, answer) in enumerate(said):
        answer = [*answer, BASE.tokenizer.eos_ids[0]][:3]
        fed = [*prompt[-2:], *answer[:-1]]
        assert lesson.inputs[i, : len(fed)].tolist() == fed
        assert lesson.positions[i, : len(fed)].tolist() == list(range(len(prompt) - 2, len(prompt) + len(answer) - 1))
        assert lesson.weight[i].tolist() == [0.0] + [1.0] * len(answer) + [0.0] * (3 - len(answer))
        assert (lesson.positions[i] >= 0).sum() == len(fed)
        logp = full_logp([*prompt, *answer[:-1]])[len(prompt) - 1 :]
        expected = np.take_along_axis(logp, np.asarray(lesson.target[i, 1 : len(fed)]), -1)
        np.testing.assert_allclose(lesson.logp[i, 1 : len(fed)], expected, atol=1e-4)


def test_every_step_takes_replay_and_as_many_answers_of_the_text_as_fit(lesson):
    replay = dataclasses.replace(lesson)
    config = d.DistillConfig(marker=2, steps=6, rows=3, row_tokens=14, keep_batch=2, keep_tokens=6, answer_tokens=6)
    drawn = []
    for batch in d.batches(lesson, replay, config):
        assert batch.inputs.shape == (3, 14)
        answers = [(r, a) for r in range(3) for a in range(4) if (batch.owner[r] == a).any()]
        kept = [(r, a) for r, a in answers if not batch.read[r][batch.owner[r] == a].any()]
        assert len(kept) == 2
        assert len(answers) > 2
        for row, answer in [one for one in answers if one not in kept]:
            at = batch.owner[row] == answer
            tokens = batch.inputs[row][at].tolist()
            match = [i for i in range(3) if tokens == lesson.inputs[i, : length(lesson, i)].tolist()]
            assert len(match) == 1
            held = batch.holder[row] == answer
            np.testing.assert_array_equal(batch.k[:, row, held], lesson.k[:, match[0]])
            drawn.append(match[0])
        free = (batch.owner < 0).sum(1).max()
        assert free < max(length(lesson, i) for i in range(3)) or (batch.owner.max(1) == 3).any()
    assert len(set(drawn)) == 3
    assert all(batch.read[batch.owner >= 0].all() for batch in d.batches(lesson, None, config))


def test_a_step_without_room_for_the_text_is_refused():
    with pytest.raises(ConfigError, match="raise rows or row_tokens"):
        d.DistillConfig(rows=4, keep_batch=16)


def test_replay_and_calibration_prompts_never_meet():
    replay = {q.text for q in d.general_questions(CHAT, 400)}
    calibration = {q.text for q in d.general_questions(CHAT, 400, calibration=True)}
    assert len(replay) > 250
    assert len(calibration) > 120
    assert not replay & calibration


def test_a_text_is_learnt_and_one_program_serves_two_texts():
    config = d.DistillConfig(
        rank=4,
        sites=("gate", "up", "down"),
        steps=60,
        rows=4,
        keep_batch=2,
        general=4,
        keep=0.2,
        learning_rate=1e-2,
        top_k=8,
        answer_tokens=6,
    )
    stages = []
    first = d.distill(BASE, TEXT, STYLE, config, progress=lambda stage, share, m: stages.append(stage))
    assert set(stages) == {"questions", "teacher", "train"}
    assert list(dict.fromkeys(stages)) == ["questions", "teacher", "train"]
    from memjax.train import step

    compiled = step._shared_step._cache_size()
    second = d.distill(BASE, TEXT.replace("green", "amber").replace("6:40", "9:15") + " Bost is red.", STYLE, config)
    assert step._shared_step._cache_size() == compiled
    assert not np.array_equal(first.artefact.b["down"], second.artefact.b["down"])
    start = teach(BASE, TEXT, d.make_questions(BASE, TEXT, STYLE, config), STYLE, TeachConfig(1, 6, 8, 0.7))[0]
    student = dataclasses.replace(STUDENT, scale=first.artefact.scale)
    loss = lambda a, b: float(
        d.distill_loss(
            student,
            {"a": a, "b": b},
            packed([(start, i) for i in range(len(start.inputs))], rows=8, tokens=24),
            jax.random.key(0),
        )[0]
    )
    untrained = loss(first.artefact.a, jax.tree.map(jnp.zeros_like, first.artefact.b))
    assert loss(first.artefact.a, first.artefact.b) < 0.5 * untrained


def test_the_step_is_compiled_beside_the_questions():
    from memjax.train import step

    config = d.DistillConfig(rank=3, sites=("down",), steps=2, rows=2, keep_batch=2, general=2, top_k=4)
    replay = d.replay_lesson(BASE, STYLE, config)
    before = step._shared_step._cache_size()
    with d.compiling(BASE, replay, config):
        lesson = teach(BASE, TEXT, QUESTIONS, STYLE, TeachConfig(1, 8, 4))[0]
    assert step._shared_step._cache_size() == before + 1
    d.train_adapter(BASE, lesson, replay, config)
    assert step._shared_step._cache_size() == before + 1


def test_held_out_questions_are_never_trained_on():
    config = d.DistillConfig(rank=2, sites=("down",), steps=1, rows=2, keep_batch=2, general=2, top_k=4, held_out=0.34)
    written = d.distill(BASE, TEXT, STYLE, config)
    assert written.held_out
    trained = sum(v for k, v in written.metrics.items() if k.startswith("questions_"))
    assert trained + len(written.held_out) == len(d.make_questions(BASE, TEXT, STYLE, config))


def test_a_text_without_sentences_is_refused():
    with pytest.raises(InputError, match="no sentence"):
        d.distill(BASE, "...", STYLE, d.DistillConfig())


def test_agreement_of_answers_and_spans():
    assert agrees("It leaves at 6:40.", "6:40")
    assert agrees("Quill", "Marta Quill")
    assert not agrees("16:40", "6:40")
    assert not agrees("", "x")


@pytest.mark.slow
def test_a_student_of_the_upper_layers_learns_what_the_whole_one_does(lesson):
    """Read once up to `begin`, loss and gradients equal those of a whole student whose adapter is zero below."""
    adapter, begin = random_adapter(BASE.config, 2), BASE.config.num_layers // 2
    above = lambda tree: jax.tree.map(lambda x: x[begin:], tree)
    zeroed = lambda tree: jax.tree.map(lambda x: x.at[:begin].set(0), tree)
    model, params = upper_layers(BASE.model, BASE.params, begin)
    upper = dataclasses.replace(STUDENT, model=model, params=params)
    higher = entered(BASE, lesson, begin)
    assert higher.k.shape[0] == BASE.config.num_layers - begin
    grad = lambda student, tree, one: jax.value_and_grad(
        lambda t: d.distill_loss(student, t, packed([(one, 0), (one, 1), (one, 2)]), None)[0]
    )(tree)
    expected, whole = grad(STUDENT, {"a": zeroed(adapter.a), "b": zeroed(adapter.b)}, lesson)
    value, part = grad(upper, {"a": above(adapter.a), "b": above(adapter.b)}, higher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), part, above(whole))


def test_frozen_layers_have_no_adapter():
    config = d.DistillConfig(rank=2, frozen=0.5, steps=2, rows=2, keep_batch=2, general=2, top_k=4)
    adapter = d.distill(BASE, TEXT, STYLE, config).artefact
    begin = BASE.config.num_layers // 2
    for site, b in adapter.b.items():
        assert b.shape[0] == BASE.config.num_layers
        assert not np.any(b[:begin])
        assert not np.any(adapter.a[site][:begin])
        assert np.any(b[begin:])
    with pytest.raises(ConfigError, match="frozen is 1"):
        d.DistillConfig(frozen=1.0)


def test_an_adapter_reaches_the_loss(lesson):
    adapter = random_adapter(BASE.config, 1)
    loss = lambda b: float(
        d.distill_loss(
            STUDENT, {"a": adapter.a, "b": b}, packed([(lesson, 0), (lesson, 1), (lesson, 2)]), jax.random.key(0)
        )[0]
    )
    assert abs(loss(adapter.b) - loss(jax.tree.map(jnp.zeros_like, adapter.b))) > 1e-3
    assert as_slots(adapter).capacity == 1
