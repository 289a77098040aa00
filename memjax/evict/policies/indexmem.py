"""Policies that remember: what they evict goes into a latent memory, which later tokens read (arXiv 2605.25475)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from memjax.evict.policies.indexer import Indexer
from memjax.evict.policies.snapkv import SnapKV


@dataclasses.dataclass(frozen=True)
class IndexMem(Indexer):
    """The indexer's choice, and a latent memory of the rest: IndexMem whole."""

    name: ClassVar[str] = "indexmem"
    remembers: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class SnapKVLatent(SnapKV):
    """SnapKV's choice, and a latent memory of the rest."""

    name: ClassVar[str] = "snapkv+latent"
    remembers: ClassVar[bool] = True
