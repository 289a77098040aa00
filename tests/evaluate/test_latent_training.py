"""`memjax train latent`, from the command line to an answer from a cache with a latent memory."""

import json

import jax
import pytest

from memjax.cli.main import main
from memjax.config import load_config
from memjax.errors import ArtefactError, ConfigError
from memjax.evaluate import latent as m
from memjax.evaluate import ruler_evict
from memjax.evict.files import indexer_hash, load_learned, load_memory, save_indexer, save_memory
from memjax.evict.indexer import IndexerConfig, init_indexer
from memjax.evict.latent import init_memory
from memjax.memory.latent import Rule
from tests.support import small_base

BASE = small_base()
RECIPE = """
rule: {merge: mass, features: 4}
data: {rows: 2, shortest: 60, longest: 96, behind: 48}
validation: 1
events: 2
fit: {steps: 2, log_every: 1, eval_every: 2, plot: false, optimizer: {learning_rate: 1.0e-2}}
"""


def run(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_from_a_recipe_to_an_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(m, "load", lambda name, mesh=None: BASE)
    monkeypatch.setattr("memjax.cli.ask.load_base", lambda name: BASE)
    shape, indexer = IndexerConfig.of(BASE.config), tmp_path / "indexer"
    save_indexer(indexer, init_indexer(BASE.config, shape, jax.random.key(0)), shape, BASE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "run"
    code, told, err = run(capsys, "train", "latent", tmp_path / "recipe.yaml", "--indexer", indexer, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(told)
    assert told["step"] == 2
    assert {
        "eval/explained_50",
        "eval/explained_75",
        "eval/explained_75/2",
        "eval/explained_90",
        "eval/strength_75",
    } <= set(told)
    params, rule = load_memory(out / "latent", BASE)
    assert rule == Rule("mass", 4)
    assert params["phi"].shape == (3, 8, 4)
    about = (out / "latent" / "latent.json").read_text()
    assert json.loads(about)["training"]["config"]["indexer"] == indexer_hash(indexer, BASE)
    assert str(tmp_path) not in about  # no folder of this machine

    (tmp_path / "text.txt").write_text("The ferry to Halvic leaves at dawn, and the harp has 72 strings. " * 6)
    asked = ("ask", "When?", "--file", tmp_path / "text.txt", "--budget", "40", "--policy", "indexmem", "--json")
    named = ("--indexer", indexer, "--latent", out / "latent", "--max-tokens", "3")
    code, shown, err = run(capsys, *asked, *named)
    assert code == 0, err
    assert (json.loads(shown)["kept_tokens"], json.loads(shown)["policy"]) == (40, "indexmem")
    code, _, err = run(capsys, *asked, "--indexer", indexer, "--base", "./own")  # for which nothing ships
    assert (code, "--latent DIR" in err) == (2, True)
    learned = load_learned(BASE, latent=out / "latent")
    save_memory(tmp_path / "wide", init_memory(BASE.config, Rule("mass", 5), jax.random.key(0)), rule, BASE)
    with pytest.raises(ArtefactError, match="phi is"):
        load_memory(tmp_path / "wide", BASE)
    assert learned.indexer is None


def test_centroids_are_measured_and_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(m, "load", lambda name, mesh=None: BASE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = load_config(m.LatentTraining, tmp_path / "recipe.yaml", ("policy=snapkv", "rule.merge=slots"))
    fitted = m.train_latent(config, tmp_path / "run", progress=False)
    assert fitted.step == 0
    assert fitted.metrics["eval/explained_50"] != 0
    assert load_memory(tmp_path / "run" / "latent", BASE) == ({}, Rule("slots", 4))


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="indexer=DIR"):
        m.LatentTraining()
    with pytest.raises(ConfigError, match="least and most"):
        m.LatentTraining(policy="snapkv", least=0.9, most=0.5)
    assert load_config(m.LatentTraining, "configs/latent_tiny.yaml", ("indexer=DIR",)).rule == Rule("slots", 64)
    every = [[p.name for p in ruler_evict.policies_of("all", *given)][12:] for given in ((1, 0), (0, 1), (1, 1))]
    assert every == [["indexer"], ["snapkv+latent"], ["indexer", "indexmem", "snapkv+latent"]]
