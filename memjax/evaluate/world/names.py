"""The words of the invented world, and the one rule that keeps its splits apart.

Every name, value, number and variable of the world belongs to exactly one of three splits, decided by `split_of`, a
hash of the word itself. A generator only ever draws words of its own split, so train, validation and test share no
entity and no value *by construction*; they do share the syllables, which are the tokens a model sees.
"""

from random import Random
from typing import NamedTuple
from zlib import crc32

SPLITS = ("train", "validation", "test")
# Hash residue (mod 10) -> split: 70 % train, 10 % validation, 20 % test.
_SPLIT_OF_RESIDUE = (0, 0, 0, 0, 0, 0, 0, 1, 2, 2)

# No syllable has an f: the suffix "folk" (`FOLK`) then never melts into a name.
_ONSETS = "bdghjklmnprstvwz"
_VOWELS = "aeiou"
_OPEN = tuple(c + v for c in _ONSETS for v in _VOWELS)

# First syllables of entities (capital) and of values (small), last syllables of both. One token each (see
# `tokenizer.py`).
NAME_STARTS = tuple(s.capitalize() + coda for s in _OPEN for coda in ("", "r"))
VALUE_STARTS = tuple(s + "mls"[(i + i // 5) % 3] for i, s in enumerate(_OPEN))
ENDS = tuple(s + coda for s in _OPEN for coda in ("", "n"))

# "Tavinfolk" = the people of Tavin: names a place without writing the word that a text search would look for.
FOLK = "folk"

# Words of forms and of common knowledge that happen to be two syllables; never names.
RESERVED = frozenset("Berlin Give Here Home Japan June Lima Made Make More Name Peru Rome Some Take Woman Women".split())

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def split_of(word: str) -> str:
    """The only split in which `word` (a name, a value, digits, a variable) may occur."""
    return SPLITS[_SPLIT_OF_RESIDUE[crc32(word.encode()) % 10]]


class Pool(NamedTuple):
    """Words of one split: `ends[i]` are the last syllables that may follow the first syllable `starts[i]`."""

    starts: tuple[str, ...]
    ends: tuple[tuple[str, ...], ...]


def _pool(starts: tuple[str, ...], split: str) -> Pool:
    return Pool(
        starts,
        tuple(tuple(e for e in ENDS if split_of(start + e) == split and start + e not in RESERVED) for start in starts),
    )


# Pure data, computed once at import: the whole space is 160 x 160 names and 80 x 160 values.
NAMES = {split: _pool(NAME_STARTS, split) for split in SPLITS}
VALUES = {split: _pool(VALUE_STARTS, split) for split in SPLITS}


def draw_words(rng: Random, pool: Pool, count: int) -> list[str]:
    """`count` different words of the pool; no two begin with the same syllable until the first syllables run out."""
    words: list[str] = []
    while len(words) < count:
        for i in rng.sample(range(len(pool.starts)), min(count - len(words), len(pool.starts))):
            word = pool.starts[i] + rng.choice(pool.ends[i])
            if len(words) < len(pool.starts) or word not in words:
                words.append(word)
    return words


def deal_words(seed: str, pool: Pool, hand: int, index: int) -> list[str]:
    """The `index`-th hand of `hand` words from a deck shuffled by `seed`; hands share no word until it is used up.

    A deck holds as many rounds of all first syllables as the poorest of them has last syllables (about 3,000 words in
    the test split); later hands come from a deck shuffled anew.
    """
    if hand > len(pool.starts):
        return draw_words(Random(f"{seed}/{index}"), pool, hand)
    rounds = min(len(ends) for ends in pool.ends)
    hands_per_round = len(pool.starts) // hand
    deck, place = divmod(index, rounds * hands_per_round)
    which_round, place = divmod(place, hands_per_round)
    rng = Random(f"{seed}/{deck}/{which_round}")
    order = rng.sample(range(len(pool.starts)), len(pool.starts))[place * hand : (place + 1) * hand]
    # One shuffle of the last syllables per deck and start: the round picks a different one each time.
    return [
        pool.starts[i] + Random(f"{seed}/{deck}/end{i}").sample(pool.ends[i], len(pool.ends[i]))[which_round] for i in order
    ]


def draw_number(rng: Random, split: str, digits: int, zeros: bool = False) -> str:
    """A number of exactly `digits` digits that belongs to the split; leading zeros only if `zeros`."""
    low = 0 if zeros else 10 ** (digits - 1)
    while True:
        number = f"{rng.randrange(low, 10**digits):0{digits}d}"
        if split_of(number) == split:
            return number


def draw_variable(rng: Random, split: str, letters: int = 5) -> str:
    """A variable name of capital letters that belongs to the split."""
    while True:
        name = "".join(rng.choice(_LETTERS) for _ in range(letters))
        if split_of(name) == split:
            return name
