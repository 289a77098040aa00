"""The words of a text that count for retrieval: case, accents, plurals and words without a subject set aside."""

from __future__ import annotations

import re
import unicodedata

# What says nothing about a text's subject: articles, pronouns, auxiliaries, prepositions, question words.
STOP_WORDS = frozenset(
    """a about an and any are as at be been but by can could did do does for from had has have he her his how i if in
    into is it its me my no not of on or our she should so some such than that the their them then there these they this
    those to was we were what when where which who whom whose why will with would you your
    d ll m re s t ve""".split()
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af])")
_TOKEN = re.compile(r"\d+(?:[.:]\d+)+|[^\W_]+")


def tokenize(text: str) -> list[str]:
    """The words and numbers of a text that count: case, accents, plurals and thousands separators set aside.

    Chinese and Japanese characters and Korean syllables are tokens by themselves, for lack of spaces between words.
    """
    return [stem(word) for word in all_words(text) if word not in STOP_WORDS]


def all_words(text: str) -> list[str]:
    """All words and numbers of a text, in small letters and without accents, as they stand."""
    text = text.casefold()
    if not text.isascii():  # of ASCII, nothing below would change anything
        text = unicodedata.normalize("NFKD", text)
        text = "".join(char for char in text if not unicodedata.combining(char))
        text = _IDEOGRAPH.sub(r" \1 ", unicodedata.normalize("NFC", text))
    return _TOKEN.findall(_THOUSANDS.sub("", text))


def stem(word: str) -> str:
    """An English word without its plural ending, after Harman's S-stemmer (1991)."""
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1]
