"""Documents in chunks: the reference's rule, its affixes, and what overlap promises."""

import pytest

from memjax.errors import InputError
from memjax.write.hypernet.chunks import Affixes, affixes_of, document_tokens, split_evenly, split_tokens
from memjax.write.prompts import prompt_style
from tests.write.hypernet.support import AFFIXES, BASE, STYLE

GEMMA = Affixes((2, 106, 1645, 110), (107, 108, 106, 2516, 108))


def wrapped(count, affixes=GEMMA):
    """A wrapped document of `count` tokens in all, which are told apart."""
    inner = range(1000, 1000 + count - len(affixes.prefix) - len(affixes.suffix))
    return [*affixes.prefix, *inner, *affixes.suffix]


def test_the_references_rule():
    whole = wrapped(20_000)
    chunks = split_tokens(whole, GEMMA, 8192)
    assert [len(c) for c in chunks] == [6667 + 5, 4 + 6667 + 5, 4 + 6666]
    assert chunks[0][:4] == list(GEMMA.prefix)
    assert all(c[:4] == list(GEMMA.prefix) and c[-5:] == list(GEMMA.suffix) for c in chunks)
    assert [*chunks[0][:-5], *chunks[1][4:-5], *chunks[2][4:]] == whole
    assert split_tokens(whole, GEMMA, 20_000) == [whole]


@pytest.mark.parametrize("overlap", [0, 1, 7, 30])
@pytest.mark.parametrize("length", [41, 100, 333])
def test_what_is_as_long_as_the_overlap_is_whole_in_some_chunk(length, overlap):
    whole = wrapped(length)
    chunks = split_tokens(whole, GEMMA, 40, overlap)
    bare = [c[4:] if n else c for n, c in enumerate(chunks)]
    bare = [c[:-5] if n < len(bare) - 1 else c for n, c in enumerate(bare)]
    assert all(len(c) <= 40 for c in bare)
    spans = {tuple(c[i : i + overlap + 1]) for c in bare for i in range(len(c) - overlap)}
    assert {tuple(whole[i : i + overlap + 1]) for i in range(length - overlap)} <= spans


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match="cannot share 40"):
        split_tokens(wrapped(100), GEMMA, 40, 40)
    with pytest.raises(InputError, match="at most 31"):
        split_tokens(wrapped(100), GEMMA, 36, 0, window=40)
    assert len(split_tokens(wrapped(40), GEMMA, 40, 0, window=40)) == 1
    for tokens in (wrapped(100)[1:], wrapped(9)):
        with pytest.raises(InputError, match="begin and end it with plain words"):
            split_tokens(tokens, GEMMA, 40)
    assert len(split_evenly(wrapped(14), GEMMA, 14)) == 14
    assert len(split_evenly(wrapped(14), GEMMA, 50)) == 14


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_affixes_are_what_the_template_puts_around_any_text(name):
    style = prompt_style(name)
    affixes = affixes_of(BASE.tokenizer, style)
    for text in ("Tavin lives in Orvale.", "A", "7 harps?"):
        tokens = document_tokens(BASE.tokenizer, style, text)
        assert tokens[: len(affixes.prefix)] == list(affixes.prefix)
        inner = tokens[len(affixes.prefix) : len(tokens) - len(affixes.suffix)]
        assert tokens[len(tokens) - len(affixes.suffix) :] == list(affixes.suffix)
        assert BASE.tokenizer.decode(inner).strip() == text
    assert affixes_of(BASE.tokenizer, STYLE) == AFFIXES
