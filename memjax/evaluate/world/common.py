"""Common knowledge: a fixed set of small facts about the ordinary world, the same for every document and every split.

A base learns them in pretraining; they stand for general ability. A memory that harms them harms the model.
"""

from random import Random
from typing import NamedTuple


class CommonFact(NamedTuple):
    """A closed question with one short answer. `topic` groups facts whose answers are of one kind."""

    topic: str
    key: str
    answer: str


# topic -> ways of asking (the first is the plain one), then "key answer" pairs.
_ASKS = {
    "capital": ("What is the capital of {k}?", "Name the capital of {k}.", "Which city is the capital of {k}?"),
    "opposite": ("What is the opposite of {k}?", "Give the opposite of {k}.", "Which word is the opposite of {k}?"),
    "young": ("What is a young {k} called?", "Name a young {k}.", "Which word means a young {k}?"),
    "sound": ("What sound does a {k} make?", "Name the sound of a {k}.", "Which sound does a {k} make?"),
    "look": ("What colour is {k}?", "Name the colour of {k}.", "Which colour does {k} have?"),
    "legs": ("How many legs has a {k}?", "Count the legs of a {k}.", "How many legs does a {k} have?"),
    "day": ("Which day comes after {k}?", "Name the day after {k}.", "What day comes after {k}?"),
    "month": ("Which month comes after {k}?", "Name the month after {k}.", "What month comes after {k}?"),
    "sum": ("What is {k}?", "Count {k}.", "How much is {k}?"),
    "plural": ("What is the plural of {k}?", "Give the plural of {k}.", "Which word is the plural of {k}?"),
    "product": ("What does a {k} make?", "Name the work of a {k}.", "Which thing does a {k} make?"),
    "dwelling": ("Where does a {k} sleep?", "Name the bed of a {k}.", "In what does a {k} sleep?"),
    "past": ("What is the past of {k}?", "Give the past of {k}.", "Which word is the past of {k}?"),
    "measure": ("How many {k}?", "Count how many {k}.", "Tell me how many {k}."),
}
_FACTS = {
    "capital": "France Paris, Spain Madrid, Italy Rome, Greece Athens, Egypt Cairo, Japan Tokyo, China Beijing, "
    "Russia Moscow, Norway Oslo, Austria Vienna, Germany Berlin, Portugal Lisbon, Ireland Dublin, England London, "
    "Poland Warsaw, Hungary Budapest, Cuba Havana, Peru Lima, Kenya Nairobi, Canada Ottawa",
    "opposite": "hot cold, big small, up down, left right, day night, black white, old young, fast slow, hard soft, "
    "wet dry, high low, rich poor, full empty, open shut, early late, near far, good bad, light dark, long short, "
    "strong weak, sweet sour, love hate, war peace, win lose, buy sell, push pull, loud quiet, thick thin",
    "young": "dog puppy, cat kitten, cow calf, sheep lamb, horse foal, hen chick, goat kid, pig piglet, lion cub, "
    "duck duckling, swan cygnet, deer fawn, frog tadpole, goose gosling",
    "sound": "cow moo, dog bark, cat meow, sheep baa, duck quack, lion roar, bee buzz, snake hiss, owl hoot, pig oink, "
    "mouse squeak, wolf howl",
    "look": "grass green, snow white, coal black, blood red, gold yellow, chocolate brown, fire orange, "
    "milk cream, ash grey, ink blue, a plum purple, a flamingo pink",
    "legs": "spider 8, ant 6, dog 4, bird 2, snake 0, crab 10, stool 3, tripod 3, table 4, beetle 6",
    "day": "Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, Saturday Sunday, "
    "Sunday Monday",
    "month": "January February, February March, March April, April May, May June, June July, July August, "
    "August September, September October, October November, November December, December January",
    "plural": "mouse mice, foot feet, tooth teeth, goose geese, child children, ox oxen, man men, woman women, "
    "leaf leaves, knife knives, wolf wolves, louse lice",
    "product": "baker bread, brewer beer, tailor clothes, potter pots, poet poems, smith swords, cobbler shoes, "
    "painter pictures, weaver cloth, farmer food, writer books, hatter hats",
    "dwelling": "bee hive, bird nest, dog kennel, horse stable, bear cave, fox den, hen coop, king castle, pig sty, "
    "monk abbey",
    "past": "go went, see saw, eat ate, run ran, sing sang, swim swam, write wrote, drink drank, give gave, come came, "
    "take took, bring brought, buy bought, think thought, fly flew, grow grew, know knew, break broke, fall fell, "
    "find found",
    "measure": "days are in a week:7, months are in a year:12, hours are in a day:24, minutes are in an hour:60, "
    "legs has a chair:4, eyes has a man:2, toes has a foot:5, wings has a bird:2, sides has a square:4, "
    "wheels has a cart:2, seasons are in a year:4, strings has a violin:4",
}


def _table() -> tuple[CommonFact, ...]:
    facts = []
    for topic, listing in _FACTS.items():
        for entry in listing.split(", "):
            key, answer = entry.split(":") if topic == "measure" else entry.rsplit(" ", 1)
            facts.append(CommonFact(topic, key, answer))
    facts += [CommonFact("sum", f"{a} plus {b}", str(a + b)) for a in range(1, 8) for b in range(1, 8)]
    return tuple(facts)


COMMON_FACTS = _table()


def ask(fact: CommonFact, form: int = 0) -> str:
    """The question for a fact; `form` chooses among its ways of asking."""
    return _ASKS[fact.topic][form % len(_ASKS[fact.topic])].format(k=fact.key)


def forms(fact: CommonFact) -> int:
    """How many ways of asking the fact has."""
    return len(_ASKS[fact.topic])


def choices(fact: CommonFact, seed: int, count: int = 5) -> list[str]:
    """The answer and `count - 1` wrong ones of the same topic, in an order drawn from the seed (multiple choice)."""
    rng = Random(f"choices/{seed}/{fact.topic}/{fact.key}")
    others = sorted({f.answer for f in COMMON_FACTS if f.topic == fact.topic} - {fact.answer})
    drawn = [fact.answer, *rng.sample(others, min(count - 1, len(others)))]
    return rng.sample(drawn, len(drawn))
