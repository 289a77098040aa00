"""Splits cannot share a word, because a word alone decides its split."""

from random import Random

import pytest

from memjax.evaluate.world import names, tokenizer


def words(pool):
    return {start + end for start, ends in zip(pool.starts, pool.ends, strict=True) for end in ends}


@pytest.mark.parametrize("table", [names.NAMES, names.VALUES])
def test_pools_partition_all_words(table):
    """Every possible word, exhaustively: in exactly one split, and in the one that its hash says."""
    pools = [words(table[split]) for split in names.SPLITS]
    assert not pools[0] & pools[1]
    assert not pools[0] & pools[2]
    assert not pools[1] & pools[2]
    starts = table["train"].starts
    everything = {s + e for s in starts for e in names.ENDS} - names.RESERVED
    assert set().union(*pools) == everything
    for split, pool in zip(names.SPLITS, pools, strict=True):
        assert all(names.split_of(word) == split for word in pool)
        assert len(pool) > 0.08 * len(everything)


@pytest.mark.parametrize("table", [names.NAMES, names.VALUES])
def test_splits_share_all_syllables(table):
    for split in names.SPLITS:
        pool = table[split]
        assert all(pool.ends)
        assert set().union(*pool.ends) == set(names.ENDS)


def test_no_name_is_a_word_of_the_language():
    for table in (names.NAMES, names.VALUES):
        for split in names.SPLITS:
            assert not words(table[split]) & set(tokenizer.lexicon())


@pytest.mark.parametrize("split", names.SPLITS)
def test_draws_stay_in_their_split(split):
    rng = Random(0)
    drawn = names.draw_words(rng, names.NAMES[split], 40) + names.draw_words(rng, names.VALUES[split], 40)
    drawn += [names.draw_number(rng, split, 3) for _ in range(50)]
    drawn += [names.draw_number(rng, split, 4, zeros=True) for _ in range(50)]
    drawn += [names.draw_variable(rng, split) for _ in range(50)]
    assert {names.split_of(word) for word in drawn} == {split}


def test_drawn_words_begin_differently_until_syllables_run_out():
    pool = names.VALUES["test"]
    few = names.draw_words(Random(1), pool, 80)
    assert len({word[:3] for word in few}) == 80
    many = names.draw_words(Random(1), pool, 200)
    assert len(set(many)) == 200


def test_hands_of_a_deck_are_disjoint():
    pool = names.NAMES["test"]
    hands = [names.deal_words("deck", pool, 10, i) for i in range(256)]
    dealt = [word for hand in hands for word in hand]
    assert len(set(dealt)) == len(dealt)
    assert hands[37] == names.deal_words("deck", pool, 10, 37)
    assert hands[37] != names.deal_words("other", pool, 10, 37)


def test_numbers_have_their_digits():
    rng = Random(2)
    assert all(len(names.draw_number(rng, "test", 3)) == 3 for _ in range(20))
    assert all(names.draw_number(rng, "test", 3)[0] != "0" for _ in range(50))
    assert any(names.draw_number(rng, "test", 4, zeros=True)[0] == "0" for _ in range(100))
