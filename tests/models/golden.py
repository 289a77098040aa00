"""The golden models as Hugging Face folders, for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

MODELS = Path(__file__).parents[1] / "goldens" / "models"
NAMES = sorted(path.stem for path in MODELS.glob("*.npz"))


def read(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file."""
    with np.load(MODELS / f"{name}.npz") as file:
        return dict(file)


def weights_of(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{Hugging Face name: array}."""
    return {key.removeprefix("weights/"): array for key, array in golden.items() if key.startswith("weights/")}


def write_folder(folder: Path, golden: dict[str, np.ndarray]) -> Path:
    """config.json and model.safetensors as `save_pretrained` wrote them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(str(golden["config"]))
    save_file(weights_of(golden), folder / "model.safetensors")
    return folder
