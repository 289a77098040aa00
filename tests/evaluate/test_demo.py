"""The demonstration at a small size: every key is there, counts add up, leaks are seen."""

import pytest

from memjax.errors import DataError
from memjax.evaluate import demo as d
from memjax.write.distill import DistillConfig
from memjax.write.prompts import prompt_style
from tests.support import small_base

TEXTS = {
    "ferry": "The Grey Heron leaves at 6:40. The captain of the Grey Heron is Marta Quill. It does not sail on Mondays.",
    "harp": "The Wind Harp has 72 strings. The Wind Harp is tuned with a silver spoon.",
}
QUESTIONS = [
    d.DemoQuestion("When does the Grey Heron leave?", "ferry", ("6:40",)),
    d.DemoQuestion("How many strings has the Wind Harp?", "harp", ("72 strings", "72")),
    d.DemoQuestion("What is nine plus eight?"),
]


def test_all_keys_and_counts():
    base = small_base(max_positions=2048)
    config = DistillConfig(rank=4, sites=("down",), steps=2, rows=2, keep_batch=2, general=4, top_k=4)
    lines = []
    result = d.run_demo(base, prompt_style("plain"), TEXTS, QUESTIONS, config, say=lines.append)
    assert {
        "questions", "right_base", "right_prompt", "right_memjax", "loss_base", "loss_prompt", "loss_memjax", "unrelated",
        "gated_off", "leaked", "prompt_tokens_saved", "seconds", "peak_mib", "rows",
    } <= set(result)  # fmt: skip
    assert (result["questions"], result["unrelated"], len(result["rows"])) == (2, 1, 3)
    assert result["prompt_tokens_saved"] > 0
    for row in result["rows"][:2]:
        assert row["base_loss"] > 0
        assert row["memory"] in {None, *TEXTS}
    assert "memjax_no_gate" in result["rows"][2]
    assert any("wrote ferry" in line for line in lines)


def test_names_and_numbers_of_the_documents():
    assert d._names(TEXTS) == {"Grey Heron", "6:40", "Marta Quill", "Wind Harp", "72"}


def test_leaks_are_whole_names_that_the_base_does_not_say_itself():
    names = d._names(TEXTS)
    assert d._leaks("It is 72.", "It is 17.", names) == ["72"]
    assert d._leaks("It is 72.", "It is 72 too.", names) == []
    assert d._leaks("At 16:40 or 172", "", names) == []
    assert d._leaks("grey heron!", "", names) == ["Grey Heron"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: no JSON"),
        ('\n{"question": 3}', "line 2: field 'question'"),
        ('{"question": "x", "answers": "y"}', "field 'answers' must be a list"),
        ('{"question": "x", "document": "a"}', "field 'answers' must name"),
    ],
)
def test_bad_questions_name_file_line_and_field(text, message):
    with pytest.raises(DataError, match=message) as error:
        d.parse_questions(text, "q.jsonl")
    assert "q.jsonl" in str(error.value)


def test_questions_about_unknown_documents_are_refused():
    base = small_base()
    with pytest.raises(DataError, match="boat"):
        d.run_demo(base, prompt_style("plain"), TEXTS, [d.DemoQuestion("x", "boat", ("y",))], DistillConfig())
