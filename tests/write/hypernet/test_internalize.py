"""A text becomes an ordinary adapter of the bank in one pass, whatever its length."""

import dataclasses
import json

import numpy as np
import pytest

from memjax.bank.add import add_text
from memjax.bank.store import open_bank
from memjax.cli import write
from memjax.errors import InputError
from memjax.memory.adapter import Adapter, as_slots
from memjax.memory.files import read_artefact
from memjax.models.decoder import site_shapes
from memjax.models.weights import SITE_MODULES
from memjax.write.hypernet.encode import encode
from memjax.write.hypernet.files import save_hyper
from memjax.write.hypernet.internalize import InternalizeConfig, document_tokens, internalize, update_shares
from tests.cli.test_cli import run
from tests.write.hypernet.support import BASE, STYLE, TEXT, hyper, logits

NETWORK = dataclasses.replace(hyper(), id="b" * 64, max_chunk=40)
RECIPE = InternalizeConfig(NETWORK.id, overlap=4, probes=0)
LONG = " ".join(f"Room {n} of the harbour is {colour}." for n in range(40) for colour in ("red", "old"))


def stored(bank, entry):
    """The adapter of an entry, read from its PEFT folder."""
    memory = read_artefact(
        bank.folder(entry.id), site_shapes(BASE.config), BASE.config.num_layers, SITE_MODULES, BASE.id
    )  # fmt: skip
    return Adapter(*memory.artefact), memory.provenance


def test_a_text_is_an_ordinary_memory_with_the_logits_of_the_pass(tmp_path):
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id) as bank:
        entry, written = add_text(BASE, bank, TEXT, "notes", STYLE, RECIPE, hyper=NETWORK)
        again = add_text(BASE, bank, TEXT, "notes", STYLE, RECIPE, hyper=NETWORK)
        assert again == (entry, None)
        adapter, told = stored(bank, entry)
    made = encode(BASE, NETWORK, document_tokens(BASE.tokenizer, STYLE, TEXT), overlap=4)
    np.testing.assert_allclose(logits(as_slots(adapter)), logits(as_slots(made)), atol=1e-5)
    assert told["recipe"]["writer"] == "internalize"
    assert told["recipe"]["network"] == NETWORK.id
    assert told["metrics"]["recompressed"] == 0
    assert told["metrics"]["rank"] == 2 * (written.metrics["chunks"] + 1)


def test_a_text_beyond_the_window_is_written_in_chunks_and_cut_to_the_rank():
    assert len(BASE.tokenizer.encode(LONG)) > BASE.config.max_positions
    recipe = dataclasses.replace(RECIPE, rank=6)
    written = internalize(BASE, LONG, STYLE, recipe, NETWORK)
    told = written.metrics
    assert told["chunks"] >= 8
    assert (told["rank"], written.artefact.rank) == (2 * (told["chunks"] + 1), 6)
    assert 0 < told["recompressed"] < 1
    whole = internalize(BASE, LONG, STYLE, dataclasses.replace(RECIPE, rank=999), NETWORK)
    delta = lambda x: np.einsum("lrf,lri->lfi", x.b["down"], x.a["down"]) * float(x.scale)
    full = delta(whole.artefact)
    weight = np.linalg.norm(BASE.params["layers"]["down"], axis=(1, 2))
    np.testing.assert_allclose(
        update_shares(BASE, whole.artefact)["down"], np.linalg.norm(full, axis=(1, 2)) / weight, rtol=1e-4
    )
    mean = internalize(BASE, LONG, STYLE, dataclasses.replace(RECIPE, rank=999, weigh="mean"), NETWORK)
    site = NETWORK.params["sites"]["down"]
    own = np.einsum("lrf,lri->lfi", site["b_bias"], site["a_bias"]) * NETWORK.config.scale
    np.testing.assert_allclose(delta(mean.artefact) - own, (full - own) / told["chunks"], atol=1e-3)


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(InputError, match="recipe names the hypernetwork cccccccccccc"):
        internalize(BASE, TEXT, STYLE, InternalizeConfig("c" * 64), NETWORK)
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id) as bank:
        with pytest.raises(InputError, match="load_hyper"):
            add_text(BASE, bank, TEXT, "notes", STYLE, RECIPE)
        assert bank.count() == 0


@pytest.mark.slow
def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "load_base", lambda name, bank_base="": BASE)
    (tmp_path / "long.txt").write_text(LONG)
    save_hyper(tmp_path / "net", NETWORK)
    command = ["write", tmp_path / "long.txt", "--bank", tmp_path / "bank", "--how", "internalize"]
    code, _, err = run(capsys, *command)
    assert (code, err.count("\n")) == (2, 1)
    assert "--hyper DIR" in err
    code, out, err = run(capsys, *command, "--hyper", tmp_path / "net", "--overlap", 4, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["metrics"]["chunks"] >= 8
    assert told["metrics"]["recompressed"] == 0
    code, _, err = run(capsys, "write", tmp_path / "long.txt", "--bank", tmp_path / "bank", "--chunk", 9)
    assert code == 2
    assert "--chunk is for --how internalize and --how compile" in err
