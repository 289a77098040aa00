"""What ships for an embedded base: it is read in full, for that base, without being named."""

import json

import pytest

from memjax.errors import InputError
from memjax.evict.files import INDEXER, LATENT, SHIPPED, indexer_hash, load_learned, shipped
from memjax.memory.latent import Rule
from memjax.models.base import load

# The default base is fetched from a package registry.
NAMES = [
    pytest.param(folder.name, marks=[pytest.mark.net] if folder.name == "smollm2-135m" else [])
    for folder in sorted(SHIPPED.iterdir())
]


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_fits_its_base_and_says_how_it_was_made(name):
    base = load(name)
    learned = load_learned(base, shipped(INDEXER, name), shipped(LATENT, name))
    assert learned.index_shape == (1, 8)
    assert learned.rule == Rule("slots", 64)
    for kind in (INDEXER, LATENT):
        about = json.loads((SHIPPED / name / kind / f"{kind}.json").read_text())
        assert about["training"]["config"]["base"] == name
        assert about["training"]["metrics"]
    indexer = json.loads((SHIPPED / name / INDEXER / "indexer.json").read_text())
    assert about["training"]["config"]["indexer"] == indexer["weights"] == indexer_hash(SHIPPED / name / INDEXER, base)


def test_only_an_embedded_name_finds_it():
    assert shipped(INDEXER, "tiny") is not None
    assert shipped(INDEXER, "qwen3-4b") is None
    assert shipped(INDEXER, str(SHIPPED / "tiny")) is None
    assert shipped(INDEXER, "../shipped/tiny") is None


def test_what_ships_is_small_and_names_no_place_on_a_machine():
    for folder in SHIPPED.iterdir():
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {"indexer.safetensors", "latent.safetensors", "loss.png", "training.jsonl"} <= {path.name for path in files}
        assert sum(path.stat().st_size for path in files) < 12e6
        for path in files:
            assert path.suffix not in (".json", ".jsonl") or '"/' not in path.read_text()


def test_a_policy_reads_it_unless_another_is_named():
    from memjax.cli.common import bounded_by

    bounds = bounded_by("40", "indexmem", None, "mine", "tiny")
    assert (bounds.indexer, bounds.latent) == (shipped(INDEXER, "tiny"), "mine")
    assert bounded_by("40", "indexmem", None, None, None)[2:] == (
        shipped(INDEXER, "smollm2-135m"),
        shipped(LATENT, "smollm2-135m"),
    )
    assert bounded_by("40", "snapkv", None, None, "tiny")[2:] == (None, None)
    with pytest.raises(InputError, match=r"indexmem reads what was trained.*for ./qwen nothing ships.*--indexer DIR"):
        bounded_by("40", "indexmem", None, None, "./qwen")
    with pytest.raises(InputError, match="--latent is read by --policy indexmem"):
        bounded_by("40", "snapkv", None, "mine", "tiny")
