"""What ships for an embedded base: it is read in full, for that base, without being named."""

import json

import pytest

from memjax.errors import InputError
from memjax.evict.files import INDEXER, LATENT, SHIPPED, indexer_hash, load_learned, shipped
from memjax.memory.latent import Rule
from memjax.models.base import load


def test_what_ships_fits_its_base_and_says_how_it_was_made():
    for folder in SHIPPED.iterdir():
        base = load(folder.name)
        learned = load_learned(base, shipped(INDEXER, base.name), shipped(LATENT, base.name))
        assert learned.index_shape == (1, 8)
        assert learned.rule == Rule("slots", 64)
        for kind in (INDEXER, LATENT):
            about = json.loads((folder / kind / f"{kind}.json").read_text())
            assert about["training"]["config"]["base"] == base.name
            assert about["training"]["metrics"]
        indexer = json.loads((folder / INDEXER / "indexer.json").read_text())
        assert about["training"]["config"]["indexer"] == indexer["weights"] == indexer_hash(folder / INDEXER, base)


def test_only_an_embedded_name_finds_it():
    assert shipped(INDEXER, "tiny") is not None
    assert shipped(INDEXER, "smollm2-135m") is None
    assert shipped(INDEXER, str(SHIPPED / "tiny")) is None
    assert shipped(INDEXER, "../shipped/tiny") is None


def test_a_policy_reads_it_unless_another_is_named():
    from memjax.cli.common import bounded_by

    bounds = bounded_by("40", "indexmem", None, "mine", "tiny")
    assert (bounds.indexer, bounds.latent) == (shipped(INDEXER, "tiny"), "mine")
    assert bounded_by("40", "snapkv", None, None, "tiny")[2:] == (None, None)
    with pytest.raises(InputError, match=r"indexmem reads what was trained.*smollm2-135m nothing ships.*--indexer DIR"):
        bounded_by("40", "indexmem", None, None, None)
    with pytest.raises(InputError, match="--latent is read by --policy indexmem"):
        bounded_by("40", "snapkv", None, "mine", "tiny")
