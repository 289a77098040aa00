"""Weights from files: Hugging Face folders as they are, GGUF files by conversion into such a folder."""

from memjax.models.weights.hf import Loaded, load_folder
from memjax.models.weights.names import SITE_MODULES

__all__ = ["SITE_MODULES", "Loaded", "load_folder"]
