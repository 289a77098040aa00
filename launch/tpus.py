"""The names of TPU slices, and what Cloud TPU and GKE call the same thing.

A name is a generation and a size as Cloud TPU counts it (v5e-16, v6e-8: chips; v4-32, v5p-64, tpu7x-8: TensorCores, two to
a chip), or a generation and a shape in chips (v5p-4x4x12). Tables: cloud.google.com/tpu/docs/runtimes and
cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

from __future__ import annotations

import dataclasses
import math
import re

from launch.common import LaunchError


@dataclasses.dataclass(frozen=True)
class Generation:
    """accelerator: the first part of Cloud TPU's accelerator types; runtime: the software version with Ubuntu and no
    framework ("" where there are no queued resources); label: GKE's node label; cores: counted per chip in names."""

    accelerator: str
    runtime: str
    label: str
    cores: int
    dimensions: int


GENERATIONS = {
    "v4": Generation("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", 2, 3),
    "v5e": Generation("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 1, 2),
    "v5p": Generation("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", 2, 3),
    "v6e": Generation("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", 1, 2),
    "tpu7x": Generation("tpu7x", "", "tpu7x", 2, 3),
}
# Chips -> shape, where one shape is the usual one.
_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {
        4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
        1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
    },
}  # fmt: skip
CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice: its Cloud TPU accelerator type, software version, GKE labels, and how many hosts with how many chips."""

    accelerator_type: str
    runtime: str
    gke_accelerator: str
    topology: str
    chips: int

    @property
    def chips_per_host(self) -> int:
        """Chips on each host, as GKE's 1t and 4t machine types have them."""
        return min(self.chips, CHIPS_PER_HOST)

    @property
    def hosts(self) -> int:
        """Hosts of the slice on GKE."""
        return self.chips // self.chips_per_host


def parse(name: str) -> Slice:
    """The slice of a name such as v5e-16, v5litepod-16, v5p-64 or v5p-4x4x12; LaunchError where there is no such thing."""
    generation, _, size = name.partition("-")
    aliases = {g.accelerator: key for key, g in GENERATIONS.items()}
    known = GENERATIONS.get(aliases.get(generation, generation))
    if known is None:
        raise LaunchError(f"--tpu {name!r}: unknown generation; use one of {', '.join(GENERATIONS)}, as in v5e-16")
    shapes = _SHAPES[known.dimensions]
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        shape = size
        if shape.count("x") + 1 != known.dimensions:
            raise LaunchError(f"--tpu {name!r}: {generation} has {known.dimensions} dimensions, as in {shapes[16]}")
        chips = math.prod(map(int, shape.split("x")))
        if chips > CHIPS_PER_HOST and chips % CHIPS_PER_HOST:
            raise LaunchError(f"--tpu {name!r}: {chips} chips do not fill hosts of {CHIPS_PER_HOST}")
    elif re.fullmatch(r"[1-9]\d*", size) and int(size) % known.cores == 0 and int(size) // known.cores in shapes:
        chips = int(size) // known.cores
        shape = shapes[chips]
    else:
        sizes = ", ".join(str(chips * known.cores) for chips in shapes)
        raise LaunchError(f"--tpu {name!r}: no usual size; use {generation}-N with N of {sizes}, or a shape: {shapes[16]}")
    accelerator_type = f"{known.accelerator}-{chips * known.cores}"
    return Slice(accelerator_type, known.runtime, known.label, shape, chips)
