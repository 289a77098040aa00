"""The forward low-rank delta, with an adapter chosen per row."""

from memjax.kernels.slot_lora.api import slot_delta

__all__ = ["slot_delta"]
