"""Long texts: cut between sentences, every chunk behind the slots of those before it, one buffer behind one header."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import ConfigError
from memjax.memory.buffer import Buffer
from memjax.models.buffers import buffer_prefix, read_buffer
from memjax.models.generate import Sampling, generate_all, read_prefix
from memjax.write import chunks as ch
from memjax.write import compile as c
from memjax.write import tasks as t
from memjax.write.reading import split_prompts
from tests.support import small_base
from tests.write.test_compile import CONFIG, RUN, SLOTS, STYLE, TEXT

BASE = small_base()
SPLIT = split_prompts(BASE.tokenizer, STYLE, TEXT)
LONG = dataclasses.replace(CONFIG, chunk=100, general=6, windows=1, queries=1, steps=2, scope="buffer")


def parts(config=LONG):
    texts = ch.chunk_texts(BASE, SPLIT, TEXT, config)
    return texts, ch.split_chunks(BASE, SPLIT, texts)


def test_a_text_that_fits_is_one_chunk_and_a_longer_one_is_cut_between_sentences():
    assert ch.chunk_texts(BASE, SPLIT, TEXT, CONFIG) == [TEXT]
    texts, splits = parts()
    assert len(texts) == 2
    assert " ".join(texts) == TEXT.strip()
    assert all(text.endswith(".") for text in texts)
    assert max(len(split.context) for split in splits) <= 100
    long = " ".join(f"{TEXT} {number}." for number in range(8))
    whole = split_prompts(BASE.tokenizer, STYLE, long)
    found = ch.split_chunks(BASE, whole, ch.chunk_texts(BASE, whole, long, CONFIG))
    slots = sum(-(-len(split.context) // 8) for split in found)
    for split in found:  # behind all slots, with room for a question
        assert len(split.header) + slots + len(split.context) + 96 <= BASE.config.max_positions
    assert len(found) > 2
    pieces = ch.cut_text("x" * 400, 2, len)  # a text of one word
    assert "".join(pieces) == "x" * 400
    assert 150 < len(pieces[0]) < 250


def whole_chunk(split):
    """A buffer of a chunk's own keys and values: read compact, it is the chunk itself."""
    ids = jnp.asarray([[*split.header, *split.context]])
    out = RUN(BASE.model, BASE.params, ids, jnp.arange(ids.shape[1])[None], taps=("k_raw", "v"))
    k, v = (out.taps[name][:, 0, len(split.header) :] for name in ("k_raw", "v"))
    return Buffer(k, v, len(split.header), len(split.context), "compact")


@pytest.mark.parametrize("scope", ["buffer", "context+buffer"])
def test_a_chunk_is_read_and_written_behind_the_slots_before_it(scope):
    """With a slot for every token of the first chunk the second one stands in the whole text."""
    config = dataclasses.replace(LONG, layout="compact", scope=scope)
    first, second = parts()[1]
    before = ch.Chunks(BASE, SPLIT, 100, sequential=True)
    before.done.append(whole_chunk(first))
    prefix = before.before()
    compiler = c.make_compiler(BASE, second, config, prefix)
    got = c.make_buffer(compiler, *SLOTS(compiler, c.fresh_tree(compiler, config)))
    both = [*first.header, *first.context, *second.context]
    words = c.embed(BASE.model, BASE.params, jnp.asarray(both))
    inputs = jnp.concatenate([words, compiler.begin[: got.slots]])[None]
    out = RUN(BASE.model, BASE.params, inputs, jnp.arange(inputs.shape[1])[None], taps=("k_raw", "v"))
    np.testing.assert_allclose(got.k, out.taps["k_raw"][:, 0, len(both) :], atol=2e-4)
    np.testing.assert_allclose(got.v, out.taps["v"][:, 0, len(both) :], atol=2e-4)
    assert (got.header, got.context) == (len(first.header), len(second.context))
    seen, whole = t.read_context(BASE, second, prefix), read_prefix(BASE.model, BASE.params, both)
    assert int(seen.length) == int(whole.length) == len(both)
    held, wanted = (np.asarray(x.segment.position[0]) for x in (seen, whole))
    assert held[held >= 0].tolist() == list(range(len(both)))  # exactly one header, and no place twice
    np.testing.assert_allclose(seen.segment.k[:, :, held >= 0], whole.segment.k[:, :, wanted >= 0], atol=2e-4)


def test_independent_chunks_leave_the_places_of_the_others_empty():
    first, second = parts()[1]
    buffer = whole_chunk(first)
    alone, behind = (ch.Chunks(BASE, SPLIT, 100, sequential) for sequential in (False, True))
    for chunks in (alone, behind):
        chunks.done.append(buffer)
    made = [c.make_compiler(BASE, second, LONG, chunks.before()) for chunks in (alone, behind)]
    assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])
    assert [x.shape for x in jax.tree.leaves(made[0])] == [x.shape for x in jax.tree.leaves(made[1])]
    np.testing.assert_array_equal(made[0].read_at, made[1].read_at)
    count = len(first.header)
    assert (np.asarray(made[0].header.position) >= 0).sum() == count
    assert (np.asarray(made[1].header.position) >= 0).sum() == count + buffer.slots
    tree = c.fresh_tree(made[0], LONG)
    assert np.abs(np.asarray(SLOTS(made[0], tree)[1] - SLOTS(made[1], tree)[1])).max() > 1e-3


def test_two_chunks_are_one_buffer_that_the_reader_reads():
    seen = []
    written = c.compile_context(BASE, TEXT, STYLE, LONG, progress=lambda stage, share, told: seen.append((stage, share)))
    buffer, splits = written.artefact, parts()[1]
    assert buffer.slots == sum(-(-len(split.context) // 8) for split in splits)
    assert (buffer.header, buffer.layout) == (len(SPLIT.header), "compact")
    assert buffer.context == sum(len(split.context) for split in splits)
    assert written.metrics["chunks"] == 2
    assert {"held_out", "held_out_kl_recon", "seconds_train"} <= set(written.metrics)
    assert {stage for stage, _ in seen} == {"train"}
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert 0.5 < shares[-1] <= 1
    segment, following = read_buffer(BASE.config, buffer)
    assert segment.position[0].tolist() == list(range(buffer.header, following))
    prefix = buffer_prefix(read_prefix(BASE.model, BASE.params, SPLIT.header).segment, segment, following)
    tail = SPLIT.tail("Where does Tavin live?")
    (said,) = generate_all(BASE.model, BASE.params, [tail], [], Sampling(max_tokens=2), prefix=prefix)
    assert len(said) == 2
    other = c.compile_context(BASE, TEXT, STYLE, dataclasses.replace(LONG, chunks="independent")).artefact
    head = -(-len(splits[0].context) // 8)
    np.testing.assert_array_equal(other.v[:, :head], buffer.v[:, :head])  # the first chunk has none before it
    assert np.abs(np.asarray(other.v[:, head:] - buffer.v[:, head:])).max() > 1e-3


def test_a_wrong_way_of_chunks_is_refused():
    with pytest.raises(ConfigError, match="sequential or independent"):
        c.CompileConfig(chunks="both")
