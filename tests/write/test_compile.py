"""Context compilation: the bottleneck holds, two passes equal one, and only the slots carry what was read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import ConfigError, InputError
from memjax.evaluate import world
from memjax.evaluate.qa import first_line
from memjax.memory.adapter import Adapter, as_slots
from memjax.memory.buffer import Buffer
from memjax.models.base import load
from memjax.models.buffers import buffer_prefix, read_buffer, read_buffers
from memjax.models.decoder import forward, unembed
from memjax.models.generate import Sampling, generate_all
from memjax.write import compile as c
from memjax.write import reading as r
from memjax.write import tasks as t
from memjax.write.pack_tasks import Room, pack_tasks
from memjax.write.prompts import answer_text, prompt_style, read_tokens
from memjax.write.questions import Question
from tests.support import small_base

STYLE = prompt_style("plain")
SLOTS, READ = jax.jit(c.write_slots), jax.jit(c.read_tasks)  # op by op they take several times as long


RUN = jax.jit(forward, static_argnums=0, static_argnames=("taps",))
TEXT = "Tavin lives in Orvale. The harp of Halvic is old. Mira keeps the oven. " * 5
CONFIG = c.CompileConfig(
    ratio=8, rank=2, windows=2, queries=2, general=12, window=12, cue=4, answer_tokens=3, top_k=8, steps=4, eval_every=2,
    probes=0,
)  # fmt: skip
TRAINED = dataclasses.replace(CONFIG, layout="compact", steps=30, eval_every=10, learning_rate=5e-3, scope="buffer")
FAMILIES = {
    "llama": {"qkv_bias": True},
    "gemma3": {
        "qk_norm": True, "post_norms": True, "norm_offset": 1.0, "embed_scale": 5.6, "window": 400,
        "local": (True, True, False), "rope_local_theta": 1000.0, "rope_theta": 50_000.0,
    },
}  # fmt: skip


def write(compiler, trained):
    return c.make_buffer(compiler, *SLOTS(compiler, trained))


def slot_count(compiler):
    return int((compiler.read_at >= 0).sum())


def prepared(config=CONFIG, **changes):
    """(base, compiler, a tree with a random adapter and moved slots)."""
    base = small_base(**changes)
    compiler = c.make_compiler(base, r.split_prompts(base.tokenizer, STYLE, TEXT), config)
    rng = np.random.default_rng(0)
    fresh = c.fresh_tree(compiler, config)
    return base, compiler, jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), fresh)


@pytest.fixture(scope="module")
def tasks():
    base = small_base()
    return t.make_tasks(base, r.split_prompts(base.tokenizer, STYLE, TEXT), CONFIG)[0]


def single_pass(base, compiler, trained, tail):
    """Logits [T, V] behind the slots from one masked sequence [H | C | B | x] with the adapter on C and B: the oracle."""
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    h, n, m, x = len(split.header), len(split.context), slot_count(compiler), len(tail)
    words = lambda ids: c.embed(base.model, base.params, jnp.asarray(ids, jnp.int32))
    slots = (compiler.begin + compiler.slots_rate * trained["slots"])[:m]
    inputs = jnp.concatenate([words(split.header), words(split.context), slots, words(tail)])[None]
    length = h + n + m + x
    part = np.repeat([0, 1, 2, 3], [h, n, m, x])
    visible = np.tril(np.ones((length, length), bool)) & ~((part[:, None] == 3) & (part[None] == 1))
    on = jnp.asarray((part == 1) | (part == 2))[None]
    out = RUN(
        base.model, base.params, inputs, jnp.arange(length)[None], visible=jnp.asarray(visible)[None],
        slots=as_slots(Adapter(trained["a"], trained["b"], compiler.scale)), adapter_mask=on,
    )  # fmt: skip
    return unembed(base.model, base.params, out.hidden)[0, h + n + m :]


def read(base, compiler, buffer, tail):
    """Logits [T, V] of the frozen base behind the buffer."""
    segment, following = read_buffer(base.config, buffer)
    positions = following + jnp.arange(len(tail))[None]
    out = RUN(base.model, base.params, jnp.asarray([tail]), positions, segments=[compiler.header, segment])
    return unembed(base.model, base.params, out.hidden)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_passes_equal_the_masked_single_pass(family):
    base, compiler, trained = prepared(**FAMILIES[family])
    tail = r.tail_tokens(base.tokenizer, STYLE, "Where does Tavin live?")
    got = read(base, compiler, write(compiler, trained), tail)
    np.testing.assert_allclose(got, single_pass(base, compiler, trained, tail), atol=2e-4, rtol=2e-4)


def test_with_the_adapter_on_the_slots_alone_the_context_is_the_bases_own():
    config = dataclasses.replace(CONFIG, scope="buffer")
    base, compiler, trained = prepared(config)
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    h, n, m = len(split.header), len(split.context), slot_count(compiler)
    inputs = jnp.concatenate(
        [
            c.embed(base.model, base.params, jnp.asarray([*split.header, *split.context])),
            (compiler.begin + compiler.slots_rate * trained["slots"])[:m],
        ]
    )[None]
    on = (jnp.arange(h + n + m) >= h + n)[None]
    slots = as_slots(Adapter(trained["a"], trained["b"], compiler.scale))
    places = jnp.arange(h + n + m)[None]
    out = RUN(base.model, base.params, inputs, places, slots=slots, adapter_mask=on, taps=("k_raw", "v"))
    got = write(compiler, trained)
    np.testing.assert_allclose(got.k, out.taps["k_raw"][:, 0, -m:], atol=1e-4)
    np.testing.assert_allclose(got.v, out.taps["v"][:, 0, -m:], atol=1e-4)


def test_a_changed_token_of_the_context_changes_the_slots_in_every_layer_but_the_first():
    base, compiler, trained = prepared()
    before = write(compiler, trained)
    other = dataclasses.replace(compiler, context=compiler.context.at[3].add(1))
    after = write(other, trained)
    for layer in range(base.config.num_layers):
        moved = np.abs(np.asarray(after.k[layer] - before.k[layer])).max(axis=(1, 2)) > 0
        assert moved.any() == (layer > 0)


def test_slots_within_the_context_see_what_stands_before_them_and_no_more():
    config = dataclasses.replace(CONFIG, scope="buffer", layout="spread", written="within")
    base, compiler, trained = prepared(config)
    before = write(compiler, trained)
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    other = c.make_compiler(base, dataclasses.replace(split, context=(*split.context[:40], 9, *split.context[41:])), config)
    after = write(other, trained)
    moved = np.abs(np.asarray(after.k - before.k)).max(axis=(0, 2, 3)) > 0
    at = np.asarray(compiler.written_at)[: before.slots] - len(split.header)
    assert list(moved) == list(at >= 40)
    # Each begins as the token that it stands on, and is read where it was written.
    assert list(at) == list(np.asarray(compiler.read_at)[: before.slots] - len(split.header))
    words = c.embed(base.model, base.params, jnp.asarray(split.context)[at])
    np.testing.assert_array_equal(compiler.begin[: before.slots], words)
    with pytest.raises(ConfigError, match="scope buffer"):
        dataclasses.replace(config, scope="context+buffer")


def test_the_reader_sees_the_context_through_the_slots_alone(tasks):
    _, compiler, trained = prepared()
    recon = pack_tasks({"recon": tasks["recon"]})
    k, v = SLOTS(compiler, trained)
    other = dataclasses.replace(compiler, context=compiler.context[::-1])
    np.testing.assert_array_equal(READ(compiler, k, v, recon), READ(other, k, v, recon))
    changed = READ(compiler, k, v * 1.1, recon)
    assert np.abs(np.asarray(changed) - np.asarray(READ(compiler, k, v, recon))).max() > 1e-4


def test_texts_of_like_lengths_share_a_program_and_what_fills_them_up_is_not_read(tasks):
    base, compiler, trained = prepared()
    recon = pack_tasks({"recon": tasks["recon"]})
    k, v = SLOTS(compiler, trained)
    programs = SLOTS._cache_size(), READ._cache_size()
    shorter = c.make_compiler(base, r.split_prompts(base.tokenizer, STYLE, TEXT.rsplit(". ", 2)[0]), CONFIG)
    assert 126 < len(r.split_prompts(base.tokenizer, STYLE, TEXT.rsplit(". ", 2)[0]).context) < 141
    READ(shorter, *SLOTS(shorter, trained), recon)
    READ(compiler, k, v, recon)
    assert (SLOTS._cache_size(), READ._cache_size()) in (programs, (programs[0], programs[1] + 1))
    empty = np.asarray(compiler.read_at) < 0
    assert empty.any()
    np.testing.assert_array_equal(READ(compiler, k, v, recon), READ(compiler, k, v.at[:, empty].set(9.0), recon))
    filled = dataclasses.replace(compiler, context=jnp.where(compiler.context_at < 0, 7, compiler.context))
    np.testing.assert_array_equal(write(filled, trained).k, write(compiler, trained).k)


def test_gradients_reach_the_adapter_through_the_slots_and_not_the_last_layers_queries(tasks):
    base, compiler, trained = prepared()
    grads = jax.jit(jax.grad(lambda tree: c.compile_loss(compiler, tree, pack_tasks(tasks), jax.random.key(0))[0]))(trained)
    for site in ("q", "o"):
        for tree in (grads["a"], grads["b"]):
            assert np.abs(tree[site][:-1]).max() > 0
            np.testing.assert_array_equal(tree[site][-1], 0)  # of the last layer only keys and values are kept
    for site in ("k", "v"):
        assert np.abs(grads["b"][site][-1]).max() > 0
    assert np.abs(grads["slots"]).max() > 0
    assert base.config.num_layers == 3


def test_at_first_the_adapter_changes_nothing_and_the_slots_are_words_of_the_context():
    base, compiler, _ = prepared()
    fresh = c.fresh_tree(compiler, CONFIG)
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    count, n = slot_count(compiler), len(split.context)
    assert count == -(-n // 8)
    words = np.asarray(base.params["embed"])[np.asarray(split.context)]
    assert all((np.abs(words - row).sum(axis=1) == 0).any() for row in np.asarray(compiler.begin)[:count])
    got = write(compiler, fresh)
    inputs = jnp.concatenate([c.embed(base.model, base.params, compiler.context[:n]), compiler.begin[:count]])[None]
    places = len(split.header) + jnp.arange(inputs.shape[1])[None]
    out = RUN(base.model, base.params, inputs, places, segments=[compiler.header], taps=("k_raw",))
    np.testing.assert_allclose(got.k, out.taps["k_raw"][:, 0, -count:], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_buffer_of_the_contexts_own_keys_is_the_context(family):
    """Compact with as many slots as tokens, they lie where the context lay: the reader gives the full prompt's logits."""
    base, compiler, _ = prepared(**FAMILIES[family])
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    h, n = len(split.header), len(split.context)
    tail = r.tail_tokens(base.tokenizer, STYLE, "Where does Tavin live?")
    whole = jnp.asarray([[*split.header, *split.context, *tail]])
    out = RUN(base.model, base.params, whole, jnp.arange(whole.shape[1])[None], taps=("k_raw", "v"))
    k, v = (out.taps[name][:, 0, h : h + n] for name in ("k_raw", "v"))
    expected = unembed(base.model, base.params, out.hidden)[0, h + n :]
    got = read(base, compiler, Buffer(k, v, h, n, "compact"), tail)
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=2e-4)


