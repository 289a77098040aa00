"""Results: flat numbers with intervals, one file or none, tables and pictures."""

import json

import numpy as np
import pytest
from rich.console import Console

from memjax.errors import DataError
from memjax.evaluate import report
from tests.support import small_base


def test_one_seed_gives_an_interval_over_items_and_several_over_seeds():
    items = report.summarize([{"a": [1.0] * 90 + [0.0] * 10, "b": [1.0]}])
    assert (items["a"], items["a_items"], items["b_low"]) == (0.9, 100, 1.0)
    assert 0.8 < items["a_low"] < 0.87 < 0.93 < items["a_high"] < 0.98
    seeds = report.summarize([{"a": [1.0, 0.6]}, {"a": [0.9]}, {"a": [1.0]}])
    half = 4.303 * 0.1 / 3**0.5
    assert [seeds[key] for key in ("a", "a_low", "a_high", "a_items")] == pytest.approx([0.9, 0.9 - half, 0.9 + half, 4])
    with pytest.raises(DataError, match="a: a seed has no items"):
        report.summarize([{"a": [1.0]}, {"a": []}])


def test_the_file_holds_numbers_and_setting_and_nothing_is_left_of_a_failure(tmp_path):
    base = small_base(5)
    told = report.setting(base, seeds=(0, 1), limit=None)
    path = report.write_result(tmp_path / "new" / "out", {"a": np.float32(0.5), "n": 3}, told | {"tasks": ("x",)})
    value = json.loads(path.read_text())
    assert (value["a"], value["n"]) == (0.5, 3)
    assert value["setting"]["base_id"] == base.id
    assert value["setting"]["seeds"] == [0, 1]
    assert {"memjax", "python", "jax", "flax", "numpy"} <= set(value["setting"]["versions"])
    assert "cpu" in value["setting"]["hardware"]
    for wrong in ({"a": float("nan")}, {"setting": 1.0}):
        with pytest.raises(DataError, match="nothing is written"):
            report.write_result(path.parent, wrong, {})
    assert json.loads(path.read_text()) == value
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_tables_show_what_there_is():
    numbers = report.summarize([{"em/one": [1.0, 0.0], "em/two": [1.0], "f1/one": [0.5]}])
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.score_table("title", numbers, ("em", "f1", "none"), ("one", "two")))
    shown = console.export_text()
    assert "0.500 (0.000 … 1.000)" in shown
    assert "1.000" in shown
    assert "none" not in shown


def test_a_table_of_many_columns_is_printed_on_its_side():
    ways = [f"way_{i}" for i in range(8)]
    numbers = report.summarize([{f"em/{way}": [float(i % 2), 0.0] for i, way in enumerate(ways)}])
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.score_table("title", numbers, ("em", "none"), ways))
    shown = console.export_text()
    assert all(way in shown for way in ways)
    assert "0.500 (0.000 … 1.000)" in shown
    assert "none" not in shown
    assert "items" in shown


def test_pictures_are_written(tmp_path):
    wide = report.heat_map(tmp_path / "w.png", {str(i): np.eye(2) for i in range(4)}, ["0", "1"], ["32", "64"])
    assert wide.stat().st_size > 1000  # more panels than stand beside one another
    heat = report.heat_map(tmp_path / "a.png", {"x": np.eye(2), "y": np.zeros((2, 2))}, ["0", "1"], ["32", "64"])
    numbers = report.summarize([{"a/x": [1.0, 0.0], "a/y": [0.5], "b/x": [0.0], "b/y": [1.0]}])
    bars = report.bars(tmp_path / "b.png", numbers, ["a", "b"], ["x", "y"], "title")
    for path in (heat, bars):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 3000
