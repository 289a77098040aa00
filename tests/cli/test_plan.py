"""`memjax plan` as a person meets it: tables, JSON, exit statuses and one-line errors; nothing is compiled."""

import dataclasses
import json

import pytest

from memjax.cli.main import main
from memjax.plan.hlo import Collective, Work
from memjax.plan.report import Memory, Report
from memjax.plan.topology import GIB, parse_topology
from tests.shapes import HF

WORK = Work(1e12, 1e9, (Collective("all-reduce", 4, 1e6, 2e6),))


def run(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *map(str, args)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """A folder of two plans, and a compiler to which each needs 20 GiB on every chip, or half with half of the rows."""
    (tmp_path / "shape.json").write_text(json.dumps(HF["tiny"]), "utf-8")
    for name, chips in (("large", "v6e-8"), ("small", "v5e-8")):
        text = f"topology: {chips}\nbase: shape.json\nmesh: {{tensor: 8}}\nserve: {{rows: 8}}\n"
        (tmp_path / f"{name}.yaml").write_text(text, "utf-8")

    def make_report(plan, name):
        memory = Memory({"parameters": GIB, "slots": 2 * GIB}, {}, temporaries=2.5 * GIB * plan.serve.rows)
        topology = parse_topology(plan.topology)
        found = Report(name, plan.step, topology, "1x1x8", memory, WORK, 1.0, {"libtpu": "0"})
        return dataclasses.replace(found, base_work=dataclasses.replace(WORK, hbm_bytes=1e8))

    monkeypatch.setattr("memjax.plan.report.make_report", make_report)
    return tmp_path


def test_a_plan_that_fits(capsys, plans):
    code, out, _ = run(capsys, plans / "large.yaml")
    assert code == 0
    assert "large fits v6e-8: 11.250 GiB to spare" in out
    for told in ("slots", "temporaries", "all-reduce, 4 times", "binds", "0.900 + 0.100 GB"):
        assert told in out


def test_a_plan_that_does_not_fit_ends_with_3_and_the_nearest_change(capsys, plans):
    code, out, _ = run(capsys, plans / "small.yaml")
    assert code == 3
    assert "small does NOT fit v5e-8: 4.250 GiB too much" in out
    assert "nearest change that fits: serve.rows=4" in out
    assert "compiled" in out


def test_overrides_and_another_topology(capsys, plans):
    code, out, _ = run(capsys, plans / "small.yaml", "serve.rows=2", "--topology", "v6e-8", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["topology"], told["needed_bytes"], told["fits"]) == ("v6e-8", 5 * GIB, True)
    code, _, err = run(capsys, plans / "small.yaml", "topology=v5e-8", "--topology", "v6e-8")
    assert code == 2
    assert "the topology is given twice" in err


def test_all_plans_of_a_folder(capsys, plans):
    code, out, _ = run(capsys, plans, "--all", "--json")
    told = json.loads(out)
    assert code == 3
    assert [(one["plan"], one["fits"]) for one in told] == [("large", True), ("small", False)]
    assert told[1]["nearest_change"]["known_by"] == "compiled"
    assert told[1]["nearest_change"]["overrides"] == ["serve.rows=4"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "no plan is named; give a file such as configs/plans/"),
        (["nothing.yaml"], "nothing.yaml: cannot be read"),
        (["nowhere", "--all"], "holds no plans"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, args, told):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *args)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert not out


def test_wrong_names_of_slices_and_a_missing_compiler(capsys, plans, monkeypatch):
    monkeypatch.undo()
    code, _, err = run(capsys, plans / "small.yaml", "--topology", "v5e-17")
    assert code == 2
    assert "the nearest are v5e-4, v5e-8, v5e-16" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, plans / "small.yaml")
    assert code == 2
    assert "pip install 'memjax[tpu]'" in err
