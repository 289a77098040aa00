"""Configuration: short YAML files into frozen dataclasses, with `key=value` overrides from the command line.

A file names only what differs from the defaults. A key that does not exist, a value of the wrong type and a key given
twice are errors that name the place and, for keys, the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from memjax.errors import ConfigError

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls`: defaults, then the YAML file, then overrides such as `optimizer.warmup=100`.

    Override values are YAML too: `steps=3`, `writers=[tensorboard]`, `clip=null`. Setting one key twice in the file, or
    twice among the overrides, is refused; an override replacing a value of the file is what overrides are for.
    Raises ConfigError.
    """
    values = {} if path is None else read_yaml(path)
    return from_dict(cls, merge_overrides(cls, values, overrides), where="" if path is None else f"{path}: ")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (an empty file is an empty mapping). Raises ConfigError, also for a repeated key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    values = parse_yaml(text, where=str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; write `key: value` lines")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document, safely loaded, repeated keys refused. Raises ConfigError naming `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None


class _Loader(yaml.SafeLoader):
    """The safe loader, except that a repeated key is an error and `1e-3` is a number, as YAML 1.2 has it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text; put it in quotes", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # on this subclass alone
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def merge_overrides(cls: type, values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with each `dotted.key=value` in its place. Raises ConfigError where that cannot be."""
    merged = _copy(values)
    seen: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not key=value")
        for other in seen:
            if key == other or key.startswith(other + ".") or other.startswith(key + "."):
                raise ConfigError(f"{key} is set twice: {seen[other]!r} and {override!r}; keep one")
        seen[key] = override
        _check_key(cls, key)
        *parents, last = key.split(".")
        place = merged
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = parse_yaml(text, where=f"override {override!r}")
    return merged


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _check_key(cls: type, key: str) -> None:
    """Follows a dotted key through nested dataclasses; raises ConfigError at the first part that does not exist."""
    here: Any = cls
    done: list[str] = []
    for part in key.split("."):
        if here is None:
            raise ConfigError(f"{key}: {'.'.join(done)} holds a plain value and has no keys of its own")
        hints = _fields(here)
        if part not in hints:
            raise _unknown(".".join([*done, part]), part, ".".join(done), hints)
        done.append(part)
        here = _dataclass_in(hints[part])


def from_dict(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """An instance of the dataclass `cls` from plain values, every one checked against its annotation.

    Integers are accepted as floats, lists as tuples, mappings as nested dataclasses; nothing else is converted.
    `where` starts every error message. Raises ConfigError; so may `cls.__post_init__`.
    """
    return _build(cls, values, "", where)


def _build(cls: Any, values: Any, key: str, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}{key} is {values!r}; give a mapping of {', '.join(_fields(cls))}")
    hints = _fields(cls)
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in hints:
            raise _unknown(f"{where}{prefix}{name}", name, key, hints)
    given = {name: _convert(hints[name], value, f"{prefix}{name}", where) for name, value in values.items()}
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name in hints
        and f.name not in given
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}{prefix}{missing[0]} has no default; set it")
    try:
        return cls(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or ConfigError."""
    try:
        return _fit(hint, value, key, where)
    except _Mismatch:
        raise ConfigError(f"{where}{key} is {value!r}; give {describe(hint)}") from None


class _Mismatch(Exception):
    """A value does not have the annotated type; turned into a ConfigError where the whole annotation is known."""


def _fit(hint: Any, value: Any, key: str, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        nested: list[Any] = [a for a in args if _is_config(a)]
        if isinstance(value, Mapping) and len(nested) == 1:  # so that its own error, which names the key, is the one shown
            return _build(nested[0], value, key, where)
        for choice in args:
            try:
                return _fit(choice, value, key, where)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is Literal:
        # Type and value: True == 1 must not pass for Literal[1].
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        raise _Mismatch
    if _is_config(hint):
        return value if isinstance(value, hint) else _build(hint, value, key, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _Mismatch
        kinds = [args[0]] * len(value) if args[1:] == (...,) else list(args)
        if len(kinds) != len(value):
            raise _Mismatch
        return tuple(_convert(k, v, f"{key}[{i}]", where) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _Mismatch
        return {k: _convert(args[1], v, f"{key}.{k}", where) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, bool) and hint is not bool:  # bool is a subclass of int
        raise _Mismatch
    if hint is type(None):
        hint = types.NoneType
    if not isinstance(hint, type):
        raise TypeError(f"{key}: config fields annotated {hint!r} are not supported")
    if not isinstance(value, hint):
        raise _Mismatch
    return value


def describe(hint: Any) -> str:
    """An annotation in words, for error messages: "a whole number or null"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args) if len(args) > 1 else repr(args[0])
    if origin is tuple:
        if args[1:] == (...,):
            return f"a list of {describe(args[0]).removeprefix('a ').removeprefix('an ')} items"
        return f"a list of {len(args)} items"
    if _is_config(hint):
        return f"a mapping of {', '.join(_fields(hint))}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
        Path: "a path",
    }
    return words.get(origin or hint, str(hint))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values (dicts, lists, numbers, text, None) for YAML or JSON; `from_dict` reads it back."""
    return {name: _plain(getattr(config, name)) for name in _fields(type(config))}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def dump_yaml(config: Any) -> str:
    """A config as YAML text, fields in their order, for a run's record."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _fields(cls: type) -> dict[str, Any]:
    """Name → resolved annotation of the fields a config file may set."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in an annotation such as `Mesh` or `Mesh | None`."""
    return next((h for h in (hint, *typing.get_args(hint)) if _is_config(h)), None)


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _unknown(shown: str, name: str, parent: str, hints: Mapping[str, Any]) -> ConfigError:
    prefix = f"{parent}." if parent else ""
    near = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)  # some key is always nearest
    return ConfigError(f"{shown} is not a key; the nearest is {prefix}{near[0]}" if near else f"{shown} is not a key")
