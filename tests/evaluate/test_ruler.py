"""The thirteen RULER tasks: exact wording, counts that define them, lengths kept, files checked."""

import json
import re
from collections import Counter

import pytest

from memjax.errors import ConfigError, DataError
from memjax.evaluate import ruler

ESSAY = " ".join(
    f"Paragraph {i} is about the {w} and the river bend. It goes on!" for i in range(40) for w in ruler.NOUNS[:40]
)


def count(text):
    """A stand-in tokenizer: one token per four letters."""
    return len(text) // 4 + 1


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    path = tmp_path_factory.mktemp("squad") / "dev.json"
    articles = [
        {
            "title": f"A{a}",
            "paragraphs": [
                {
                    "context": f"Article {a} paragraph {p} says the colour is c{a}x{p}. " * 5,
                    "qas": [
                        {"question": f"Which colour has {a}/{p}?", "answers": [{"text": f"c{a}x{p}"}, {"text": "C"}]},
                        {"question": "Nothing?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(3)
            ],
        }
        for a in range(20)
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return ruler.read_squad(path)


@pytest.fixture(scope="module")
def hotpot(tmp_path_factory):
    path = tmp_path_factory.mktemp("hotpot") / "dev.json"
    rows = [
        {
            "question": f"Q{i}?",
            "answer": f"a{i}",
            "context": [[f"T{i}.{j}", ["One. ", f"a{i} two."]] for j in range(10)],
        }
        for i in range(12)
    ]
    path.write_text(json.dumps(rows))
    return ruler.read_hotpot(path)


@pytest.fixture(scope="module")
def sources(squad, hotpot):
    return ruler.Sources(ESSAY, squad, hotpot)


@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_samples_use_their_length_and_hold_their_answers(task, length, sources):
    made = ruler.samples(task, length, 3, count, sources)
    assert made == ruler.samples(task, length, 3, count, sources)
    assert len({sample.prompt for sample in made}) == 3
    assert made != ruler.samples(task, length, 3, count, sources, seed=7)
    for sample in made:
        spent = count(sample.prompt + " " + " ".join(sample.answers)) + sample.new_tokens
        assert spent <= length
        # The two small question sets run out of paragraphs; every other haystack fills at least three quarters.
        assert spent > 0.75 * length or task.startswith("qa")
        if not task.startswith("qa"):
            assert all(answer in sample.context for answer in sample.answers)
            assert ruler.score(task, " and ".join(sample.answers).upper(), sample.answers) == 1
        assert ruler.score(task, "", sample.answers) == 0


def one(task, sources, length=4096):
    return ruler.samples(task, length, 1, count, sources)[0]


def test_single_needle_wording(sources):
    sample = one("niah_single_1", sources)
    key = re.search(r"One of the special magic numbers for (\S+) is: (\d{7})\.", sample.context)
    assert sample.answers == (key[2],)
    assert sample.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert sample.question == f"What is the special magic number for {key[1]} mentioned in the provided text?"
    assert sample.prefix == f" The special magic number for {key[1]} mentioned in the provided text is"
    lines = Counter(sample.context.split("\n"))
    assert lines["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] > 50
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("task", "needles", "answers"),
    [("niah_single_3", 1, 1), ("niah_multikey_1", 4, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)],
)
def test_needle_counts(task, needles, answers, sources):
    sample = one(task, sources)
    found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", sample.context)
    assert len(found) == needles
    assert len(sample.answers) == answers
    assert len({key for key, _ in found}) == (1 if task == "niah_multivalue" else needles)
    if answers > 1:
        assert sample.context.startswith("Some special magic numbers are hidden")
        assert sample.prefix.endswith("mentioned in the provided text are")
    asked = [key for key, value in found if value in sample.answers]
    assert all(key in sample.question for key in asked)
    if task == "niah_multiquery":
        assert sample.question.count(",") == 3
        assert ", and " in sample.question


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_haystacks_of_needles_have_one_answer(task, sources):
    sample = one(task, sources)
    found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", sample.context)
    assert len(found) == len(sample.context.split("\n")) - 1
    asked = re.search(r"for (\S+) mentioned", sample.question)[1]
    assert [value for key, value in found if key == asked] == list(sample.answers)
    if task == "niah_multikey_3":
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", asked)


def test_variable_tracking_is_a_chain_in_order(sources):
    sample = one("vt", sources)
    main = sample.context[sample.context.rindex("Memorize and track") :]
    steps = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", main)
    value = re.search(r"the value (\d{5}) in", sample.question)[1]
    assert [name for name, _ in steps] == list(sample.answers)
    assert [source for _, source in steps] == [value, *sample.answers[:-1]]
    assert f"5 variables are assgined the value {value}, they are: " in sample.prefix
    # One worked example stands first, with its answers.
    example = sample.context[: sample.context.rindex("Memorize and track")]
    assert example.count("Memorize and track") == 1
    shown = re.findall(r"VAR ([A-Z]{3}) =", example)
    assert example.rstrip().endswith(" ".join(shown))
    assert example.endswith("\n\n")


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [(8192, 30, 3, 40), (2048, 6, 1, 20)])
def test_common_words_are_common(length, often, seldom, shown, sources):
    sample = one("cwe", sources, length)
    solved, body = sample.context.split("Memorize the ones that appear most often.\n")[1:]
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", body))
    assert {counts[word] for word in sample.answers} == {often}
    assert {n for word, n in counts.items() if word not in sample.answers} == {seldom}
    assert len(sample.answers) == 10
    listed, answered = solved.split("Question: What are the 10 most common words in the above list? Answer: ")
    example = Counter(re.findall(r"\d+\. ([a-z]+)", listed))
    assert len(example) == shown
    assert not set(example) & set(counts)
    top = {word for word, n in example.items() if n == max(example.values())}
    assert set(re.findall(r"\d+\. ([a-z]+)", answered)) == top


def test_coded_words_follow_zipf(sources):
    sample = one("fwe", sources, 8192)
    body = sample.context.split("coded words. ")[1]
    counts = Counter(body.split())
    ranked = [word for word, _ in counts.most_common(4)]
    assert ranked[0] == "..."
    assert tuple(ranked[1:]) == sample.answers
    assert counts["..."] / counts[ranked[1]] == pytest.approx(4, rel=0.05)
    assert counts["..."] / counts[ranked[2]] == pytest.approx(9, rel=0.1)
    assert all(re.fullmatch(r"[a-z]{6}", word) for word in counts if word != "...")


def test_documents_hold_gold_then_same_article_then_others(sources):
    sample = one("qa_1", sources, 1024)
    assert sample.answers == ("c0x0", "C")
    assert "c0x0" in sample.context
    numbers = [int(n) for n in re.findall(r"^Document (\d+):$", sample.context, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {"c0x1", "c0x2"} <= set(re.findall(r"c\d+x\d+", sample.context))
    assert sample.prompt.endswith("\n\nQuestion: Which colour has 0/0? Answer:")
    assert sample.prompt.count(ruler._QA_RULE) == 2
    hop = one("qa_2", sources, 2048)
    assert hop.answers == ("a0",)
    assert hop.context.count("a0 two.") == 10


def test_qa_is_scored_by_any_other_tasks_by_all():
    assert ruler.score("qa_1", "it is Paris", ["paris", "London"]) == 1
    assert ruler.score("niah_multivalue", "1 2", ["1", "2", "3", "4"]) == 0.5


@pytest.mark.parametrize(
    ("task", "match"),
    [("niah_single_2", "essay"), ("qa_1", "SQuAD"), ("qa_2", "HotpotQA"), ("niah_multikey_1", "essay")],
)
def test_a_missing_source_is_named(task, match):
    with pytest.raises(DataError, match=match):
        ruler.samples(task, 4096, 1, count, ruler.Sources())


def test_unknown_tasks_and_lengths_too_small(sources):
    with pytest.raises(ConfigError, match=r"niah_9.*niah_single_1"):
        ruler.samples("niah_9", 4096, 1, count, sources)
    with pytest.raises(ConfigError, match="256"):
        ruler.samples("cwe", 256, 1, count, sources)


@pytest.mark.parametrize(
    ("text", "read", "match"),
    [
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', ruler.read_squad, "context"),
        ("[1, 2]", ruler.read_squad, "'data'.* a list"),
        ('{"data": 3}', ruler.read_squad, "'data' must be a list"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": 4}]}]}]}', ruler.read_squad, r"qas\[0\].*ques"),
        ('[{"question": "q", "answer": "a"}]', ruler.read_hotpot, "record 0.*context"),
        ('[{"question": "q", "answer": "a", "context": [["t"]]}]', ruler.read_hotpot, "title"),
        ("{\n  bad", ruler.read_squad, "line 2"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, read, match):
    path = tmp_path / "set.json"
    path.write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="nowhere"):
        read(tmp_path / "nowhere.json")
