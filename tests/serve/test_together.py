"""Several buffers read at once: what the base says behind all their slots and one header."""

import dataclasses

import numpy as np
import pytest

from memjax.errors import ArtefactError, InputError
from memjax.models.buffers import buffer_prefix, read_buffers
from memjax.models.generate import generate, read_prefix
from memjax.serve.compose import compose
from memjax.serve.together import buffers_prefix, nearest_buffers, read_together
from memjax.write.reading import header_tokens, tail_tokens
from tests.serve.test_buffers import ASKED, LAMP, engine
from tests.small_bank import BASE, SAMPLING, STYLE, TEXTS, add_buffer, read_text, whole_buffer

WELL = "The well of Brindle is 40 steps deep."


@pytest.fixture
def buffers(bank):
    for name, text in (("lamp", LAMP), ("well", WELL)):
        add_buffer(bank, name, text)
    return bank


def said_behind(prefix):
    (tokens,) = generate(
        BASE.model,
        BASE.params,
        [tail_tokens(BASE.tokenizer, STYLE, ASKED)],
        BASE.tokenizer.eos_ids,
        SAMPLING,
        prefix=prefix,
    )
    return BASE.tokenizer.decode(tokens).strip()


@pytest.mark.parametrize("join", ["shift", "raw"])
def test_named_buffers_are_one_prefix_behind_one_header(buffers, join):
    header = read_prefix(BASE.model, BASE.params, header_tokens(BASE.tokenizer, STYLE)).segment
    two = [whole_buffer(text) for text in (LAMP, WELL)]
    wanted = said_behind(buffer_prefix(header, *read_buffers(BASE.config, two, join)))
    made = compose(engine(buffers), ASKED, ["lamp", "well"], join, SAMPLING)
    assert (made.text, made.how, made.memories) == (wanted, join, ("lamp", "well"))
    filled = buffers_prefix(BASE.config, header, two, join)
    at = np.asarray(filled.segment.position[0])
    assert (at >= 0).sum() == two[0].header + sum(buffer.slots for buffer in two)
    assert said_behind(filled) == wanted


def test_one_buffer_read_so_is_the_buffer_alone(buffers):
    assert read_together(engine(buffers), ASKED, ["lamp"], "shift", SAMPLING) == read_text(LAMP, ASKED)


def test_shifted_slots_of_a_cut_text_are_the_text_where_nothing_was_compressed():
    """Both halves' own keys, written in one pass: side by side they are the whole text again."""
    whole = whole_buffer(LAMP)
    half = whole.slots // 2
    parts = [
        dataclasses.replace(whole, k=whole.k[:, :half], v=whole.v[:, :half], context=half, layout="compact"),
        dataclasses.replace(whole, k=whole.k[:, half:], v=whole.v[:, half:], context=whole.slots - half, layout="compact"),
    ]
    segment, following = read_buffers(BASE.config, parts, "shift")
    alone, after = read_buffers(BASE.config, [whole])
    assert following == after
    np.testing.assert_allclose(segment.k, alone.k, atol=1e-5)


def test_without_names_the_nearest_buffers_are_read(buffers):
    found = nearest_buffers(engine(buffers), ASKED)
    assert found[0] == "lamp"
    assert set(found) == {"lamp", "well"}  # adapters are candidates too, and left out
    assert set(TEXTS) & set(engine(buffers).retrieved([ASKED])[0])


def test_what_cannot_be_read_at_once_is_refused(buffers):
    with pytest.raises(InputError, match="'ferry' is an adapter"):
        compose(engine(buffers), ASKED, ["lamp", "ferry"], "shift", SAMPLING)
    add_buffer(buffers, "odd", LAMP, header=1)
    with pytest.raises(ArtefactError, match="'odd' was written with another prompt style"):
        read_together(engine(buffers), ASKED, ["lamp", "odd"])
    for name in ("lamp", "well", "odd"):
        buffers.delete(name)
    with pytest.raises(InputError, match="none of the candidates is a buffer"):
        nearest_buffers(engine(buffers), ASKED)
