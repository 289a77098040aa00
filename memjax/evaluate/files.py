"""Data files of evaluations: JSON and JSON lines, and fields whose absence or wrong type is named with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memjax.errors import DataError

KINDS: dict[str, tuple[type, ...]] = {
    "a text": (str,),
    "a number": (int, float),
    "true or false": (bool,),
    "a list": (list,),
    "an object": (dict,),
}


def read_file(path: str | Path) -> str:
    """The text of a file; DataError where it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}); convert it, for example with iconv") from None


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; DataError names file and line."""
    try:
        return json.loads(read_file(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None


def read_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a JSON-lines file; blank lines are skipped. DataError names file and line."""
    for number, line in enumerate(read_file(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: is not JSON ({error.msg}); write one JSON object per line") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: is {_kind_of(record)}; write one JSON object per line")
        yield where, record


def field(record: Any, key: str, kind: str, where: str) -> Any:
    """`record[key]`, which must be of a kind of `KINDS`; DataError names place and field."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: must be an object with the field {key!r}, but is {_kind_of(record)}")
    if key not in record:
        raise DataError(f"{where}: the field {key!r} is missing; it must be {kind}")
    value = record[key]
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind == "a number"):
        raise DataError(f"{where}: the field {key!r} must be {kind}, but is {_kind_of(value)}")
    return value


def texts(record: Any, key: str, where: str) -> list[str]:
    """`record[key]`, which must be a list of texts; DataError names place and field."""
    values = field(record, key, "a list", where)
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{where}: the field {key!r}[{index}] must be a text, but is {_kind_of(value)}")
    return values


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    return next((name for name, types in KINDS.items() if isinstance(value, types)), type(value).__name__)
