"""Where the slots of a buffer lie among the positions of what is read: three layouts, chosen when a buffer is written."""

from __future__ import annotations

from typing import Literal

import numpy as np

from memjax.errors import ArtefactError

Layout = Literal["in_place", "compact", "spread"]
LAYOUTS: tuple[Layout, ...] = ("in_place", "compact", "spread")


def places(slots: int, header: int, context: int, layout: str) -> tuple[np.ndarray, int]:
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
