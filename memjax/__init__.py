"""memjax: latent memory for frozen language models, in JAX."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> where it lives. They are imported when first used, so that `import memjax` costs nothing.
_PUBLIC = {
    "load": "memjax.train.base",
    "restore": "memjax.train.checkpoint",
    "fit": "memjax.train.fit",
    "FitConfig": "memjax.train.fit",
    "distill": "memjax.write.distill",
    "DistillConfig": "memjax.write.distill",
    "add_text": "memjax.bank.add",
    "open_bank": "memjax.bank.store",
    "Engine": "memjax.serve.engine",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'memjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
