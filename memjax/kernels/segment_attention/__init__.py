"""Attention over a list of key/value segments and the exact merge of their partial results."""

from memjax.kernels.segment_attention.api import Segment, attend, merge

__all__ = ["Segment", "attend", "merge"]
