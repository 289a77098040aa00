"""`memjax bank`: every command on a small bank, for people and for machines, and what is asked before deleting."""

import json

import pytest

from memjax.bank.store import open_bank
from memjax.cli import bank as cli_bank
from memjax.memory.files import Meta, write_artefact
from memjax.models.weights import SITE_MODULES
from tests.bank.test_exchange import GOLDEN
from tests.bank.test_store import writer
from tests.cli.test_cli import run
from tests.support import random_adapter, small_base


@pytest.fixture
def path(tmp_path):
    """Two memories, one of them with two versions, and one in another namespace."""
    with open_bank(tmp_path / "bank", create=True) as bank:
        bank.add("ferry", *writer(1.0), text="The ferry leaves at nine.")
        bank.update("ferry", *writer(2.0), text="The ferry leaves at ten.")
        bank.add("harp", *writer(3.0), text="The harp has 72 strings.")
        bank.add("secret", *writer(4.0), text="The ferry is mine.", namespace="other")
    return tmp_path / "bank"


def parsed(capsys, *args):
    code, out, err = run(capsys, "bank", *args, "--json")
    assert code == 0, err
    return json.loads(out)


def names(path, namespace="default"):
    with open_bank(path) as bank:
        return bank.names(namespace)


def test_search_shows_what_matches_in_the_namespace_only(capsys, path):
    assert [hit["name"] for hit in parsed(capsys, "search", "When does the ferry leave?", "--bank", path)] == ["ferry"]
    code, out, _ = run(capsys, "bank", "search", "ferry", "--bank", path)
    assert code == 0
    assert "at ten" in out
    assert "no memory's text" in run(capsys, "bank", "search", "xylophone", "--bank", path)[1]


def test_history_rollback_and_prune(capsys, path):
    rows = parsed(capsys, "history", "ferry", "--bank", path)
    assert [(row["version"], row["state"]) for row in rows] == [(1, "past"), (2, "current")]
    assert "past" in run(capsys, "bank", "history", "ferry", "--bank", path)[1]
    assert parsed(capsys, "rollback", "ferry", "--bank", path)["version"] == 1
    assert parsed(capsys, "rollback", "ferry", "--to", "2", "--bank", path)["version"] == 2
    code, _, err = run(capsys, "bank", "rollback", "ferry", "--to", "9", "--bank", path)
    assert code == 2
    assert "no version 9" in err
    assert len(parsed(capsys, "prune", "ferry", "--bank", path, "--yes")["ids"]) == 1
    assert len(parsed(capsys, "history", "ferry", "--bank", path)) == 1


@pytest.mark.parametrize("command", [["delete", "ferry"], ["delete-all"], ["reset"], ["prune", "ferry"]])
def test_nothing_is_forgotten_where_nobody_can_be_asked(capsys, path, command):
    before = path.joinpath("bank.sqlite").stat().st_mtime_ns, len(list((path / "memories").iterdir()))
    code, out, err = run(capsys, "bank", *command, "--bank", path)
    assert (code, out) == (2, "")
    assert "--yes" in err
    assert err.count("\n") == 1
    assert (path.joinpath("bank.sqlite").stat().st_mtime_ns, len(list((path / "memories").iterdir()))) == before


def test_a_person_is_asked_and_may_say_no(capsys, path, monkeypatch):
    monkeypatch.setattr(cli_bank.sys.stdin, "isatty", lambda: True, raising=False)
    for answer, left in ((False, ["ferry", "harp"]), (True, ["harp"])):
        asked = []

        def confirm(text, abort, err, answer=answer, asked=asked):
            asked.append(text)
            if not answer:
                raise cli_bank.click.Abort

        monkeypatch.setattr(cli_bank.click, "confirm", confirm)
        code, _, _ = run(capsys, "bank", "delete", "ferry", "--bank", path)
        assert code == (0 if answer else 130)
        assert "'ferry'" in asked[0]
        assert names(path) == left


