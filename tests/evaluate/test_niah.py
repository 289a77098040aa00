"""The needle generator: exact lines, equal deciles, lengths inside their bins."""

from collections import Counter

import pytest

from memjax.errors import ConfigError, DataError
from memjax.evaluate import niah
from memjax.evaluate.world import split_of


def count_words(text):
    """A stand-in tokenizer: one token per word and per line break."""
    return len(text.replace("\n", " \n ").split(" "))


def test_exact_lines():
    needle = niah.needle([4], 3, decile=9)
    lines = needle.context.split("\n")
    grass = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    assert lines == [grass] * 3 + [f"The special magic number is {needle.answer}."]
    assert needle.question == "What is the special magic number? Reply with only the number."
    assert len(needle.answer) == 4
    assert needle.answer.isdigit()


def test_deciles_are_equally_filled_and_hold_their_needles():
    needles = [niah.needle([40], i) for i in range(200)]
    assert set(Counter(n.decile for n in needles).values()) == {20}
    for n in needles:
        assert n.context.split("\n")[n.position].startswith("The special magic number")
        assert n.decile * 4 <= n.position < (n.decile + 1) * 4
    assert len({n.position for n in needles}) > 30  # uniform inside the decile, not its first line


def test_short_documents_put_the_needle_somewhere_valid():
    for i in range(60):
        needle = niah.needle([2, 3], i)
        assert needle.context.count("special magic number") == 1
        assert len(needle.context.split("\n")) == needle.lines


@pytest.mark.parametrize(("low", "high"), [(32, 128), (128, 256), (1024, 2048)])
def test_line_counts_fill_the_bin_and_no_more(low, high):
    counts = niah.line_counts(count_words, low, high)
    for lines in (counts[0] - 1, counts[0], counts[-1], counts[-1] + 1):
        tokens = count_words(niah.needle([max(lines, 1)], 0).context)
        assert (low <= tokens < high) == (lines in counts)


def test_line_counts_of_an_empty_bin():
    with pytest.raises(ConfigError, match="widen"):
        niah.line_counts(count_words, 100, 101)


def test_bins_join_up_to_128k():
    assert all(a[1] == b[0] for a, b in zip(niah.TEST_BINS, niah.TEST_BINS[1:], strict=False))
    assert niah.TEST_BINS[0] == (32, 1024)
    assert niah.TEST_BINS[-1] == (120 * 1024, 128 * 1024)
    assert len(niah.TEST_BINS) == 1 + 15 + 4 + 12


def test_needles_are_pure_and_numbers_uniform():
    assert niah.needle([5, 6], 17) == niah.needle([5, 6], 17)
    assert niah.needle([5, 6], 17, seed=1) != niah.needle([5, 6], 17)
    numbers = [niah.needle([3], i).answer for i in range(2000)]
    assert any(n.startswith("0") for n in numbers)
    assert {split_of(n) for n in numbers} == {"train", "validation", "test"}
    assert {split_of(niah.needle([3], i, split="test").answer) for i in range(100)} == {"test"}


def test_prose_haystacks_differ_by_document():
    text = " ".join(f"Sentence number {i} says nothing at all. Really?" for i in range(100))
    filler = niah.prose_lines(text)
    assert " ".join(filler) == text
    one, other = (niah.needle([8], i, filler=filler).context for i in (0, 1))
    assert one != other
    assert one.count("special magic number") == 1
    with pytest.raises(DataError):
        niah.prose_lines(" \n ")
