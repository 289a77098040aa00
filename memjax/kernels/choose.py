"""Which implementation of the kernels runs: an argument of every call, resolved while a program is traced."""

from __future__ import annotations

import jax

KERNELS = ("auto", "xla", "pallas", "interpret")


def chosen(kernels: str) -> str:
    """`xla`, `pallas` or `interpret` for one of `KERNELS`; ValueError for another name.

    auto: Pallas where the default backend is a TPU and the arrays lie on one chip, or on this chip's share of them inside
    `jax.shard_map`; XLA everywhere else (Mosaic kernels cannot be partitioned by the compiler). pallas: the kernels, also
    for a chip that is only described (ahead of time) or where the caller knows that nothing is partitioned. interpret:
    the kernels in TPU interpret mode, on any backend. A case that a kernel does not cover is XLA's whatever is asked for.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}; use one of {', '.join(KERNELS)}")
    if kernels != "auto":
        return kernels
    return "pallas" if jax.default_backend() == "tpu" and _local() else "xla"


def _local() -> bool:
    """Whether arrays that are traced now lie on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or set(mesh.axis_types) == {jax.sharding.AxisType.Manual}
