"""Forms with small changes, for training: a reader that knows only a few dozen forms by heart fails on the next one.

A changed form is made of words that train forms use and is never a form of the validation or test world.
"""

import re
from dataclasses import dataclass
from random import Random

from memjax.evaluate.world.relations import RELATIONS, Forms
from memjax.evaluate.world.templates import forms_of

SHARE = 0.7  # of the forms that a varied document and its questions are told in
_FRONTED = 0.15
_SHUFFLED = 0.15
_PREPOSITIONS = frozenset(("in", "to", "of", "from", "at", "with", "for", "by"))
_FILLERS = ("now", "once", "also", "here", "given", "known", "it is", "that is", "as", "old", "people say", "in this land")
_DROPPED = ("the", "is", "was", "has", "one", "and", "it", "that", "as", "known", "there")
_SWAPS = {
    "of": ("for", "that belongs to", "given to", "known for"),
    "for": ("of", "given to"),
    "is": ("is now", "was", "is known as", "is also", "was once"),
    "was": ("was once", "is", "was also"),
    "has": ("now has", "has also", "has the"),
    "as": ("for", "as the"),
    "the": ("one", "the known", "the old"),
    "What": ("Which", "Say what", "Tell me what"),
    "Which": ("What", "Say which", "Tell me which"),
    "Who": ("Tell me who", "Which person"),
    "Where": ("Tell me where", "In which land"),
    "How": ("Tell me how", "Say how"),
    "Name": ("Say", "Give", "Tell me", "Give me", "Which is", "What was"),
    "Give": ("Give me", "Say", "Tell me", "Name", "Which is"),
    "Say": ("Tell me", "Name", "Give me"),
    "Tell": ("Now tell", "Also tell"),
    "have": ("now have", "also have"),
    "all": ("all people", "all here"),
}


@dataclass(frozen=True)
class Habits:
    """How one author tells: of every table of forms at most `most`, the same ones through a whole text.

    The held-out worlds have few forms each, so their sentences often begin alike; where a reader is in a text that it
    repeats is then told by what stands further back.
    """

    seed: int
    most: int


def pick(rng: Random, forms: Forms, split: str, vary: bool = False, habits: Habits | None = None) -> str:
    """A form of the split; with `vary`, a share of them changed; with `habits`, one of the author's few."""
    if habits is None:
        form = rng.choice(forms.of(split))
        return changed(rng, form) if vary and rng.random() < SHARE else form
    own = Random(f"{habits.seed}/{forms.train[0]}")
    table = forms.of(split)
    few = own.sample(table, min(len(table), own.randint(1, habits.most)))
    return rng.choice([changed(own, form) if vary and own.random() < SHARE else form for form in few])


def changed(rng: Random, form: str) -> str:
    """The form with one to three words inserted, dropped or swapped; slots stay, and mostly their order.

    Of the forms of a fact, a share has its object brought to the front: "in {o} {s} now lives"; another share has all its
    words in any order: "lives in {o} {s}".
    """
    if "{o}" in form and rng.random() < _SHUFFLED:
        made = _shuffled(rng, form)
        return form if plain(made) in _HELD_OUT else made
    words = _fronted(form.split(" ")) if rng.random() < _FRONTED else form.split(" ")
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        swaps = [i for i, word in enumerate(words) if word in _SWAPS]
        drops = [i for i, word in enumerate(words) if word in _DROPPED]
        if kind < 0.5 and swaps:
            at = rng.choice(swaps)
            words[at : at + 1] = rng.choice(_SWAPS[words[at]]).split(" ")
        elif kind < 0.65 and drops and len(words) > 3:
            del words[rng.choice(drops)]
        else:
            at = rng.randint(0, len(words) - 1)
            words[at:at] = rng.choice(_FILLERS).split(" ")
    made = " ".join(words)
    return form if plain(made) in _HELD_OUT else made


def _fronted(words: list[str]) -> list[str]:
    """The words with the object, and a preposition before it, first; as they are where subject and object are not words."""
    if "{s}" not in words or "{o}" not in words or words.index("{o}") < words.index("{s}"):
        return words
    at = words.index("{o}")
    begin = at - (words[at - 1] in _PREPOSITIONS)
    return [*words[begin : at + 1], *words[:begin], *words[at + 1 :]]


def _shuffled(rng: Random, form: str) -> str:
    """The words in random order; a preposition stays before its slot, and without one subject and object keep theirs."""
    units: list[str] = []
    for word in form.split(" "):
        if word in ("{s}", "{o}") and units and units[-1] in _PREPOSITIONS:
            units[-1] += " " + word
        else:
            units.append(word)
    made = rng.sample(units, len(units))
    ends = [i for i, unit in enumerate(made) if unit in ("{s}", "{o}")]
    if len(ends) == 2:
        first, second = sorted((made[i] for i in ends), key=units.index)
        made[ends[0]], made[ends[1]] = first, second
    return " ".join(made)


def invented(rng: Random, slots: tuple[str, ...], most: int = 5, ordered: tuple[str, ...] = ()) -> str:
    """A form nobody has seen: the slots and at most `most` words of train forms in random order; never a held-out form.

    ordered: slots that keep this order among themselves.
    """
    while True:
        words = [*slots, *rng.sample(WORDS, rng.randint(0, most))]
        rng.shuffle(words)
        kept = iter(ordered)
        words = [next(kept) if word in ordered else word for word in words]
        form = " ".join(words)
        if plain(form) not in _HELD_OUT:
            return form


def plain(form: str) -> str:
    """The form without marks and capitals, by which two of them are the same."""
    return re.sub(r"[^\w{} ]", "", form).lower()


_NOUNS = re.compile(rf"\b({'|'.join(relation.noun for relation in RELATIONS)})\b")
# Held-out forms as they are, and with {n} where a relation's noun stands, which a form may be given.
_HELD_OUT = frozenset(
    plain(form) for split in ("validation", "test") for held in forms_of(split) for form in (held, _NOUNS.sub("{n}", held))
)
# Without the nouns of relations: one more of those would make an invented form ambiguous.
WORDS = tuple(
    sorted(
        {word for form in forms_of("train") for word in form.split() if word.isalpha() and word.islower()}
        - {relation.noun for relation in RELATIONS}
    )
)