def test_keys_are_rotated_when_they_are_read():
    """In place, what is read is what a cache of the same tokens would hold."""
    base, compiler, trained = prepared(**FAMILIES["gemma3"])
    buffer = write(compiler, trained)
    segment, following = read_buffer(base.config, buffer)
    assert (buffer.context, buffer.slots) == (141, 18)
    assert following == buffer.header + buffer.context + buffer.slots
    assert segment.position[0, 0] == buffer.header + buffer.context
    for layout, first, after in (("compact", 0, buffer.slots), ("spread", 141 // 18 - 1, 141)):
        other, following = read_buffer(base.config, dataclasses.replace(buffer, layout=layout))
        assert int(other.position[0, 0]) == buffer.header + first
        assert following == buffer.header + after
        assert np.abs(np.asarray(other.k - segment.k)).max() > 1e-3
        np.testing.assert_array_equal(other.v, segment.v)


def test_prompts_are_answered_behind_header_and_buffer():
    base, compiler, trained = prepared()
    buffer = write(compiler, trained)
    prefix = buffer_prefix(compiler.header, *read_buffer(base.config, buffer))
    tails = [r.tail_tokens(base.tokenizer, STYLE, question) for question in ("Where does Tavin live?", "Why?")]
    got = generate_all(base.model, base.params, tails, [], Sampling(max_tokens=3), prefix=prefix)
    assert [answer[0] for answer in got] == [int(read(base, compiler, buffer, tail)[-1].argmax()) for tail in tails]


def test_several_buffers_lie_behind_one_header():
    base, compiler, trained = prepared(dataclasses.replace(CONFIG, layout="compact"))
    one = write(compiler, trained)
    two = dataclasses.replace(one, v=one.v + 1)
    h, m = one.header, one.slots
    raw, after_raw = read_buffers(base.config, [one, two], "raw")
    shift, after_shift = read_buffers(base.config, [one, two], "shift")
    assert (after_raw, after_shift) == (h + m, h + 2 * m)
    assert raw.position[0].tolist() == [*range(h, h + m)] * 2
    assert shift.position[0].tolist() == [*range(h, h + 2 * m)]
    np.testing.assert_allclose(shift.k[:, :, :m], raw.k[:, :, :m], atol=1e-6)
    np.testing.assert_array_equal(shift.v, jnp.concatenate([one.v, two.v], axis=1)[:, None])


def test_a_sliding_window_that_would_hide_slots_is_named():
    base, compiler, trained = prepared()
    narrow = dataclasses.replace(base.config, window=16, local=(True, False, True))
    with pytest.raises(InputError, match="last 16 tokens"):
        read_buffer(narrow, write(compiler, trained))


def test_the_recipe_lays_slots_where_a_sliding_window_sees_them():
    base = small_base(window=96, local=(True, True, False))
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    for style in ("plain", "chat"):
        assert c.recipe(style=style).layout == "spread"
        with pytest.raises(InputError, match="cannot be spread"):
            c.make_compiler(base, split, c.recipe(style=style))
        compiler = c.make_compiler(base, split, c.recipe(style=style, window=base.config.window))
        at = np.asarray(compiler.read_at)
        assert at[at >= 0].tolist() == [len(split.header) + i for i in range(-(-len(split.context) // 16))]


def test_compiling_lowers_the_losses_held_out_and_gives_the_best():
    config = TRAINED
    base, compiler, _ = prepared(config)
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    held = pack_tasks(t.make_tasks(base, split, config)[1])
    losses = jax.jit(c._losses)
    before = float(losses(compiler, *SLOTS(compiler, c.fresh_tree(compiler, config)), held)[0])
    made = c.compile_context(base, TEXT, STYLE, config)
    more = [(0, 0), (0, compiler.begin.shape[0] - made.artefact.slots), (0, 0), (0, 0)]
    after, found = losses(compiler, *(jnp.pad(leaf, more) for leaf in (made.artefact.k, made.artefact.v)), held)
    assert float(after) == pytest.approx(made.metrics["held_out"], rel=1e-4)
    assert float(after) < 0.9 * before
    assert {"held_out_kl_recon", "held_out_kl_query", "seconds_train"} <= set(made.metrics)
    assert found["kl_recon"] > 0
    assert (made.artefact.layout, made.artefact.slots) == ("compact", slot_count(compiler))


def test_every_kind_of_task_weighs_its_share():
    config = dataclasses.replace(CONFIG, asks=3, asked_share=0.25, recon=0.6, trust=0.5)
    base, compiler, trained = prepared(config)
    questions = [Question(f"Where is {name}?", "turned", answer="in Orvale") for name in ("Tavin", "Mira", "Halvic", "Bo")]
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    tasks, held = t.make_tasks(base, split, config, questions)
    assert tuple(tasks) == tuple(held) == t.KINDS
    loss, found = jax.jit(c.compile_loss)(compiler, trained, pack_tasks(tasks), jax.random.key(0))
    shares = {"kl_recon": 0.75 * 0.6, "kl_query": 0.75 * 0.4, "kl_asked": 0.25}
    assert float(loss) == pytest.approx(sum(share * float(found[name]) for name, share in shares.items()), rel=1e-5)
    given = base.tokenizer.encode(answer_text(base.tokenizer, STYLE, "in Orvale"))[
        0
    ]  # half of its probability is put on the answer that is given
    first = tasks["asked"].weight[0].argmax()
    assert np.exp(tasks["asked"].logp[0, first])[tasks["asked"].target[0, first] == given] >= 0.5
    some = lambda *index: pack_tasks({"asked": tasks["asked"].take(np.array(index))}, Room(4, 160, 96))
    rows = [c._losses(compiler, *SLOTS(compiler, trained), some(i)) for i in range(3)]
    three = c._losses(compiler, *SLOTS(compiler, trained), some(0, 1, 2))
    assert float(three[0]) == pytest.approx(np.mean([float(row[0]) for row in rows]), rel=1e-5)


def test_logits_are_compared_with_their_shifts_and_only_in_training(tasks):
    _, compiler, trained = prepared()
    k, v = SLOTS(compiler, trained)
    recon = tasks["recon"]
    shifted = lambda by: pack_tasks({"recon": dataclasses.replace(recon, norm=np.full_like(recon.weight, by))})
    zero, one, two = (np.asarray(READ(compiler, k, v, shifted(by))) for by in (0.0, 1.0, 2.0))
    read_ = shifted(0.0).share["recon"] > 0
    assert read_.sum() == (recon.weight > 0).sum()
    np.testing.assert_allclose((zero + two - 2 * one)[read_], 2.0, rtol=1e-3)  # the second difference of a square
    base = small_base()
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    made, held = t.make_tasks(base, split, dataclasses.replace(CONFIG, loss="mse"), general=tasks["query"])
    assert all(some.norm is None for some in held.values())
    some = made["recon"]
    whole = jnp.asarray([[*split.header, *split.context, *some.inputs[0][some.offset[0] >= 0]]])
    out = RUN(base.model, base.params, whole, jnp.arange(whole.shape[1])[None])
    logits = unembed(base.model, base.params, out.hidden)[0, -1]
    last = int((some.offset[0] >= 0).sum()) - 1
    np.testing.assert_allclose(some.logp[0, last] + some.norm[0, last], logits[some.target[0, last]], atol=2e-3)


def test_the_loss_says_how_many_classes_are_kept():
    assert [c.CompileConfig(loss=loss, top_k=8).classes for loss in ("topk", "kl", "mse")] == [8, 0, 8]
    with pytest.raises(ConfigError, match="'l1' is unknown"):
        c.CompileConfig(loss="l1")


def test_questions_that_calibrate_are_not_trained_on():
    config = dataclasses.replace(CONFIG, asks=3, asked=0, turned=12, cloze=2, probes=2)
    questions, probes = c._questions(small_base(), TEXT, STYLE, config)
    assert len(probes) == 2
    assert questions
    assert not {q.text for q in probes} & {q.text for q in questions}


def test_what_is_trained_instead_of_an_adapter():
    base, compiler, trained = prepared()
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    other = dataclasses.replace(compiler, context=compiler.context[::-1])
    direct = c.fresh_tree(compiler, dataclasses.replace(CONFIG, through="slots"))
    for made, slots in zip(SLOTS(compiler, c.fresh_tree(compiler, CONFIG)), (direct["k"], direct["v"]), strict=True):
        np.testing.assert_array_equal(made, slots)
    np.testing.assert_array_equal(SLOTS(other, direct)[0], direct["k"])
    inputs = {"slots": trained["slots"]}
    np.testing.assert_array_equal(SLOTS(other, inputs)[1], SLOTS(compiler, inputs)[1])
    # Also where the adapter of other ways would be on the slots alone, behind the context's cache.
    assert c.make_compiler(base, split, dataclasses.replace(CONFIG, through="inputs", scope="buffer")).held is None
    assert np.abs(np.asarray(SLOTS(other, trained)[1] - SLOTS(compiler, trained)[1])).max() > 1e-3
    tasks = pack_tasks(t.make_tasks(base, split, CONFIG)[0])
    loss = jax.jit(lambda compiler: c.compile_loss(compiler, trained, tasks, jax.random.key(0))[0])
    assert float(loss(dataclasses.replace(compiler, coupled=True))) != float(loss(compiler))


def test_time_that_is_up_ends_it_with_the_best_so_far():
    config = dataclasses.replace(TRAINED, steps=500, eval_every=5)
    seen = []
    made = c.compile_context(
        small_base(), TEXT, STYLE, config, seconds=0.0, progress=lambda stage, share, told: seen.append((stage, share))
    )
    assert np.isfinite(np.asarray(made.artefact.k)).all()
    assert max(share for stage, share in seen if stage == "train") < 0.1


def test_a_prompt_in_its_parts_is_the_whole_prompt():
    base = small_base()
    split = r.split_prompts(base.tokenizer, STYLE, TEXT)
    for question in ("Where does Tavin live?", "is it 7", "Why?"):
        whole = read_tokens(base.tokenizer, STYLE, TEXT, question)
        assert [*split.header, *split.context, *split.tail(question)] == whole
    assert base.tokenizer.decode(list(split.context)).strip() == TEXT.strip()


def test_a_slot_for_every_token_answers_like_the_text_before_any_step():
    """What stands behind the text belongs to the question: compressed with it, the copy of the text is no text any more."""
    base = load("tiny")
    (doc,) = world.documents("validation", 3, 1, 120)
    asked = world.questions(doc, ("one_hop",), 3, 8)
    split = r.split_prompts(base.tokenizer, STYLE, doc.text)
    compiler = c.make_compiler(base, split, dataclasses.replace(CONFIG, ratio=1))
    buffer = write(compiler, c.fresh_tree(compiler, CONFIG))
    prefix = buffer_prefix(compiler.header, *read_buffer(base.config, buffer))
    tails = [split.tail(question.text) for question in asked]
    out = generate_all(base.model, base.params, tails, base.tokenizer.eos_ids, Sampling(max_tokens=10), prefix=prefix)
    right = [first_line(base.tokenizer.decode(ids)) == q.answer for ids, q in zip(out, asked, strict=True)]
    assert sum(right) >= 7


def test_what_cannot_be_compiled_is_refused():
    base = small_base()
    for text, ratio, match in (("", 8, "empty"), ("Tavin.", 8, "too few"), (TEXT * 8, 2, "give a larger ratio")):
        with pytest.raises(InputError, match=match):
            c.compile_context(base, text, STYLE, dataclasses.replace(CONFIG, ratio=ratio))
    with pytest.raises(ConfigError, match="ratio"):
        c.CompileConfig(ratio=0.5)
