"""Records that a base makes of texts: whole passages, its own answers and classes, and a run that goes on."""

import dataclasses

import grain
import numpy as np
import pytest

from memjax.errors import ConfigError, DataError, InputError
from memjax.write.hypernet import selfgen as s
from memjax.write.prompts import read_tokens
from memjax.write.questions import Question
from tests.support import small_base
from tests.write.hypernet.support import BASE, STYLE, logits

TEXTS = {
    "a.txt": "Tavin lives in Orvale. The harp of Halvic is old. Mira keeps the oven. The ferry to Vask leaves at seven.",
    "b.txt": "The baker of Brindle is Koro. His oven is red.",
}
CONFIG = s.SelfgenConfig(passage=20, answer_tokens=4, top_k=3, shard=2)


@pytest.fixture(autouse=True)
def answered(monkeypatch):
    """A random base neither asks nor answers: two questions of each passage, and what is said to the first is not ended."""
    made = []

    def ask(base, text, style, recipe):
        made.append(text)
        return [Question(f"What is {n}?", "turned", answer="7") for n in (1, 2)]

    stop = BASE.tokenizer.eos_ids[0]
    monkeypatch.setattr(s, "make_questions", ask)
    monkeypatch.setattr(s, "answer_questions", lambda base, questions, *rest: {0: [7, 8, 9, 10], 1: [31, 32, stop]})
    return made


def test_passages_are_whole_sentences_that_fit():
    text = TEXTS["a.txt"]
    made = s.passages(BASE, text, 20)
    assert len(made) > 1
    assert " ".join(made) == text
    assert max(len(BASE.tokenizer.encode(part)) for part in made) <= 20
    assert s.passages(BASE, f"{'very ' * 40}old. Mira sings.", 20) == ["Mira sings."]


def test_a_record_holds_the_bases_own_classes_with_the_passage_in_its_prompt(tmp_path):
    records = s.selfgen(BASE, TEXTS, CONFIG, tmp_path / "out")
    record = records[len(records) - 1]
    assert (record["source"], record["question"], record["answer"]) == ("b.txt", "What is 2?", "89")
    fed = [*read_tokens(BASE.tokenizer, STYLE, record["text"], record["question"]), *record["tokens"][:-1]]
    found = logits(rows=(fed,))[0, -3:].astype(np.float64)
    logp = found - np.log(np.exp(found).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.take_along_axis(logp, np.asarray(record["target"]), axis=-1), record["logp"], atol=1e-3)
    assert np.asarray(record["target"])[:, 0].tolist() == found.argmax(axis=-1).tolist()


def test_a_run_that_was_stopped_goes_on_and_is_read_by_grain(tmp_path, answered):
    def stop(done, total):
        if done > CONFIG.shard:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s.selfgen(BASE, TEXTS, CONFIG, tmp_path / "half", progress=stop)
    with pytest.raises(DataError, match="selfgen finish"):
        s.Records(tmp_path / "half", BASE)
    answered.clear()
    resumed = s.selfgen(BASE, TEXTS, CONFIG, tmp_path / "half")
    again = len(answered)
    whole = s.selfgen(BASE, TEXTS, CONFIG, tmp_path / "whole")
    assert again == len(whole) - CONFIG.shard
    assert [resumed[i] for i in range(len(resumed))] == [whole[i] for i in range(len(whole))]
    data = grain.MapDataset.source(whole).seed(1).shuffle()
    assert sorted(row["passage"] for row in data) == list(range(len(whole)))
    with pytest.raises(IndexError):
        whole[len(whole)]


def test_what_does_not_go_together_is_refused(tmp_path):
    s.selfgen(BASE, TEXTS, CONFIG, tmp_path)
    with pytest.raises(ConfigError, match="begun with other recipe"):
        s.selfgen(BASE, TEXTS, dataclasses.replace(CONFIG, top_k=4), tmp_path)
    with pytest.raises(ConfigError, match="made by another base"):
        s.Records(tmp_path, small_base(seed=1))
    with pytest.raises(InputError, match="no sentence"):
        s.selfgen(BASE, {"c": "..."}, CONFIG, tmp_path / "c")
    with pytest.raises(ConfigError, match="smaller passage"):
        s.selfgen(BASE, TEXTS, dataclasses.replace(CONFIG, passage=240), tmp_path / "d")
    with pytest.raises(ConfigError, match="ask at least one"):
        dataclasses.replace(CONFIG, asked=0, turned=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="name files"):
        s.texts_of([tmp_path / "empty"], str)
