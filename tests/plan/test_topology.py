"""Names of slices for plans, the same names as the launchers', and the nearest valid ones of wrong names."""

import math

import pytest

from launch import tpus
from memjax.errors import ConfigError
from memjax.plan.topology import CHIPS_PER_HOST, GENERATIONS, described_devices, next_larger, parse_topology


@pytest.mark.parametrize(
    ("name", "shape", "chips", "hosts", "devices"),
    [
        ("v5e-16", "4x4", 16, 4, 16),
        ("v5litepod-16", "4x4", 16, 4, 16),
        ("v5e-1", "1x1", 1, 1, 1),
        ("v6e-8", "2x4", 8, 2, 8),
        ("v4-32", "2x2x4", 16, 4, 16),
        ("v5p-64", "2x4x4", 32, 8, 32),
        ("v5p-4x4x12", "4x4x12", 192, 48, 192),
        ("tpu7x-8", "2x2x1", 4, 1, 8),
    ],
)
def test_names(name, shape, chips, hosts, devices):
    found = parse_topology(name)
    assert (found.shape, found.chips, found.hosts, found.devices) == (shape, chips, hosts, devices)


def test_the_launchers_know_the_same_names():
    assert set(GENERATIONS) == set(tpus.GENERATIONS)
    for generation, known in GENERATIONS.items():
        theirs = tpus.GENERATIONS[generation]
        assert (known.cores, known.dimensions) == (theirs.cores, theirs.dimensions)
        for chips in (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
            name = f"{generation}-{chips * known.cores}"
            try:
                wanted = tpus.parse(name)
            except tpus.LaunchError:
                with pytest.raises(ConfigError):
                    parse_topology(name)
                continue
            found = parse_topology(name)
            assert (found.shape, found.chips, found.hosts) == (wanted.topology, wanted.chips, wanted.hosts)
            assert math.prod(map(int, found.shape.split("x"))) == chips
    assert tpus.CHIPS_PER_HOST == CHIPS_PER_HOST


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("h100-8", "generation 'h100' is unknown; the nearest are v6e and v5p"),
        ("v5f-8", "the nearest are v5p and v5e"),
        ("v5e", "the nearest are v5e-1, v5e-4, v5e-8, v5e-16"),
        ("v5e-17", "the nearest are v5e-4, v5e-8, v5e-16"),
        ("v5p-7", r"the nearest are v5p-8, v5p-16, v5p-32 \(TensorCores, two to a chip\)"),
        ("v5e-4x4x4", "2 dimensions, as in v5e-4x4"),
        ("v5p-1x4x4", "hosts of 2x2 chips do not fill 1x4x4"),
        ("v6e-32x32", "a pod of v6e has 256 chips"),
        ("v5e-1x2", "no slice has 2 chips; the smallest is v5e-1"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(name, told):
    with pytest.raises(ConfigError, match=told):
        parse_topology(name)


def test_what_jax_is_told():
    assert parse_topology("v5e-16").description() == ("v5e:4x4", {})
    assert parse_topology("v4-8").description() == ("v4:2x2x1", {"chip_config_name": "megacore"})
    assert parse_topology("v6e-1").description() == ("v6e:1x1", {"chips_per_host_bounds": (1, 1, 1)})


def test_the_next_larger_slice():
    assert next_larger(parse_topology("v5e-16")).name == "v5e-32"
    assert next_larger(parse_topology("v5p-64")).name == "v5p-128"
    assert next_larger(parse_topology("v5e-256")) is None


def test_without_the_compiler_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'memjax\[tpu\]'"):
        described_devices(parse_topology("v5e-16"))
