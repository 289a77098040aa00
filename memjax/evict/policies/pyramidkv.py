"""PyramidKV: SnapKV's scores, larger budgets in lower layers (arXiv 2406.02069)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from memjax.evict.policies.snapkv import SnapKV


@dataclasses.dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall linearly from the first layer to the last; `beta` says how steeply.

    Places are allocated for the largest layer, so that the shapes stay one: fewer tokens, not fewer bytes.
    """

    name: ClassVar[str] = "pyramidkv"
    beta: float = 20.0

    def budgets(self, keep: float, length: int, num_layers: int) -> np.ndarray:
        """kvpress' formula; equal budgets where the last layer's would be smaller than the window."""
        low = keep / self.beta
        high = 2 * keep - low
        if high >= length - self.window:
            high = length - self.window
            low = 2 * keep - high
        if not length >= high >= low >= self.window:
            return super().budgets(round(keep), length, num_layers)
        step = (high - low) / (num_layers - 1) if num_layers > 1 else 0.0
        return np.asarray([round(high - layer * step) for layer in range(num_layers)], np.int32)
