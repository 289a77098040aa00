"""Adapters that PEFT wrote or loaded, frozen; see goldens/make_peft.py."""

import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "goldens" / "peft"


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(GOLDEN / "golden.npz"))


@pytest.fixture(scope="module")
def shapes(golden):
    return {site: tuple(shape) for site, shape in golden["site_shapes"].items()}


@pytest.fixture(scope="module")
def modules(golden):
    return golden["modules"]
