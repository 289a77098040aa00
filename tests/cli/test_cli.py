"""The command line as a person meets it: help, JSON, one-line errors, exit statuses."""

import json

import pytest
from click.testing import CliRunner

from memjax.bank.store import open_bank
from memjax.cli import common
from memjax.cli.main import COMMANDS, cli, main
from memjax.errors import InputError
from memjax.write.prompts import prompt_style
from tests.small_bank import BASE, add


@pytest.fixture
def bank_path(tmp_path):
    path = tmp_path / "bank"
    with open_bank(path, create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        add(bank, "ferry", 1)
        add(bank, "harp", 2)
    return path


def run(capsys, *args):
    """(exit status, stdout, stderr) of a command, as a shell would see them."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def walk(command, path):
    yield path, command
    for name in getattr(command, "commands", {}):
        yield from walk(command.commands[name], [*path, name])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    group = cli.get_command(None, name)
    for path, command in walk(group, [name]):
        shown = CliRunner().invoke(cli, [*path, "--help"]).output
        if not getattr(command, "commands", None):
            assert "Example: memjax" in shown, path


def test_list_show_verify_and_delete(capsys, bank_path):
    code, out, _ = run(capsys, "bank", "list", "--bank", bank_path, "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == ["ferry", "harp"]
    code, out, _ = run(capsys, "bank", "list", "--bank", bank_path)
    assert "ferry" in out
    assert "adapter" in out
    code, out, _ = run(capsys, "bank", "show", "harp", "--bank", bank_path, "--json")
    assert json.loads(out)["text"] == "The harp of Halvic has 72 strings."
    assert run(capsys, "bank", "show", "harp", "--bank", bank_path)[0] == 0
    assert run(capsys, "bank", "verify", "--bank", bank_path)[0] == 0
    assert run(capsys, "bank", "delete", "harp", "--bank", bank_path, "--yes")[0] == 0
    code, out, _ = run(capsys, "bank", "list", "--bank", bank_path, "--json")
    assert [row["name"] for row in json.loads(out)] == ["ferry"]


def test_verify_names_the_damaged_file_and_exits_with_1(capsys, bank_path):
    with open_bank(bank_path) as bank:
        path = bank.folder(bank.get("ferry").id) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = run(capsys, "bank", "verify", "--bank", bank_path, "--json")
    report = json.loads(out)
    assert (code, report["ok"], len(report["problems"])) == (1, False, 1)
    assert "adapter_model.safetensors" in report["problems"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"abc\0def", "is a binary file"),
        (b"caf\xe9 au lait", "is not UTF-8"),
    ],
)
def test_files_that_cannot_be_written_are_refused_in_one_line(capsys, tmp_path, content, message):
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run(capsys, "write", path, "--bank", tmp_path / "bank")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert "notes.txt" in err
    assert not (tmp_path / "bank").exists()


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        common.read_text(tmp_path)


def test_errors_are_one_line_without_traceback_unless_debug(capsys, tmp_path, bank_path):
    code, _, err = run(capsys, "bank", "list", "--bank", tmp_path / "none")
    assert code == 2
    assert err.count("\n") == 1
    assert "Traceback" not in err
    code, _, err = run(capsys, "bank", "show", "hapr", "--bank", bank_path)
    assert code == 2
    assert "harp" in err
    with pytest.raises(Exception, match="hapr"):
        main(["bank", "show", "hapr", "--bank", str(bank_path), "--debug"])


def test_an_unknown_option_exits_with_2(capsys):
    code, _, err = run(capsys, "bank", "list", "--bnak", "x")
    assert code == 2
    assert "--bnak" in err


def test_questions_for_the_demo_name_line_and_field(capsys, tmp_path):
    text, questions = tmp_path / "a.txt", tmp_path / "q.jsonl"
    text.write_text("Rilo lives in Vask.")
    questions.write_text('{"question": "Where?", "document": "a", "answers": ["Vask"]}\n{"question": 7}\n')
    code, _, err = run(capsys, "demo", text, "--questions", questions)
    assert code == 2
    assert "q.jsonl, line 2" in err
    assert "'question'" in err
    code, _, err = run(capsys, "demo", text)
    assert code == 2
    assert "--questions" in err


@pytest.mark.parametrize("style", [prompt_style("chat"), prompt_style("plain")])
def test_the_shipped_demo_is_whole(style):
    from memjax.evaluate.demo import shipped

    texts, questions = shipped(style)
    assert len(texts) >= 3
    for name, text in texts.items():
        own = [q for q in questions if q.document == name]
        assert len(own) >= 3
        assert all(any(a.lower() in text.lower() for a in q.answers) for q in own)
    assert sum(q.document is None for q in questions) == 12


def test_help_names_all_commands():
    out = CliRunner().invoke(cli, ["--help"]).output
    assert all(name in out for name in COMMANDS)
