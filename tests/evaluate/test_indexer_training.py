"""`memjax train indexer`, from the command line to a cache that the trained indexer judges."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from memjax.cli.main import main
from memjax.config import load_config
from memjax.errors import ArtefactError, BaseMismatchError
from memjax.evaluate import indexer as m
from memjax.evaluate import ruler, ruler_evict
from memjax.evaluate.lessons import LessonConfig
from memjax.evict.files import load_indexer, save_indexer
from memjax.evict.indexer import IndexerConfig
from memjax.evict.learned import Learned
from memjax.sharding import MeshConfig
from memjax.train.base import place
from memjax.train.fit import FitConfig
from memjax.train.optimizer import OptimizerConfig
from tests.support import small_base

BASE = small_base()
SMALL = m.IndexerTraining(
    data=LessonConfig(rows=2, shortest=60, longest=96, behind=48),
    validation=1,
    fit=FitConfig(
        steps=4, log_every=1, save_every=2, eval_every=4, plot=False,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="wsd", warmup=1, decay=0.5, final=0.01),
    ),
)  # fmt: skip
RECIPE = """
data: {rows: 2, shortest: 60, longest: 96, behind: 48}
validation: 1
fit:
  steps: 4
  log_every: 1
  save_every: 2
  eval_every: 4
  plot: false
  optimizer: {learning_rate: 1.0e-2, schedule: wsd, warmup: 1, decay: 0.5, final: 0.01}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run, from the command line."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "load", lambda name, mesh=None: BASE)
        with pytest.raises(SystemExit) as stop:
            main(
                ["train", "indexer", str(folder / "recipe.yaml"), "--base", "small", "--out", str(folder / "run"), "--json"]
            )
    assert stop.value.code == 0
    return folder / "run"


def test_it_learns_is_resumed_and_leaves_an_indexer(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "load", lambda name, mesh=None: BASE)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"eval/kl", "eval/recall_10", "eval/recall_25", "eval/recall_50"} <= set(lines[-1])
    assert lines[-1]["learning_rate"] < lines[1]["learning_rate"]  # warm-up, stable, decay
    shutil.copytree(trained, tmp_path / "half", ignore=shutil.ignore_patterns("4", "indexer"))
    fitted = m.train_indexer(SMALL, tmp_path / "half", resume=True, progress=False)
    assert fitted.step == 4
    whole, resumed = (load_indexer(folder / "indexer", BASE) for folder in (trained, tmp_path / "half"))
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name])
    about = json.loads((trained / "indexer" / "indexer.json").read_text())
    assert about["base_id"] == BASE.id
    assert about["training"]["config"]["data"]["texts"] == []


@pytest.mark.slow
def test_a_mesh_trains_the_same_indexer(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "load", lambda name, mesh=None: place(BASE, mesh))
    meshed = dataclasses.replace(SMALL, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    fitted = m.train_indexer(meshed, tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert fitted.scores["kl"] == pytest.approx(lines[-1]["eval/kl"], abs=1e-4)
    for name, value in load_indexer(trained / "indexer", BASE).items():
        np.testing.assert_allclose(load_indexer(tmp_path / "run" / "indexer", BASE)[name], value, atol=1e-4)


def test_the_shipped_recipe_is_read():
    config = load_config(m.IndexerTraining, "configs/indexer_tiny.yaml")
    assert (config.base, config.fit.optimizer.schedule) == ("tiny", "wsd")
    assert m.IndexerTraining().fit.optimizer.final * 1e-3 == pytest.approx(7.5e-6)  # the paper's


def test_files_are_checked_in_full(trained, tmp_path):
    shape = IndexerConfig.of(BASE.config)
    params = load_indexer(trained / "indexer", BASE)
    with pytest.raises(BaseMismatchError, match=BASE.id):
        load_indexer(trained / "indexer", dataclasses.replace(BASE, id="f" * 64))
    with pytest.raises(ArtefactError, match="not finite"):
        save_indexer(tmp_path / "nan", {**params, "k_bias": params["k_bias"] * np.nan}, shape, BASE)
    save_indexer(tmp_path / "less", {n: x for n, x in params.items() if n != "k"}, shape, BASE)
    with pytest.raises(ArtefactError, match="missing k;"):
        load_indexer(tmp_path / "less", BASE)
    save_indexer(tmp_path / "wide", {**params, "w": np.zeros((3, 32, 9), np.float32)}, shape, BASE)
    with pytest.raises(ArtefactError, match="w is"):
        load_indexer(tmp_path / "wide", BASE)
    (tmp_path / "wide" / "indexer.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtefactError, match="is damaged"):
        load_indexer(tmp_path / "wide", BASE)
    with pytest.raises(ArtefactError, match="as `memjax train indexer` leaves it"):
        load_indexer(tmp_path / "nowhere", BASE)
    save_indexer(tmp_path / "half", params, shape, BASE, dtype="bfloat16")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3), params, load_indexer(tmp_path / "half", BASE)
    )


def run(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*args])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_it_judges_a_bounded_cache(trained, tmp_path, capsys, monkeypatch):
    for command in ("generate", "ask"):
        monkeypatch.setattr(f"memjax.cli.{command}.load_base", lambda name: BASE)
    path = tmp_path / "text.txt"
    path.write_text("The ferry to Halvic leaves at dawn, and the harp has 72 strings. " * 6)
    asked = ("--file", str(path), "--budget", "40", "--policy", "indexer", "--json")
    code, out, err = run(capsys, "ask", "When?", *asked, "--indexer", str(trained / "indexer"), "--max-tokens", "3")
    told = json.loads(out)
    assert code == 0, err
    assert (told["kept_tokens"], told["policy"]) == (40, "indexer")
    code, _, err = run(capsys, "generate", "In short:", *asked, "--base", "./own")  # for which nothing ships
    assert (code, "--indexer DIR" in err) == (2, True)
    code, _, err = run(
        capsys, "generate", "x", "--budget", "9", "--policy", "snapkv", "--indexer", str(trained / "indexer")
    )
    assert (code, "not by snapkv" in err) == (2, True)


@pytest.mark.slow
def test_it_is_a_policy_of_ruler(trained):
    learned = Learned(load_indexer(trained / "indexer", BASE))
    config = ruler_evict.EvictRuler(ruler_evict.policies_of("indexer"), (0.0, 0.5), learned=learned)
    items = ruler_evict.items_of(BASE, "needle", 160, 2, ruler.Sources(), 0)
    made = ruler_evict.answers(BASE, items, config)
    assert set(made) == {"full", "indexer/0", "indexer/0.5"}
    assert made["indexer/0"] == made["full"]
    assert "indexer" in [policy.name for policy in ruler_evict.policies_of("all", indexer=True)]
