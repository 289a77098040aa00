"""A buffer: a few key/value slots per layer that stand for a long context and are read by the untouched base.

Keys are kept as they are before rotary embedding (after a key norm, where the family has one), so where the slots lie is
decided when they are read (arXiv 2602.21221; the layouts are choices of ours, for the paper does not tell).
"""

from __future__ import annotations

import dataclasses

import jax

from memjax.memory.layout import Layout


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
