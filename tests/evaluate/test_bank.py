"""The bank's experiment at a small size: what is asked and kept, what a writer may see, and that a second run goes on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.bank.gate import DEFAULT_RULE
from memjax.bank.route import RouterConfig
from memjax.bank.store import open_bank
from memjax.evaluate import bank as b
from memjax.evaluate import bank_ablate, bank_run, bank_scale, bank_share, writers
from memjax.memory.adapter import init_adapter
from memjax.memory.files import MANIFEST
from memjax.models.decoder import empty_cache, site_shapes, unembed
from memjax.models.generate import read_prefix
from memjax.write.distill import DistillConfig
from memjax.write.prompts import answer_text, ask_tokens, prompt_style, read_tokens
from tests.support import read, small_base, small_config

BASE = small_base(max_positions=1024)
STYLE = prompt_style("plain")
RECIPE = DistillConfig(
    rank=2,
    sites=("down",),
    steps=2,
    rows=3,
    keep_batch=2,
    general=6,
    top_k=4,
    held_out=0.4,
    asked=0,
    turned=20,
    cloze=0,
    continued=4,
)
CONFIG = b.BankConfig(
    documents=3, questions=2, tokens=60, general=4, near=3, near_candidates=2, answer_tokens=4,
    router=RouterConfig(epochs=2, batch=4, validation=0.0),
)  # fmt: skip
CORPUS = CONFIG.world()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("bank")
    return out, bank_run.run_bank(
        BASE, STYLE, RECIPE, CONFIG, out, parts=("main", "near", "sizes", "merge"), progress=watch
    )


def watch(what, done, total):
    assert 0 <= done <= total


def test_all_columns_and_keys_are_there(ran):
    out, found = ran
    numbers = found["numbers"]
    for column in b.COLUMNS:
        assert numbers[f"exact_match/{column}_items"] == numbers[f"loss/{column}_items"] == 6
        assert numbers[f"right/{column}"] == numbers[f"exact_match/{column}"]
        assert numbers[f"loss/{column}"] > 0
        assert 0 <= numbers[f"f1/{column}"] <= 1
    wanted = {
        "oracle_over_incontext", "retrieval3_over_oracle", "router_gain_points", "gate_balanced_accuracy",
        "general_loss_gated_points", "general_loss_ungated_points", "in_bank_loss_gated_points", "recall/1", "recall/3",
        "recall/5", "accuracy_at/1", "accuracy_at/3", "bytes_adapter", "bytes_cache", "gate_balanced_accuracy/none",
    }  # fmt: skip
    assert wanted <= set(numbers)
    assert numbers["recall/3"] == 1  # of three memories, all are candidates
    assert all(np.isfinite(value) for value in numbers.values())
    assert {path.name for path in bank_run.draw_figures(out, found)} == {"entropies.png", "sizes.png", "bytes.png"}
    assert len(found["entropies"]["adapter, in the bank"]) == 6
    assert len(found["entropies"]["in context, general"]) == 4


def test_writers_never_see_the_test_questions(ran, monkeypatch, tmp_path):
    """What is handed to a writer, and what the bank keeps of it, holds neither a test question nor an answer key."""
    handed = []
    monkeypatch.setattr(
        writers, "add_text", lambda base, bank, text, name, *rest, **more: handed.append((text, name, more)) or (0, None)
    )
    texts = CORPUS.texts(0)
    items = CORPUS.items(0)
    bench = b.Bench(BASE, STYLE, dataclasses.replace(RECIPE, keep=0.0), CONFIG, CORPUS, tmp_path)
    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id) as bank:
        b.write_bank(bench, bank, texts)
    assert [(text, name) for text, name, _ in handed] == [(text, name) for name, text in texts.items()]
    assert not any(item.question in repr(handed) for item in items)
    with open_bank(ran[0] / "seed-0" / "bank") as bank:
        kept = json.dumps([bank.questions(name) for name in bank.names()])
        assert not any(item.question in kept for item in items)
    assert {item.name for item in items} == set(texts)


def test_several_memories_are_asked_in_groups_of_the_first_documents(ran):
    out, found = ran
    for way in ("own", "vote", "mix", "ties", "sum"):
        assert found["numbers"][f"merge/{way}/2_items"] == 4  # of three documents one pair, two questions of each
        assert f"merge/{way}/4" not in found["numbers"]
    with open_bank(out / "seed-0" / "bank") as bank:
        assert bank.names("merge-2") == ["document-000", "document-001", "sum document-000", "ties document-000"]
        assert len(bank.names()) == 3  # what is merged is not found by the other parts
    said = json.loads((out / "seed-0" / "answers-merge-own-2.json").read_text())["value"]
    rows = json.loads((out / "seed-0" / "answers-oracle.json").read_text())["value"]
    assert said == [row["text"] for row in rows[:4]]


def test_the_loss_is_that_of_the_gold_answer_as_the_column_reads_the_question(ran):
    out, _ = ran
    item, text = CORPUS.items(0)[0], CORPUS.texts(0)["document-000"]
    gold = BASE.tokenizer.encode(answer_text(BASE.tokenizer, STYLE, item.answers[0]))
    for column, prompt in (
        ("base", ask_tokens(BASE.tokenizer, STYLE, item.question)),
        ("in_context", read_tokens(BASE.tokenizer, STYLE, text, item.question)),
    ):
        ids = jnp.asarray([[*prompt, *gold]])
        hidden = read(BASE.model, BASE.params, ids, jnp.arange(ids.shape[1])[None]).hidden
        logp = jax.nn.log_softmax(unembed(BASE.model, BASE.params, hidden))[0, len(prompt) - 1 : -1]
        expected = -np.mean([logp[i, token] for i, token in enumerate(gold)])
        held = json.loads((out / "seed-0" / f"losses-{column}.json").read_text())["value"]
        assert held[0] == pytest.approx(expected, rel=1e-4)


def test_a_second_run_writes_and_asks_nothing_again(ran, monkeypatch):
    out, found = ran
    fail = lambda *args, **kwargs: pytest.fail("it was done again")
    for place, name in (
        (writers, "add_text"),
        (b, "make_subjects"),
        (b, "see_questions"),
        (b, "learn_router"),
        (b.Engine, "ask"),
        (b.Engine, "observe"),
        (b.Engine, "answer_losses"),
    ):
        monkeypatch.setattr(place, name, fail)
    again = bank_run.run_bank(BASE, STYLE, RECIPE, CONFIG, out, parts=("main",))
    for key in ("exact_match/retrieval3", "gate_balanced_accuracy", "f1/shift"):
        assert again["numbers"][key] == found["numbers"][key]


def test_answers_of_another_setup_are_not_taken_over(ran, monkeypatch):
    out, _ = ran
    made = b.kept(bench := b.Bench(BASE, STYLE, RECIPE, CONFIG, CORPUS, out), "thing", 1, lambda: 5)
    assert (made, b.kept(bench, "thing", 1, lambda: 6), b.kept(bench, "thing", 2, lambda: 7)) == (5, 5, 7)
    other = dataclasses.replace(bench, base=small_base(seed=1))
    assert b.kept(other, "thing", 2, lambda: 8) == 8
    (out / "thing.json").write_text("{")
    assert b.kept(bench, "thing", 2, lambda: 9) == 9


def test_the_wrong_memory_is_another_documents(ran):
    items = CORPUS.items(0)
    held = json.loads((ran[0] / "seed-0" / "answers-shift.json").read_text())["value"]
    assert all(row["memory"] != item.name for row, item in zip(held, items, strict=True))
    held = json.loads((ran[0] / "seed-0" / "answers-oracle.json").read_text())["value"]
    assert all(row["memory"] == item.name for row, item in zip(held, items, strict=True))


def test_a_gate_that_never_opens_gives_the_bases_numbers():
    numbers = {
        "right/oracle": 0.9, "right/in_context": 1.0, "right/retrieval3": 0.8, "general/base": 0.7,
        "general/ungated": 0.3, f"general/{DEFAULT_RULE}": 0.7, "in_bank/ungated": 0.8, f"in_bank/{DEFAULT_RULE}": 0.1,
        f"opened/{DEFAULT_RULE}": 0.0, f"closed/{DEFAULT_RULE}": 1.0, f"foreign/{DEFAULT_RULE}": 0.25,
    }  # fmt: skip
    found = b.main_numbers(numbers)
    assert found["foreign_opened_points"] == 25
    assert found["oracle_over_incontext"] == pytest.approx(0.9)
    assert found["gate_balanced_accuracy"] == 0.5
    assert found["general_loss_gated_points"] == 0
    assert found["general_loss_ungated_points"] == pytest.approx(40)
    assert found["in_bank_loss_gated_points"] == pytest.approx(70)


@pytest.mark.slow
def test_trained_with_and_without_the_shared_cache(tmp_path):
    bench = b.Bench(BASE, STYLE, RECIPE, CONFIG, CORPUS, tmp_path)
    texts = dict(list(CORPUS.texts(0).items())[:1])
    items = [item for item in CORPUS.items(0) if item.name in texts]
    scores = bank_share.run_share(bench, texts, items)
    assert {key: len(value) for key, value in scores.items()} == dict.fromkeys(
        ("share_trained", "share_untrained", "share_own"), 2
    )
    ids = []
    for how in ("shared", "alone"):
        with open_bank(tmp_path / f"share-{how}") as bank:
            ids.append(bank.get(items[0].name).id)
    assert ids[0] != ids[1]


@pytest.mark.slow
def test_ratios_are_of_the_right_things():
    config = small_config(vocab_size=200)
    # Of one round each: the ratio of several is the median of theirs.
    first = bank_share.first_token_ratio(config, prompt=40, rank=2, times=1)
    assert first["ttft_share_ratio"] == pytest.approx(first["ttft_shared_ms"] / first["ttft_fresh_ms"])
    step = bank_share.train_speedup(config, context=64, rows=2, rank=2, times=1)
    assert step["train_speedup"] == pytest.approx(step["step_seconds_plain"] / step["step_seconds_shared"])


def test_both_training_steps_compute_the_same_loss_where_nothing_is_adapted():
    """With a fresh adapter (b zero) the student is the base, whichever way its question was read."""
    config, model, params = BASE.config, BASE.model, BASE.params
    fresh = init_adapter(site_shapes(config), config.num_layers, 2, 2.0, jax.random.key(0))
    rng = np.random.default_rng(0)
    text, asked, said = (rng.integers(5, 90, shape).astype(np.int32) for shape in ((20,), (2, 16), (2, 16)))
    held = read_prefix(model, params, text.tolist()).segment
    question = read(model, params, asked[:, :-1], bank_share._places(2, 15), empty_cache(config, 2, 15)).cache
    trained = {"a": fresh.a, "b": fresh.b}
    shared, _ = bank_share._shared_step(model, params, trained, held, question, jnp.asarray(asked), jnp.asarray(said))
    plain, _ = bank_share._plain_step(model, params, trained, jnp.asarray(text), jnp.asarray(asked), jnp.asarray(said))
    assert shared > 1e-2
    np.testing.assert_allclose(shared, plain, rtol=1e-3)


def test_a_bank_of_many_rows_is_whole_and_shares_its_weights(tmp_path):
    found = bank_scale.run_scale(BASE, STYLE, tmp_path, sizes=(1, 70))
    assert {"ask_growth", "open_seconds/70", "open_mib/1", "retrieval_ms/70", "add_ms/70", "delete_ms/1"} <= set(found)
    assert {"ask_growth_cold", "first_token_cold_ms/70", "first_token_ms/1"} <= set(found)
    assert found["open_mib/1"] < 200  # of a process that opens a bank, whatever the one that starts it holds
    with open_bank(tmp_path / "bank-70") as bank:
        assert bank.count() == 70
        assert bank.verify().ok
        assert bank.sweep() == ()
        entry = bank.get("memory-000066")
        assert bank.text("memory-000066") == bank_scale.scale_text(66)
        first = bank.get("memory-000002")
        inodes = [(bank.folder(e.id) / "adapter_model.safetensors").stat().st_ino for e in (entry, first)]
        assert inodes[0] == inodes[1]
        assert (bank.folder(entry.id) / MANIFEST).read_text() != (bank.folder(first.id) / MANIFEST).read_text()


def test_every_ablation_changes_one_thing():
    ways = bank_ablate.variants(DistillConfig(alike=20, reworded=40))
    assert not {"answers alike", "asked once"} & set(bank_ablate.variants(DistillConfig()))  # which is that way already
    assert next(iter(ways)) == "default"
    assert len({repr(way) for way in ways.values()}) == len(ways)
    for name, way in ways.items():
        changed = {f.name for f in dataclasses.fields(way) if getattr(way, f.name) != getattr(ways["default"], f.name)}
        allowed = {
            "rank": {"rank", "alpha"}, "questions": {*bank_ablate.KINDS, "reworded"}, "mlp": {"sites"},
            "attention": {"sites"}, "marker": {"marker", "row_tokens"}, "no": {"keep"}, "answers": {"alike"},
            "asked": {"reworded"}, "default": set(),
        }[name.split()[0]]  # fmt: skip
        assert changed <= allowed
        assert bool(changed) == (name != "default")
    assert ways["rank 64"].alpha / 64 == DistillConfig().alpha / DistillConfig().rank


@pytest.mark.slow
def test_ablations_write_and_ask_in_every_way_and_go_on(tmp_path, monkeypatch):
    ways = {name: bank_ablate.variants(RECIPE)[name] for name in ("default", "rank 4", "no keep-term")}
    monkeypatch.setattr(bank_ablate, "variants", lambda recipe: ways)
    run = lambda: bank_run.run_bank(BASE, STYLE, RECIPE, CONFIG, tmp_path, parts=("ablations",))["numbers"]
    numbers = run()
    for name in ways:
        assert (numbers[f"ablation/{name}_items"], numbers[f"ablation_general/{name}_items"]) == (6, 4)
        assert numbers[f"ablation_seconds/{name}"] > 0
    ranks = {}
    for folder in (tmp_path / "seed-0" / "ablations").iterdir():
        with open_bank(folder / "bank") as bank:
            config = json.loads((bank.folder(bank.get("document-000").id) / "adapter_config.json").read_text())
            ranks[folder.name] = config["r"]
    assert ranks == {"default": 2, "rank-4": 4, "no-keep-term": 2}
    (tmp_path / "seed-0" / "ablations" / "rank-4" / "answers.json").unlink()  # it was interrupted after the writing
    again = run()
    monkeypatch.setattr(bank_ablate, "_ask", lambda *args: pytest.fail("it was asked again"))
    for found in (again, run()):
        for key in ("ablation/rank 4", "ablation_seconds/rank 4"):
            assert found[key] == numbers[key]
