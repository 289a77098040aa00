"""What eviction is trained on: no benchmark's text, and batches that hold what they say."""

import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from memjax.errors import ConfigError, DataError
from memjax.evaluate import lessons as m
from memjax.evaluate import niah, ruler
from memjax.evaluate.qa import world_items
from memjax.evaluate.world import lines
from memjax.evaluate.world.documents import documents
from memjax.train.data import EXAMPLES
from memjax.write.prompts import answer_text
from tests.support import small_base

BASE = small_base()
CONFIG = m.LessonConfig(rows=4, shortest=60, longest=160, behind=96)
SOURCE = m.open_lessons(BASE, CONFIG)
HIDDEN = m.open_lessons(BASE, replace(CONFIG, shortest=300, longest=400, hidden=1.0))


def test_no_text_of_a_benchmark_is_learnt_from():
    """Pitfall 1: no needle, filler, key or chain of RULER and needle tests, no name and no sentence of the test world."""
    texts = []
    for index in range(90):
        lesson = m.readings(SOURCE if index < 60 else HIDDEN, index)
        texts += [BASE.tokenizer.decode(ids) for ids in (lesson.text, *(ids for ids, _ in lesson.behind))]
    whole = "\n".join(texts)
    hidden = (lines.GRASS, lines.NEEDLE, lines.NEEDLE_QUESTION, lines.KEYED_NEEDLE, *lines.KEYED_QUESTIONS)
    forms = [
        part for text in (*hidden, lines.KEYED_OPENING, *lines.CHAIN_QUESTIONS) for part in re.split(r"\{.\}|\. ", text)
    ]
    assert not [part for part in forms if len(part) > 12 and part.strip(". ") in whole]
    assert "magic" not in whole
    assert "VAR " not in whole
    tested = [item.query.context for item in world_items(0, 60)]
    assert not [s for text in tested for s in niah.sentences(text) if s in whole]
    names = {name for doc in documents("test", 0, 20, 200) for name in doc.kinds}
    assert len(names) > 100
    assert not names & set(re.findall(r"[A-Za-z]+", whole))
    assert not ruler.Sources().essay  # RULER's own words come from files that only its command is given


def test_a_batch_is_a_pure_function_of_its_step_and_holds_whole_prompts():
    batch, again, other = m.lessons_at(SOURCE, 3), m.lessons_at(SOURCE, 3), m.lessons_at(SOURCE, 4)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    assert not np.array_equal(batch["ids"], other["ids"])
    assert batch[EXAMPLES].tolist() == [12, 13, 14, 15]
    for row in range(4):
        held, behind = batch["at"][row] >= 0, batch["owner"][row] > 0
        length = held.sum()
        assert held[-length:].all()
        assert batch["at"][row, -length:].tolist() == list(range(length))
        assert (batch["places"][row, ~behind] == -1).all()
        assert not batch["asks"][row, ~behind].any()
        for number in range(1, batch["owner"][row].max() + 1):
            mine = batch["owner"][row] == number
            assert batch["places"][row, mine].tolist() == list(range(length, length + mine.sum()))
            said = BASE.tokenizer.decode([*batch["ids"][row, held], *batch["behind"][row, mine]])
            assert "?" in said or "." in said
    assert batch["owner"].max() > 1  # several questions share a text


def test_readings_are_the_bases_own_prompts_with_their_answers():
    whole = m.readings(SOURCE, 0)
    asking = m.readings(m.open_lessons(BASE, m.LessonConfig(rows=4, shortest=60, longest=160, behind=96, whole=False)), 0)
    assert asking.text == whole.text
    for (ids, asks), (_, every) in zip(asking.behind, whole.behind, strict=True):
        answer = ids[len(ids) - sum(asks) + 1 :]
        assert all(every)
        assert list(asks) == [False] * (len(ids) - len(answer) - 1) + [True] * (len(answer) + 1)
        text = BASE.tokenizer.decode(answer).strip()
        assert BASE.tokenizer.encode(answer_text(BASE.tokenizer, SOURCE.style, text)) == list(answer)