def test_deleting(capsys, path):
    assert len(parsed(capsys, "delete", "ferry", "--bank", path, "--yes")["ids"]) == 2
    assert len(parsed(capsys, "delete-all", "--bank", path, "--yes")["ids"]) == 1
    assert names(path) == []
    assert names(path, "other") == ["secret"]
    assert len(parsed(capsys, "reset", "--bank", path, "--yes")["ids"]) == 1
    assert names(path, "other") == []


def test_expiry(capsys, path):
    assert parsed(capsys, "expire", "harp", "--days", "2", "--bank", path)["expires_at"] is not None
    assert parsed(capsys, "purge", "--bank", path)["ids"] == []
    assert names(path) == ["ferry", "harp"]
    with open_bank(path) as bank:
        bank.set_expiry("harp", 1.0)
    assert len(parsed(capsys, "purge", "--bank", path)["ids"]) == 1
    assert names(path) == ["ferry"]
    assert parsed(capsys, "expire", "ferry", "--bank", path)["expires_at"] is None


def test_a_missing_name_tells_nothing_of_other_namespaces(capsys, path):
    for command in (
        ["show", "secret"],
        ["history", "secret"],
        ["delete", "secret", "--yes"],
        ["export", "secret", "--to", "x"],
    ):
        code, _, err = run(capsys, "bank", *command, "--bank", path)
        assert code == 2
        assert "no memory named 'secret'; `memjax bank list`" in err


def test_export_and_import_of_a_namespace(capsys, path, tmp_path):
    assert parsed(capsys, "export", "--to", tmp_path / "all.tar", "--bank", path)["count"] == 2
    imported = parsed(capsys, "import", tmp_path / "all.tar", "--bank", tmp_path / "new", "--namespace", "copy")
    assert [row["name"] for row in imported] == names(tmp_path / "new", "copy") == ["ferry", "harp"]
    code, _, err = run(capsys, "bank", "import", tmp_path / "all.tar", "--name", "x", "--bank", tmp_path / "new")
    assert code == 2
    assert "--name" in err
    code, _, err = run(capsys, "bank", "export", "--to", tmp_path / "all.tar", "--bank", path)
    assert code == 2
    assert "exists" in err


def test_export_of_one_memory_is_a_peft_folder(capsys, path, tmp_path):
    parsed(capsys, "export", "harp", "--to", tmp_path / "harp", "--bank", path)
    found = {file.name for file in (tmp_path / "harp").iterdir()}
    assert found == {"adapter_config.json", "adapter_model.safetensors", "memory.json"}


def test_import_and_merge_of_adapters(capsys, tmp_path, monkeypatch):
    base = small_base(num_layers=1)
    monkeypatch.setattr(cli_bank, "load_base", lambda name, bank_base="": base)
    for seed in (1, 2):
        adapter = random_adapter(base.config, seed)
        write_artefact(tmp_path / f"m{seed}", adapter, SITE_MODULES, Meta(base.id, "t", "", {"seed": seed}))
    bank = ["--bank", tmp_path / "bank"]
    first = parsed(capsys, "import", tmp_path / "m1", "--about", "boats", *bank)
    assert first["name"] == "m1"
    assert run(capsys, "bank", "import", tmp_path / "m2", "--name", "second", *bank)[1].count("--about") == 1
    merged = parsed(
        capsys, "merge", "m1", "second", "--name", "both", "--way", "sum", "--weights", "1,0.5", "--rank", "8", *bank
    )
    assert merged["rank_error"] < 1e-3
    assert names(tmp_path / "bank") == ["both", "m1", "second"]
    assert parsed(capsys, "delete", "m1", "--yes", *bank)["still_in"] == ["both"]
    for wrong, message in ((["--weights", "1,x"], "list of numbers"), (["--weights", "1"], "one weight for each")):
        code, _, err = run(capsys, "bank", "merge", "both", "second", "--name", "x", *wrong, *bank)
        assert code == 2
        assert message in err
    code, _, err = run(capsys, "bank", "import", GOLDEN / "theirs", *bank)
    assert code == 2
    assert "does not fit this base" in err
