"""Every recipe in configs/ loads as the command on its first line loads it."""

from pathlib import Path

import pytest

from memjax.config import load_config
from memjax.evaluate.hypernet import HypernetConfig
from memjax.evaluate.indexer import IndexerTraining
from memjax.evaluate.latent import LatentTraining
from memjax.evaluate.tiny import TinyConfig

CONFIGS = Path(__file__).parents[2] / "configs"
TRAINED = {"base": TinyConfig, "hypernet": HypernetConfig, "indexer": IndexerTraining, "latent": LatentTraining}
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "router.yaml")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_as_its_first_line_says(recipe):
    comment, program, train, what, named, *_ = recipe.read_text().splitlines()[0].split()
    assert (comment, program, train, named) == ("#", "memjax", "train", f"configs/{recipe.name}")
    load_config(TRAINED[what], recipe, ("indexer=DIR",) if what == "latent" else ())