def test_hidden_documents_stand_in_their_order_among_prose_that_nothing_asks_about():
    told = ("Halvic keeps a harp.", "Its people drink dew.")
    whole = m._among_prose(SOURCE, Random(3), told, 300)
    assert [sentence for sentence in whole if sentence in told] == list(told)
    assert 200 < len(BASE.tokenizer.encode(" ".join(whole))) <= 320
    for index in range(20):
        hidden, plain = m.readings(HIDDEN, index), m.readings(m.open_lessons(BASE, CONFIG), index)
        assert 250 < len(hidden.text) <= 400
        assert hidden.behind  # questions about the few sentences that are facts
        assert hidden.text != plain.text
    coded = m.open_lessons(BASE, replace(CONFIG, shortest=300, longest=400, hidden=1.0, codes=3))
    asked, of_nobody = 0, 0
    for index in range(40):
        lesson = m.readings(coded, index)
        text = BASE.tokenizer.decode(lesson.text)
        for ids, _ in lesson.behind:
            found = re.search(r"What is the ([^?]+)\?.*?([a-z0-9]\S*)\s*(?:<|$)", BASE.tokenizer.decode(ids), re.S)
            told = found is not None and f"The {found.group(1)} is {found.group(2)}." in text
            asked += told and "code of" in found.group(1)
            of_nobody += told and found.group(1) in m._THINGS
    assert asked > 5
    assert of_nobody > 5
    for codes in ({"codes": 2}, {"hidden": 0.5, "codes": 99}):
        with pytest.raises(ConfigError, match=rf"data.codes is {codes['codes']}"):
            m.LessonConfig(**codes)
    for repeated in ({"repeated": 0.5}, {"hidden": 0.5, "repeated": 2.0}):
        with pytest.raises(ConfigError, match=rf"data.repeated is {repeated['repeated']}"):
            m.LessonConfig(**repeated)
    with pytest.raises(ConfigError, match=r"data.hidden is 2"):
        m.LessonConfig(hidden=2)


def test_prose_may_be_a_few_sentences_over_and_over():
    again = replace(SOURCE, config=replace(CONFIG, hidden=1.0, repeated=1.0))
    for seed in range(8):
        whole = m._among_prose(again, Random(seed), ("Halvic keeps a harp.",), 600)
        assert whole.count("Halvic keeps a harp.") == 1
        kinds = {sentence for sentence in whole if sentence != "Halvic keeps a harp."}
        assert 1 <= len(kinds) <= 5
        assert len(whole) > len(kinds) + 1
        assert 450 < len(BASE.tokenizer.encode(" ".join(whole))) <= 640


def test_files_give_a_stretch_and_how_it_goes_on(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("The ferry to Halvic leaves at dawn, and the harp has seventy strings. " * 40)
    config = m.LessonConfig(rows=4, shortest=60, longest=160, behind=32, texts=(str(path),), share=1.0)
    source = m.open_lessons(BASE, config)
    (tokens,) = source.files
    lesson = m.readings(source, 1)
    start = len(BASE.tokenizer.prefix_ids)
    ((behind, asks),) = lesson.behind
    run = [*lesson.text[start:], *behind]
    assert any(list(tokens[i : i + len(run)]) == run for i in range(len(tokens)))
    assert all(asks)
    assert 60 <= len(lesson.text) <= 160
    half = m.open_lessons(BASE, m.LessonConfig(rows=4, shortest=60, longest=160, behind=32, texts=(str(path),)))
    ferries = ["Halvic" in BASE.tokenizer.decode(m.readings(half, i).text) for i in range(12)]
    assert {True, False} == set(ferries)
    hiding = m.open_lessons(BASE, replace(CONFIG, shortest=300, longest=400, texts=(str(path),), share=0.0, hidden=1.0))
    (told,) = {BASE.tokenizer.decode(m.readings(hiding, i).text).count("seventy strings") > 4 for i in range(6)}
    assert told  # what hides a document is the file's prose
    (tmp_path / "short.txt").write_text("Too short.")
    for name, words in (("short.txt", "lessons need"), ("none.txt", "cannot be read")):
        with pytest.raises(DataError, match=words):
            m.open_lessons(BASE, m.LessonConfig(shortest=60, longest=160, texts=(str(tmp_path / name),)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="reads 512 at most"):
        m.open_lessons(BASE, m.LessonConfig(longest=500))
    with pytest.raises(ConfigError, match=r"data\.shortest"):
        m.LessonConfig(shortest=10)
    with pytest.raises(ConfigError, match=r"data\.kinds"):
        m.LessonConfig(kinds=("needle",))
    with pytest.raises(ConfigError, match=r"data\.share"):
        m.LessonConfig(share=2.0)
