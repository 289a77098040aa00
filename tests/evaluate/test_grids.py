"""The needle and RULER runs: every cell filled, prompts whole, and the scores of who knows and who does not."""

import numpy as np
import pytest

from memjax.errors import ConfigError
from memjax.evaluate import niah_grid as n
from memjax.evaluate import ruler
from memjax.evaluate import ruler_run as r
from memjax.evaluate.report import summarize
from memjax.evaluate.subjects import PLAIN, query_tokens
from tests.evaluate.support import oracle, silent
from tests.support import small_base

BASE = small_base(max_positions=1024)
BINS = ((64, 128), (128, 256))


def count(text):
    return len(BASE.tokenizer.encode(text))


def test_needles_fill_every_cell_and_are_scored_by_number():
    number = lambda query: query.context.split("magic number is ")[1][:4]
    shallow = oracle(lambda query: number(query) if "number is" in query.context[:60] else "none", "shallow")
    wordy = oracle(lambda query: f"The number is {number(query)}.", "wordy")
    scores, cut = n.niah_item_scores(
        n.ask_subjects([oracle(number), silent(), shallow, wordy]), count, BINS, seed=0, per_bin=20
    )
    numbers = summarize([scores])
    assert cut == 0
    assert (numbers["exact_match/oracle"], numbers["rouge_l/oracle"], numbers["exact_match/silent"]) == (1, 1, 0)
    assert numbers["exact_match/oracle_items"] == 40
    assert (numbers["exact_match/wordy"], numbers["contains/wordy"]) == (0, 1)
    assert numbers["rouge_l/wordy"] == pytest.approx(0.4)
    assert (n.cells(numbers, "oracle", BINS) == np.ones((10, 2))).all()
    grid = n.cells(numbers, "shallow", BINS)
    assert (grid[0] == 1).all()
    assert (grid[-1] == 0).all()


def test_internalised_needles_have_keys_by_length_in_windows():
    bins = (*BINS, (1000, 1024), (2000, 4096), (5000, 6000))
    marks = [n.mark_of(tokens, 1024, False) for tokens in bins]
    assert marks == ["niah_native", "niah_native", "niah_native", "niah_4x", None]
    assert n.mark_of((60_000, 65_536), 1024, True) == "niah_64x_prose"
    assert n.internalize_bins(512)[-2:] == ((1984, 2048), (7936, 8192))
    assert n.internalize_bins(512)[:-2] == n.window_bins(512)
    number = lambda query: query.context.split("magic number is ")[1][:4]
    ask = n.ask_subjects([oracle(number, "internalize"), silent()])
    scores, _ = n.niah_item_scores(ask, count, BINS, seed=0, per_bin=10, window=128)
    assert (scores["niah_native"], scores.get("niah_4x")) == ([1] * 10, None)


def test_bins_follow_the_window_or_the_caller():
    assert n.window_bins(512) == ((32, 128), (128, 256), (256, 352), (352, 448))
    assert n.window_bins(2200) == ((32, 1024), (1024, 2048))
    assert n.window_bins(384) == ((32, 128), (128, 256))
    assert n.parse_bins("32-64, 64-96") == ((32, 64), (64, 96))
    with pytest.raises(ConfigError, match="too short"):
        n.window_bins(200)
    for wrong in ("32", "64-32", "a-b", ""):
        with pytest.raises(ConfigError, match="LOW-HIGH"):
            n.parse_bins(wrong)
    with pytest.raises(ConfigError, match="at least 10"):
        n.niah_item_scores(n.ask_subjects([silent()]), count, BINS, seed=0, per_bin=9)


def test_ruler_puts_the_whole_prompt_and_keeps_the_answer_prefix():
    (sample,) = ruler.samples("niah_single_1", 512, 1, count, ruler.Sources())
    query = r.as_query(sample)
    text = f"<bos><q> {sample.context}\n{sample.question}<a>{sample.prefix}"
    assert query_tokens(BASE, PLAIN, query) == BASE.tokenizer.encode(text)
    # <bos>, <q>, <a> and the space that the template puts before a question.
    assert r.template_tokens(BASE) == 4


def test_ruler_scores_each_task_and_their_mean():
    sources = ruler.Sources(essay="The wind blew over the hill. " * 30)
    tasks = ("niah_single_1", "niah_multikey_2", "niah_multivalue", "vt")
    answers = {}
    for task in tasks:
        for sample in ruler.samples(task, 700, 2, count, sources, seed=ruler.SEED + 3):
            answers[r.as_query(sample)] = " ".join(sample.answers)
    scores, _ = r.ruler_item_scores([oracle(answers.get), silent()], tasks, 700, 2, count, sources, seed=3)
    assert {key: value for key, value in scores.items() if key.endswith("oracle")} == {
        **{f"{task}/oracle": [1, 1] for task in tasks},
        "mean/oracle": [1] * 4,
    }
    assert scores["mean/silent"] == [0] * 4


def test_tasks_without_their_files_are_left_out_and_lengths_beyond_the_window_refused():
    assert r.available_tasks(ruler.Sources()) == ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
    assert len(r.available_tasks(ruler.Sources("prose", ruler.QuestionSet((), ()), ruler.QuestionSet((), ())))) == 13
    assert r.sample_length(BASE, 1024) == 1020  # the template's tokens fit as well
    assert r.sample_length(BASE, 700) == 700
    with pytest.raises(ConfigError, match="at most 1024"):
        r.sample_length(BASE, 1025)
