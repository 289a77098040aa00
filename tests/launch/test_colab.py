"""The notebooks run, top to bottom, on the tiny base; and hold what a notebook of ours must hold."""

import json
import os
import re
import subprocess
import sys

import pytest

from launch.ship import ROOT
from tests.launch.notebook import code_cells, with_outputs

NOTEBOOKS = sorted((ROOT / "launch/colab").glob("*.ipynb"))
# Much of the time is compiling; at these sizes fast programs are of no use.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def read(path):
    return json.loads(path.read_text("utf-8"))


def source(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_badge_install_cell_and_outputs(path):
    notebook = read(path)
    badge = f"https://colab.research.google.com/github/memjax/memjax/blob/main/{path.relative_to(ROOT)}"
    assert badge in source(notebook["cells"][0])
    install, *cells = code_cells(notebook)
    assert 'find_spec("memjax") is None' in source(install)
    assert "SOURCE" in source(install)
    assert [cell["execution_count"] for cell in code_cells(notebook)] == list(range(1, len(cells) + 2))
    drawn = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "display_data"]
    assert drawn, "save a run with a picture: python -m tests.launch.notebook PATH --save"
    assert not any(line.startswith(("%", "!")) for cell in cells for line in source(cell).splitlines())


def run(name, tmp_path):
    """What each cell of a notebook printed and drew, on the tiny base at tiny sizes."""
    sizes = {"MEMJAX_BASE": "tiny", "MEMJAX_EFFORT": "fast", "MEMJAX_CHECK": "1"}
    # jax's devices of this run (conftest), so that what is restored is divided among several.
    env = {**os.environ, **sizes, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {QUICK}", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.launch.notebook", f"launch/colab/{name}.ipynb"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    install, devices, *cells = json.loads(done.stdout)
    assert install["text"] == ""
    assert devices["text"].startswith("base tiny on 8 x cpu")
    return cells


def test_write_and_ask(tmp_path):
    text, before, written, asked, gate, forgotten, restored = run("write_and_ask", tmp_path)
    assert len(text["text"].split()) > 50
    assert len(before["text"].splitlines()) == 3
    assert " tokens written in " in written["text"]
    rows = asked["text"].splitlines()[1:]
    assert len(rows) > 3
    assert all(" note " in row or " the base " in row for row in rows)
    assert gate["pictures"] == 1
    assert forgotten["text"] == "3 of 3 answers are those from before the text was written\n"
    # The weight is split over the devices by its width; a bias has none.
    assert [line.split() for line in restored["text"].splitlines()] == [
        ["layers/q", "(1,", "256,", "64)", "(1,", "32,", "64)", "on", "each", "of", "8"],
        ["layers/q_bias", "(1,", "64)", "(1,", "64)", "on", "each", "of", "8"],
    ]


def test_compile_a_long_text(tmp_path):
    text, prompted, written, asked, picture = run("compile_a_long_text", tmp_path)
    tokens = int(text["text"].split()[0])
    ways = prompted["text"].splitlines()
    assert [line.split()[0] for line in ways] == ["nothing", "its", "all"]
    assert all(line.endswith("of 3 right") for line in ways)
    slots = int(re.search(r"compiled into (\d+) slots in", written["text"])[1])
    assert tokens / 8 <= slots <= tokens / 8 + 2
    assert asked["text"].splitlines()[-1].endswith("of 3 right behind the slots")
    assert picture["pictures"] == 1
    assert re.fullmatch(r"first token: \d+ ms behind the slots, \d+ ms with the text; .*\n", picture["text"])


def test_long_text_under_a_budget(tmp_path):
    text, asked, policies, picture = run("long_text_under_a_budget", tmp_path)
    tokens = int(text["text"].split()[0])
    everything, less = (re.search(r"(\d+) of (\d+) tokens in", line) for line in asked["text"].splitlines()[-2:])
    assert everything[1] == everything[2]
    assert int(less[1]) == tokens // 4
    assert re.fullmatch(r"snapkv +\d+%", policies["text"].splitlines()[1])
    assert picture["pictures"] == 1


def test_a_long_text_in_one_pass(tmp_path):
    text, one_pass, found, picture = run("a_long_text_in_one_pass", tmp_path)
    tokens = int(text["text"].split()[0])
    assert 600 < tokens <= 700  # more than the base's window
    number = re.search(r"number is (\d{4})\.", text["text"])[1]
    assert f"the number is {number}; with the adapter '{number}'" in one_pass["text"]
    assert f"the base alone '{number}'" not in one_pass["text"]
    assert [line.split(":")[1] for line in found["text"].splitlines()] == [" 2 of 2 right"] * 2
    assert picture["pictures"] == 1


def test_outputs_are_saved_like_jupyter_does():
    cells = [{"cell_type": "markdown"}, {"cell_type": "code", "source": [], "outputs": [1], "execution_count": None}]
    saved = with_outputs({"cells": cells}, [("a\nb\n", [b"png"])])["cells"][1]
    assert saved["execution_count"] == 1
    assert saved["outputs"] == [
        {"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n"]},
        {"data": {"image/png": "cG5n\n"}, "metadata": {}, "output_type": "display_data"},
    ]
