"""Needle lines and variable chains as in RULER (arXiv 2404.06654) and Doc-to-LoRA (arXiv 2602.15902), by split."""

from itertools import pairwise
from random import Random

from memjax.evaluate.world.names import VALUES, draw_number, draw_variable, draw_words

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The special magic number is {v}."
NEEDLE_QUESTION = "What is the special magic number? Reply with only the number."
KEYED_NEEDLE = "One of the special magic numbers for {k} is: {v}."
KEYED_QUESTIONS = (
    "What is the special magic number for {k} mentioned in the provided text?",
    "What is the special magic number for {k}?",
    "Which special magic number is for {k}? Reply with only the number.",
)
KEYED_OPENING = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)
CHAIN_QUESTIONS = (
    "Find all variables that are assigned the value {v} in the text above.",
    "Which variables have the value {v}?",
)


def keyed_needles(split: str, rng: Random, haystack: list[str], keys: int) -> tuple[str, dict[str, str]]:
    """The haystack's lines with `keys` needles "… numbers for KEY is: NUMBER." at random places; {key: number}."""
    words = draw_words(rng, VALUES[split], keys)
    pairs = {word: draw_number(rng, split, rng.choice((4, 5, 7))) for word in words}
    text = list(haystack)
    for word, number in pairs.items():
        text.insert(rng.randint(0, len(text)), KEYED_NEEDLE.format(k=word, v=number))
    return "\n".join(text), pairs


def variable_chains(
    split: str, rng: Random, haystack: list[str], chains: int, hops: int
) -> tuple[str, dict[str, list[str]]]:
    """Chains "VAR A = 12345", "VAR B = VAR A", … of `hops` hops in order at random places; {value: variables}."""
    text = list(haystack)
    found: dict[str, list[str]] = {}
    while len(found) < chains:
        variables = [draw_variable(rng, split) for _ in range(hops + 1)]
        value = draw_number(rng, split, 5)
        if value in found:
            continue
        found[value] = variables
        steps = [f"VAR {variables[0]} = {value}", *(f"VAR {new} = VAR {old}" for old, new in pairwise(variables))]
        places = sorted(rng.randint(0, len(text)) for _ in steps)
        for offset, (place, step) in enumerate(zip(places, steps, strict=True)):
            text.insert(place + offset, step)
    return "\n".join(text), found
