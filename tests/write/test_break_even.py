"""What a buffer saves per question, and how many questions make up for compiling it."""

import pytest

from memjax.write.break_even import break_even, reading_seconds
from tests.small_bank import BASE, STYLE, TEXTS, whole_buffer


@pytest.mark.parametrize(
    ("seconds", "with_text", "with_buffer", "questions"),
    [(90.0, 0.75, 0.25, 180), (1.0, 0.5, 0.25, 4), (90.0, 0.2, 0.2, None), (90.0, 0.1, 0.2, None), (90.0, None, 0.2, None)],
)
def test_questions_that_make_up_for_compiling(seconds, with_text, with_buffer, questions):
    assert break_even(seconds, with_text, with_buffer) == questions


def test_both_ways_of_asking_are_timed():
    text = TEXTS["ferry"] * 4
    for seconds in reading_seconds(BASE, STYLE, text, whole_buffer(text)):
        assert 0 < seconds < 60


def test_a_text_that_cannot_be_read_at_once_has_no_time():
    whole, short = reading_seconds(BASE, STYLE, TEXTS["ferry"] * 120, whole_buffer(TEXTS["ferry"] * 4))
    assert whole is None
    assert short > 0
