"""Configuration: what is given is checked to the last leaf, and every mistake is named with the nearest way out."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from memjax.config import dump_yaml, from_dict, load_config, parse_yaml, to_dict
from memjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    kind: Literal["cosine", "wsd"] = "cosine"
    clip: float | None = 1.0
    pair: tuple[int, str] = (1, "a")


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int = 10
    name: str = "x"
    live: bool = False
    inner: Inner = Inner()
    maybe: Inner | None = None
    tags: tuple[str, ...] = ()
    layers: tuple[Inner, ...] = ()
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    free: Any = None
    derived: int = dataclasses.field(init=False, default=3)

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError(f"steps is {self.steps}; give at least 0")


@dataclasses.dataclass(frozen=True)
class Needs:
    source: str
    count: int = 1


def load(text="", *overrides, cls=Outer):
    return from_dict(cls, parse_yaml(text, "t") or {}) if not overrides else load_config(cls, None, overrides)


def test_defaults_file_and_overrides_in_this_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("# memjax train x\nsteps: 5\ninner:\n  rate: 1e-2\n  kind: wsd\n")
    config = load_config(Outer, file, ["inner.rate=3", "maybe.clip=null", "tags=[a, b]", "name=tiny base"])
    assert config == Outer(
        steps=5, name="tiny base", inner=Inner(rate=3.0, kind="wsd"), maybe=Inner(clip=None), tags=("a", "b")
    )
    assert isinstance(config.inner.rate, float)
    assert load_config(Outer) == Outer()
    file.write_text("")
    assert load_config(Outer, file) == Outer()


def test_nested_values_of_every_kind():
    config = load(
        "layers: [{rate: 2}, {kind: wsd}]\nsizes: {a: 1}\npath: some/where\nfree: [1, {b: 2}]\nlive: true\nmaybe: null"
    )
    assert config.layers == (Inner(rate=2.0), Inner(kind="wsd"))
    assert config.sizes == {"a": 1}
    assert config.path == Path("some/where")
    assert config.free == [1, {"b": 2}]
    assert config.live is True
    assert load("inner: {pair: [4, z]}").inner.pair == (4, "z")


def test_round_trip():
    config = Outer(
        steps=2, maybe=Inner(clip=None), layers=(Inner(rate=1e-5),), sizes={"q": 3}, path=Path("a/b"), tags=("t",)
    )
    assert from_dict(Outer, to_dict(config)) == config
    assert from_dict(Outer, parse_yaml(dump_yaml(config), "t")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setps: 3", r"setps is not a key; the nearest is steps"),
        ("inner: {rat: 3}", r"inner.rat is not a key; the nearest is inner.rate"),
        ("maybe: {klip: 3}", r"maybe.klip is not a key; the nearest is maybe.clip"),
        ("layers: [{}, {knd: wsd}]", r"layers\[1\].knd is not a key; the nearest is layers\[1\].kind"),
        ("derived: 4", r"derived is not a key"),
        ("steps: 3.5", r"steps is 3.5; give a whole number"),
        ("steps: '3'", r"steps is '3'; give a whole number"),
        ("steps: true", r"steps is True; give a whole number"),
        ("steps: null", r"steps is None; give a whole number"),
        ("name: 3", r"name is 3; give text"),
        ("live: 1", r"live is 1; give true or false"),
        ("inner: {rate: fast}", r"inner.rate is 'fast'; give a number"),
        ("inner: {rate: '1'}", r"inner.rate is '1'; give a number"),
        ("inner: {rate: true}", r"inner.rate is True; give a number"),
        ("inner: {kind: cosin}", r"inner.kind is 'cosin'; give one of cosine, wsd"),
        ("inner: {clip: high}", r"inner.clip is 'high'; give a number or null"),
        ("inner: {pair: [1]}", r"inner.pair is \[1\]; give a list of 2 items"),
        ("inner: {pair: [a, b]}", r"inner.pair\[0\] is 'a'; give a whole number"),
        ("tags: a", r"tags is 'a'; give a list"),
        ("tags: [a, 2]", r"tags\[1\] is 2; give text"),
        ("inner: 3", r"inner is 3; give a mapping of rate, kind, clip, pair"),
        ("sizes: {a: b}", r"sizes.a is 'b'; give a whole number"),
        ("steps: -1", r"steps is -1; give at least 0"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{file}: {message}") as error:
        load_config(Outer, file)
    assert "\n" not in str(error.value)


def test_nothing_is_set_twice(tmp_path):
    file = tmp_path / "c.yaml"
    for text, line in (("steps: 1\nname: x\nsteps: 2", 3), ("inner:\n  rate: 1\n  rate: 1", 3)):
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"line {line}: key .* is given twice"):
            load_config(Outer, file)
    for overrides in (["steps=1", "steps=1"], ["inner={rate: 1}", "inner.rate=2"], ["inner.rate=2", "inner={}"]):
        with pytest.raises(ConfigError, match="is set twice"):
            load_config(Outer, None, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' is not key=value"),
        ("=3", "is not key=value"),
        ("inner.rte=3", "inner.rte is not a key; the nearest is inner.rate"),
        ("iner.rate=3", "iner is not a key; the nearest is inner"),
        ("steps.more=3", "steps.more: steps holds a plain value and has no keys of its own"),
        ("steps=[1", "override 'steps=\\[1'"),
        ("steps=two", "steps is 'two'; give a whole number"),
    ],
)
def test_bad_overrides_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, [override])


def test_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Outer, file)
    for content, message in (
        (b"- a\n- b", "holds a list"),
        (b"a: [1", "line 1"),
        (b"\xff\xfe\xff", "is not UTF-8"),
        (b"3: x", "key 3 is not text"),
        (b"x: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_config(Outer, file)


def test_fields_without_default_must_be_set():
    with pytest.raises(ConfigError, match="source has no default; set it"):
        load_config(Needs)
    assert load_config(Needs, None, ["source=x"]) == Needs("x")


def test_overrides_of_open_mappings_and_lists():
    assert load_config(Outer, None, ["sizes={a: 1, b: 2}"]).sizes == {"a": 1, "b": 2}
    assert load_config(Outer, None, ["inner.pair=[2, b]"]).inner.pair == (2, "b")
