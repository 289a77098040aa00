"""A buffer: a few key/value slots per layer that stand for a long context and are read by the untouched base.

Keys are kept as they are before rotary embedding (after a key norm, where the family has one), so where the slots lie is
decided when they are read (arXiv 2602.21221; the layouts are choices of ours, for the paper does not tell).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import numpy as np

from memjax.errors import ArtefactError

Layout = Literal["in_place", "compact", "spread"]
LAYOUTS: tuple[Layout, ...] = ("in_place", "compact", "spread")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffer:
    """The slots that stand for a context.

    k (after a key norm, before RoPE), v [L, M, K, H]; header: tokens of the prompt before the context, which the base
    reads itself; context: tokens that the slots stand for; layout: where they lie when read, as while they were written.

        in_place: behind the context's own places, header + context + (0 ... M - 1)
        compact: right behind the header, header + (0 ... M - 1)
        spread: each at the end of its share of the context's places
    """

    k: jax.Array
    v: jax.Array
    header: int = dataclasses.field(metadata={"static": True})
    context: int = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(default="in_place", metadata={"static": True})

    @property
    def slots(self) -> int:
        """M."""
        return self.k.shape[1]


def places(slots: int, header: int, context: int, layout: Layout) -> tuple[np.ndarray, int]:
    """(positions int32 [M] of the slots, position of the first token that is read after them).

    ArtefactError for an unknown layout, or more slots to spread than there are places.
    """
    if layout == "in_place":
        return header + context + np.arange(slots, dtype=np.int32), header + context + slots
    if layout == "compact":
        return header + np.arange(slots, dtype=np.int32), header + slots
    if layout != "spread":
        raise ArtefactError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    if slots > context:
        raise ArtefactError(f"{slots} slots cannot be spread over {context} places; use the layout in_place or compact")
    ends = (np.arange(1, slots + 1) * context) // slots
    return (header + ends - 1).astype(np.int32), header + context
