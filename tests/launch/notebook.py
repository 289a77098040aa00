"""Runs a notebook's code cells, top to bottom, in this process, and says what each printed and drew.

    python -m tests.launch.notebook launch/colab/write_and_ask.ipynb [--save]

--save writes what was printed and drawn into the notebook, as Jupyter would. Without it one JSON object is printed: a list
of {"text": ..., "pictures": ...} per code cell. Cells are plain Python: no shell lines, no magics.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that hold code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: dict[str, Any]) -> list[tuple[str, list[bytes]]]:
    """(text, PNG pictures) of each code cell, run in one fresh namespace."""
    from matplotlib import pyplot

    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        began, worked = time.perf_counter(), time.process_time()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("".join(cell["source"]), f"<cell {number}>", "exec"), names)
        pictures = []
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            png = io.BytesIO()
            figure.savefig(png, dpi=90, bbox_inches="tight")
            pictures.append(png.getvalue())
        pyplot.close("all")
        found.append((said.getvalue(), pictures))
        took = f"{time.perf_counter() - began:.1f} s, {time.process_time() - worked:.1f} s of a core"
        print(f"cell {number}: {took}", file=sys.stderr, flush=True)
    return found


def with_outputs(notebook: dict[str, Any], found: list[tuple[str, list[bytes]]]) -> dict[str, Any]:
    """The notebook with these outputs in its cells."""
    for number, (cell, (text, pictures)) in enumerate(zip(code_cells(notebook), found, strict=True), start=1):
        cell["execution_count"] = number
        cell["outputs"] = []
        if text:
            lines = text.splitlines(keepends=True)
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": lines})
        for png in pictures:
            data = {"image/png": base64.b64encode(png).decode() + "\n"}
            cell["outputs"].append({"data": data, "metadata": {}, "output_type": "display_data"})
    return notebook


def main(arguments: list[str]) -> None:
    """Runs the notebook named first."""
    path = Path(arguments[0])
    notebook = json.loads(path.read_text("utf-8"))
    found = outputs(notebook)
    if "--save" in arguments:
        path.write_text(json.dumps(with_outputs(notebook, found), indent=1, ensure_ascii=False) + "\n", "utf-8")
    else:
        print(json.dumps([{"text": text, "pictures": len(pictures)} for text, pictures in found]))


if __name__ == "__main__":
    main(sys.argv[1:])
