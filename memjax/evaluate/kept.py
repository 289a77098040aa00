"""What an experiment has found out already: JSON values in files that say what they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memjax.ids import canonical_json, text_hash


def kept(path: Path, made_of: Any, make: Callable[[], Any]) -> Any:
    """The JSON value in the file at `path` if it was made of the same, else made now and kept there.

    made_of: all that the value depends on, as JSON. Half a file of an interrupted run is made again.
    """
    made_by = text_hash(canonical_json(made_of))
    if path.exists():
        try:
            held = json.loads(path.read_text())
            if held["made_by"] == made_by:
                return held["value"]
        except (ValueError, KeyError, TypeError):
            pass
    value = make()
    path.write_text(json.dumps({"made_by": made_by, "value": value}, ensure_ascii=False))
    return value
