"""Which implementation of the kernels runs: an argument of every call, resolved while a program is traced."""

from __future__ import annotations

import jax

KERNELS = ("auto", "xla", "pallas", "interpret")
LONGEST = 128  # query tokens of a row that a kernel takes; longer blocks are bound by arithmetic, as XLA's matmuls are


def chosen(kernels: str, length: int = 1) -> str:
    """`xla`, `pallas` or `interpret` for one of `KERNELS` and `length` tokens of a row; ValueError for another name.

    auto: Pallas where the default backend is a TPU and rows are short; XLA everywhere else. The compiler cannot partition
    Mosaic kernels, so on a mesh they are called within `jax.shard_map`, on each device's share; where JAX's explicit kind
    of axes is in force, the caller states shardings itself, and it is XLA. pallas: the kernels, also for chips that are
    only described (ahead of time). interpret: the kernels in TPU interpret mode, on any backend. A case that a kernel
    does not cover is XLA's whatever is asked for.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}; use one of {', '.join(KERNELS)}")
    if kernels != "auto":
        return kernels
    return "pallas" if jax.default_backend() == "tpu" and length <= LONGEST and not _explicit() else "xla"


def _explicit() -> bool:
    return jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
