"""Distractors: other buffers stand beside the one that is trained just as several buffers are read together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.bank.add import other_buffers
from memjax.errors import ConfigError, InputError
from memjax.memory.buffer import Buffer
from memjax.models.buffers import read_buffers
from memjax.write import compile as c
from memjax.write import distractors as d
from tests.small_bank import BASE as BANK_BASE
from tests.small_bank import add_buffer
from tests.support import small_base
from tests.write.test_compile import CONFIG, STYLE, TEXT

BASE = small_base()
HEADER = 3


def buffer(slots, seed):
    shape = (BASE.config.num_layers, slots, BASE.config.num_kv_heads, BASE.config.head_size)
    k, v = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    return Buffer(k, v, HEADER, 40, "spread")


POOL = [buffer(slots, seed) for seed, slots in enumerate((4, 6, 5))]
OWN = buffer(7, 9)


@pytest.mark.parametrize(("index", "place"), [((2, 0), 0), ((2, 0), 1), ((1, 2), 2), ((0,), 1)])
def test_others_stand_as_buffers_that_are_read_together(index, place):
    others = d.make_others(BASE.config, POOL, 2, 0.25, HEADER)
    filled = jnp.asarray([*index, 0][:2])
    beside = d.Beside(filled, jnp.int32(len(index)), jnp.int32(place))
    read_at = jnp.asarray([*range(50, 57), -1, -1])  # two slots only fill up
    segment, own, following = d.place_beside(BASE.config, others, beside, read_at, jnp.int32(HEADER), jnp.int32(99))
    row = [POOL[i] for i in index]
    row.insert(place, OWN)
    wanted, after = read_buffers(BASE.config, row, "shift")
    assert int(following) == after
    first = sum(one.slots for one in row[:place])
    assert own.tolist() == [*range(HEADER + first, HEADER + first + 7), -1, -1]
    at = np.asarray(segment.position[0])
    kept = np.argsort(at)[(at < 0).sum() :]
    theirs = [i for i in range(after - HEADER) if not first <= i < first + 7]
    assert at[kept].tolist() == [HEADER + i for i in theirs]
    np.testing.assert_allclose(segment.k[:, :, kept], wanted.k[:, :, np.asarray(theirs)], atol=1e-5)
    np.testing.assert_array_equal(segment.v[:, :, kept], wanted.v[:, :, np.asarray(theirs)])


def test_without_others_present_the_buffer_lies_as_it_does_alone():
    others = d.make_others(BASE.config, POOL, 2, 0.25, HEADER)
    beside = d.Beside(jnp.asarray([1, 2]), jnp.int32(0), jnp.int32(0))
    read_at = jnp.asarray([8, 13, 42, -1])
    segment, own, following = d.place_beside(BASE.config, others, beside, read_at, jnp.int32(HEADER), jnp.int32(43))
    assert (own.tolist(), int(following)) == (read_at.tolist(), 43)
    assert (np.asarray(segment.position) == -1).all()


def test_a_share_of_the_steps_draws_some_others_in_any_place():
    others = d.make_others(BASE.config, POOL, 2, 0.25, HEADER)
    drawn = jax.vmap(lambda key: d.draw_beside(others, key))(jax.random.split(jax.random.key(0), 400))
    assert 0.18 < np.mean(np.asarray(drawn.present) > 0) < 0.32
    assert set(np.asarray(drawn.present).tolist()) == {0, 1, 2}
    assert set(np.asarray(drawn.chosen).ravel().tolist()) == {0, 1, 2}
    assert (drawn.chosen[:, 0] != drawn.chosen[:, 1]).all()
    assert (drawn.place <= drawn.present).all()
    assert set(np.asarray(drawn.place)[np.asarray(drawn.present) == 2].tolist()) == {0, 1, 2}


@pytest.mark.slow
def test_a_buffer_is_compiled_beside_others():
    """Its losses held out are those alone and those among others, in the steps' shares."""
    config = dataclasses.replace(CONFIG, distractors=2, beside=0.5, steps=1, eval_every=1, general=4, windows=1, queries=1)
    header = len(c.split_prompts(BASE.tokenizer, STYLE, TEXT).header)
    pool = [dataclasses.replace(one, header=header) for one in POOL]
    written = c.compile_context(BASE, TEXT, STYLE, config, others=pool)
    metrics = written.metrics
    alone = 0.5 * metrics["held_out_kl_recon"] + 0.5 * metrics["held_out_kl_query"]
    assert metrics["held_out"] == pytest.approx(0.5 * alone + 0.5 * metrics["held_out_beside"], rel=1e-4)
    assert abs(metrics["held_out_beside"] - alone) > 1e-4
    assert written.artefact.layout == config.layout


def test_the_banks_other_buffers_are_drawn(bank):
    config = dataclasses.replace(CONFIG, distractors=1)
    with pytest.raises(InputError, match="no buffer of another text"):
        other_buffers(BANK_BASE, bank, config, "a text")
    for number in range(6):
        add_buffer(bank, f"text-{number}", f"The lamp of Orvale is {number} years old.")
    found = other_buffers(BANK_BASE, bank, config, "a text")
    assert len(found) == d.POOL
    assert all(isinstance(one, Buffer) for one in found)
    every = other_buffers(BANK_BASE, bank, dataclasses.replace(config, distractors=6), "The lamp of Orvale is 0 years old.")
    assert len(every) == 5  # its own text's is none


def test_what_cannot_stand_beside_is_refused():
    with pytest.raises(InputError, match="wants other buffers"):
        c.compile_context(BASE, TEXT, STYLE, dataclasses.replace(CONFIG, distractors=2))
    with pytest.raises(InputError, match="another prompt style"):
        d.make_others(BASE.config, POOL, 2, 0.25, HEADER + 1)
    with pytest.raises(ConfigError, match="distractors"):
        c.CompileConfig(distractors=-1)
