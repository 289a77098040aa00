"""TPU slices by the names that people use, and what a chip of each generation can hold and move.

A name is a generation and a size as Cloud TPU counts it (v5e-16, v6e-8: chips; v4-32, v5p-64, tpu7x-8: TensorCores, two
to a chip), or a generation and a shape in chips (v5p-4x4x12). `launch/tpus.py`, which runs without memjax, knows the same
names; a test holds the two together.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

from memjax.errors import ConfigError

GIB = 1024**3
CHIPS_PER_HOST = 4
# libtpu wants to know on which kind of host it runs, and would ask a metadata server that is not there.
_HOST = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one chip of a generation has, and how JAX sees it.

    cores: counted per chip in names; dimensions of the torus; devices: JAX devices per chip; hbm: bytes per device that
    the compiler gives to a program (the runtime keeps a little); flops: peak bf16 FLOP/s of a chip; hbm_bandwidth,
    ici_bandwidth: bytes/s of a chip, the latter in one direction over all its links; options of jax's description.
    """

    cores: int
    dimensions: int
    devices: int
    hbm: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    options: tuple[tuple[str, Any], ...] = ()


# Peak and bandwidths: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "key specifications", per chip, as of 2026;
# interconnect is half of what is told there as "bidirectional ICI bandwidth" (v4: its 2,400 Gbit/s). HBM (told there: 32,
# 16, 95, 32 and 192 GB): what libtpu 0.0.42.1 names as available when it refuses a program that is too large. v4 is one
# device per chip in the compiler's megacore mode, as v5p is without being asked; tpu7x has two devices to a chip.
GENERATIONS = {
    "v4": Generation(2, 3, 1, 30.75 * GIB, 275e12, 1228e9, 300e9, (("chip_config_name", "megacore"),)),
    "v5e": Generation(1, 2, 1, 15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Generation(2, 3, 1, 95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Generation(1, 2, 1, 31.25 * GIB, 918e12, 1638e9, 400e9),
    "tpu7x": Generation(2, 3, 2, 94.75 * GIB, 2307e12, 7380e9, 600e9),
}
_ALIASES = {"v5litepod": "v5e"}
# Chips -> shape, where one shape is the usual one.
_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {
        4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
        1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
    },
}  # fmt: skip
# The largest slice of a generation with two dimensions is its pod.
_POD_2D = 256


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its name, the generation, its shape in chips."""

    name: str
    generation: str
    shape: str

    @property
    def chip(self) -> Generation:
        """What a chip of it has."""
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def devices(self) -> int:
        """JAX devices of the slice: what a mesh is made of."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Hosts of the slice, four chips to each."""
        return -(-self.chips // CHIPS_PER_HOST)

    def description(self) -> tuple[str, dict[str, Any]]:
        """(topology name, options) for `jax.experimental.topologies.get_topology_desc`."""
        options = dict(self.chip.options)
        if self.chips < CHIPS_PER_HOST:
            options["chips_per_host_bounds"] = (*map(int, self.shape.split("x")), *[1] * (3 - self.chip.dimensions))
        return f"{self.generation}:{self.shape}", options


def parse_topology(name: str) -> Topology:
    """The slice of a name such as v5e-16, v5litepod-16, v5p-64 or v5p-4x4x12; ConfigError with the nearest valid ones."""
    told, _, size = name.strip().lower().partition("-")
    generation = _ALIASES.get(told, told)
    if generation not in GENERATIONS:
        near = difflib.get_close_matches(told, GENERATIONS, n=2, cutoff=0.0)
        raise ConfigError(
            f"topology {name!r}: generation {told!r} is unknown; the nearest are {' and '.join(near)}, as in v5e-16"
        )
    known = GENERATIONS[generation]
    shapes = _SHAPES[known.dimensions]
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        return Topology(name, generation, _checked_shape(name, generation, size))
    if re.fullmatch(r"[1-9]\d*", size) and int(size) % known.cores == 0 and int(size) // known.cores in shapes:
        return Topology(name, generation, shapes[int(size) // known.cores])
    sizes = [chips * known.cores for chips in shapes]
    wanted = int(size) if size.isdigit() else 0
    near_sizes = sorted(sorted(sizes, key=lambda n: abs(n - wanted))[:3]) if wanted else sizes[:4]
    counted = "TensorCores, two to a chip" if known.cores == 2 else "chips"
    raise ConfigError(
        f"topology {name!r}: no usual size; the nearest are {', '.join(f'{generation}-{n}' for n in near_sizes)} "
        f"({counted}), or give a shape in chips such as {generation}-{shapes[16]}"
    )


def _checked_shape(name: str, generation: str, shape: str) -> str:
    known, sides = GENERATIONS[generation], [int(side) for side in shape.split("x")]
    usual = _SHAPES[known.dimensions][16]
    if len(sides) != known.dimensions:
        raise ConfigError(f"topology {name!r}: {generation} has {known.dimensions} dimensions, as in {generation}-{usual}")
    chips = math.prod(sides)
    # Hosts are 2 x 2 chips: a side of 1 or an odd one cuts them.
    if chips >= CHIPS_PER_HOST and (sides[0] % 2 or sides[1] % 2):
        raise ConfigError(f"topology {name!r}: hosts of 2x2 chips do not fill {shape}; use {generation}-{usual}")
    if chips < CHIPS_PER_HOST and chips not in _SHAPES[known.dimensions]:
        raise ConfigError(f"topology {name!r}: no slice has {chips} chips; the smallest is {generation}-{_least(known)}")
    if known.dimensions == 2 and chips > _POD_2D:
        raise ConfigError(f"topology {name!r}: a pod of {generation} has {_POD_2D} chips; use at most {generation}-16x16")
    return shape


def _least(known: Generation) -> int:
    return min(_SHAPES[known.dimensions]) * known.cores


def next_larger(topology: Topology) -> Topology | None:
    """The usual slice of the same generation with the next number of chips; None where there is none."""
    known = topology.chip
    larger = [chips for chips in _SHAPES[known.dimensions] if chips > topology.chips]
    return parse_topology(f"{topology.generation}-{min(larger) * known.cores}") if larger else None


def described_devices(topology: Topology) -> list[Any]:
    """The slice's devices as descriptions to compile for; ConfigError where libtpu is not installed or does not know it.

    libtpu keeps one process at a time: another that compiles or holds a TPU makes this fail.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("the TPU's compiler, libtpu, is not installed; install it: pip install 'memjax[tpu]'")
    for name, value in _HOST.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    name, options = topology.description()
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:  # jaxlib's own class, which has moved between versions
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"libtpu does not take {topology.name} ({name}): {first}") from error
