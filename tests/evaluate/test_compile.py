"""The experiment of compiled buffers at a small size: what is asked and kept, and what a compiler may see."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.bank.add import check_text, text_meta
from memjax.bank.store import open_bank
from memjax.errors import ConfigError, InputError
from memjax.evaluate import compile as c
from memjax.evaluate import compile_bytes, world, writers
from memjax.evaluate import compile_contents as contents
from memjax.evaluate import compile_evict as evict
from memjax.evaluate import compile_together as together
from memjax.evaluate.compile_loss import gold_losses
from memjax.evaluate.corpora import Corpus, Item
from memjax.evaluate.ruler_evict import EvictRuler, policies_of
from memjax.memory.buffer import Buffer
from memjax.memory.files import write_artefact
from memjax.models.buffers import rotate_layers
from memjax.models.decoder import forward, site_shapes, unembed
from memjax.models.generate import Sampling, generate_all, read_prefix
from memjax.models.weights import SITE_MODULES
from memjax.serve.together import read_together
from memjax.write.compile import CompileConfig
from memjax.write.distill import DistillConfig
from memjax.write.prompts import answer_text, ask_tokens, prompt_style, read_tokens
from memjax.write.reading import question_room, split_prompts
from tests.support import small_base

BASE = small_base(max_positions=1024)
STYLE = prompt_style("plain")
TEXT = "Tavin lives in Orvale. The harp of Halvic is old. Mira keeps the oven. " * 3
RECIPE = CompileConfig(
    rank=2, sites=("q",), steps=2, windows=2, queries=2, window=8, cue=4, general=6, answer_tokens=4, eval_every=2
)
CONFIG = c.CompileEval(documents=1, questions=6, general=4, ratios=(16.0,), methods=("compiled", "direct"), answer_tokens=4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("compile")
    return out, c.run_compile(BASE, STYLE, RECIPE, CONFIG, out)


def test_adapters_can_be_distilled_of_documents_of_every_size():
    small = small_base(max_positions=512)
    texts, _ = c.world_items(c.CompileEval(documents=2 * len(c.SIZES), questions=1), 0)
    assert max(check_text(small, text, STYLE) for text in texts.values()) > 0.95 * max(c.SIZES)
    assert question_room(512) == 51
    assert question_room(8192) == 96
    with pytest.raises(InputError, match="reads at most"):
        check_text(small, " ".join(texts.values()), STYLE)


def test_every_column_answers_every_question(ran):
    out, found = ran
    numbers = found["numbers"]
    for column in ("none", "full", "16", "direct-16", "truncated-16", "snapkv-16"):
        assert numbers[f"right/{column}_items"] == 6
    for column in ("none", "full", "16", "direct-16"):
        assert numbers[f"loss/{column}_items"] == 6
        assert 0 < numbers[f"loss/{column}"] < 20
    for column in ("none", "full", "16", "direct-16"):
        assert numbers[f"general/{column}_items"] == 4
    wanted = {f"retain_16x{name}" for name in ("", "_direct", "_truncated", "_snapkv")}
    wanted |= {"harm_points", "harm_points_16x_direct"}
    assert wanted <= set(numbers)
    assert numbers["harm_points"] == numbers["harm_points_16x"]
    assert numbers["seconds/direct-16_items"] == numbers["held_out_kl_recon/16_items"] == 1
    assert c.draw_ratios(out / "ratios.png", numbers, CONFIG).stat().st_size > 1000


def test_buffers_have_a_slot_for_so_many_tokens_and_know_no_question(ran):
    out, _ = ran
    texts, items = c.world_items(CONFIG, 0)
    assert {item.name for item in items} == set(texts)
    for ratio in CONFIG.ratios:
        with open_bank(out / "seed-0" / f"bank-{ratio:g}") as bank:
            for name, text in texts.items():
                tokens = len(BASE.tokenizer.encode(text))
                assert bank.text(name) == text
                assert not bank.questions(name)
                manifest = json.loads((bank.folder(bank.get(name).id) / "memory.json").read_text())
                assert not any(item.question in json.dumps(manifest) for item in items)
                assert abs(manifest["provenance"]["metrics"]["slots"] - tokens / ratio) <= 1


def test_a_second_run_goes_on_with_what_there_is(ran, monkeypatch):
    out, found = ran
    refuse = lambda *args, **more: pytest.fail("was made already")
    monkeypatch.setattr(writers, "compile_context", refuse)
    monkeypatch.setattr(c, "make_subjects", refuse)
    monkeypatch.setattr(c, "Engine", refuse)
    monkeypatch.setattr(c, "ask_kept", refuse)
    monkeypatch.setattr(c, "gold_losses", refuse)
    monkeypatch.setattr(c, "reading_seconds", refuse)
    again = c.run_compile(BASE, STYLE, RECIPE, CONFIG, out)["numbers"]
    own = {"seconds", "peak_mib"}  # of the run itself
    assert {k: v for k, v in again.items() if k not in own} == {k: v for k, v in found["numbers"].items() if k not in own}


def test_the_beginning_has_as_many_tokens_as_there_are_slots():
    text = next(iter(c.world_items(CONFIG, 0)[0].values()))
    start = c.beginning(BASE, text, 16.0)
    assert text.startswith(start.strip())
    assert len(BASE.tokenizer.encode(start)) == -(-len(BASE.tokenizer.encode(text)) // 16)


def test_snapkv_keeps_the_bytes_of_a_buffer_and_has_not_seen_the_question():
    text, header = TEXT, len(split_prompts(BASE.tokenizer, STYLE, TEXT).header)
    tokens = len(split_prompts(BASE.tokenizer, STYLE, text).context)
    for ratio in (2.0, 16.0):
        kept = evict.kept_tokens(BASE, STYLE, text, ratio)
        slots = -(-tokens // int(ratio))
        at = np.asarray(kept.position)
        held = at >= 0
        assert set(held.sum(axis=-1).ravel()) == {header + slots}
        for row, here in zip(at.reshape(-1, at.shape[-1]), held.reshape(-1, at.shape[-1]), strict=True):
            assert set(range(header)) <= set(row[here])  # the prompt's beginning, as beside a buffer
            assert set(range(header + tokens - slots // 2, header + tokens)) <= set(row[here])  # what observed
        assert int(kept.length[0]) == header + tokens  # behind the text, not behind what is left of it


def test_all_tokens_kept_answer_as_the_text_in_the_prompt_does():
    items = [Item("a", "Where does Tavin live?", ("x",)), Item("a", "Who keeps the oven?", ("x",))]
    said = evict.ask_kept(BASE, STYLE, {"b": "Not asked about.", "a": TEXT}, items, 1.0, 4)
    prompts = [read_tokens(BASE.tokenizer, STYLE, TEXT, item.question) for item in items]
    made = generate_all(BASE.model, BASE.params, prompts, BASE.tokenizer.eos_ids, Sampling(max_tokens=4))
    assert said == [BASE.tokenizer.decode(tokens).strip() for tokens in made]


def test_the_loss_of_an_answer_is_that_of_the_whole_prompt():
    item = Item("a", "Where does Tavin live?", ("Orvale",))
    for texts, prompt in (
        ({"a": TEXT}, read_tokens(BASE.tokenizer, STYLE, TEXT, item.question)),
        ({}, ask_tokens(BASE.tokenizer, STYLE, item.question)),
    ):
        gold = BASE.tokenizer.encode(answer_text(BASE.tokenizer, STYLE, "Orvale"))
        ids = jnp.asarray([[*prompt, *gold]])
        hidden = forward(BASE.model, BASE.params, ids, jnp.arange(ids.shape[1])[None]).hidden
        logp = jax.nn.log_softmax(unembed(BASE.model, BASE.params, hidden)[0, len(prompt) - 1 : -1])
        wanted = -float(np.mean([logp[i, token] for i, token in enumerate(gold)]))
        assert gold_losses(BASE, STYLE, [item], texts) == pytest.approx([wanted], abs=1e-4)


def test_a_buffer_of_every_token_loses_what_the_text_does():
    split = split_prompts(BASE.tokenizer, STYLE, TEXT)
    whole = read_prefix(BASE.model, BASE.params, [*split.header, *split.context])
    k, v = (np.asarray(held)[:, 0, len(split.header) : int(whole.length)] for held in (whole.segment.k, whole.segment.v))
    at = np.arange(len(split.header), int(whole.length))
    plain = np.asarray(rotate_layers(BASE.config, k, at, back=True))
    buffer = Buffer(plain, v, len(split.header), len(at), "compact")
    items = [Item("a", "Where does Tavin live?", ("Orvale",)), Item("a", "Who keeps the oven?", ("Mira",))]
    read = gold_losses(BASE, STYLE, items, {"a": TEXT})
    assert gold_losses(BASE, STYLE, items, {}, {"a": buffer}) == pytest.approx(read, abs=1e-3)


def test_other_documents_are_asked_about_by_their_own_judge(tmp_path):
    corpus = Corpus(
        "squad",
        lambda seed: {"a": TEXT},
        lambda seed: [Item("a", "Where does Tavin live?", ("Orvale",))],
        lambda seed: [Item("", "What is 1 + 1?", ("2",))],
        lambda seed: [],
        "contains",
    )
    config = dataclasses.replace(CONFIG, methods=("compiled",), questions=1, general=1)
    numbers = c.run_compile(BASE, STYLE, RECIPE, config, tmp_path, corpus=corpus)["numbers"]
    assert numbers["right/16_items"] == numbers["general/16_items"] == 1
    assert "smol_retain_16x" not in numbers  # of another base
    other = dataclasses.replace(corpus, texts=lambda seed: {"a": f"{TEXT} Halvic is far."})
    with pytest.raises(ConfigError, match="another text called a; give another --out"):
        c.run_compile(BASE, STYLE, RECIPE, config, tmp_path, corpus=other)
    with pytest.raises(ConfigError, match="--sweep"):
        c.run_compile(BASE, STYLE, RECIPE, dataclasses.replace(config, contents=True), tmp_path, corpus=corpus)


def test_questions_that_pay_for_compiling():
    numbers = {f"{key}/{column}": 0.5 for key in ("right", "general") for column in ("full", "none", "16")}
    numbers |= {"right/truncated-16": 0.5, "right/snapkv-16": 0.5, "seconds/16": 60.0, "first_token_seconds/16": 0.5}
    config = dataclasses.replace(CONFIG, methods=("compiled",))
    assert c.figures({**numbers, "first_token_seconds/full": 2.5}, config)["break_even_16x"] == 30.0
    assert "break_even_16x" not in c.figures({**numbers, "first_token_seconds/full": 0.4}, config)
    assert "break_even_16x" not in c.figures(numbers, config)  # a text beyond the window has no other reader


def test_every_method_has_a_column_for_every_ratio():
    columns = c.CompileEval(ratios=(4.0, 16.0), methods=("compiled", "coupled")).columns()
    assert columns == {
        "4": ("compiled", 4),
        "16": ("compiled", 16),
        "coupled-4": ("coupled", 4),
        "coupled-16": ("coupled", 16),
    }
    for changes in c.METHODS.values():
        dataclasses.replace(RECIPE, **changes)


def test_contents_are_lines_and_numbers_of_the_worlds_facts():
    size = lambda text: len(BASE.tokenizer.encode(text))
    for content in contents.CONTENTS:
        doc = contents.content_document(content, 0, 1, 256, size)
        assert 200 < size(doc.text) <= 260
        asked = world.questions(doc, ("one_hop",), 0, 8)
        assert len(asked) == 8
        assert all(question.answer in doc.text for question in asked)
        if content == "lists":
            assert doc.text.count("\n") == len(doc.facts) - 1
        if content == "numbers":
            assert all(fact.object.isdigit() for fact in doc.facts)
    texts, _ = c.content_items(BASE, CONFIG, 0, "prose")
    assert texts == c.world_items(CONFIG, 0)[0]  # whose buffers are compiled already


def test_companions_of_fewer_are_among_those_of_more():
    names = [f"text-{number}" for number in range(9)]
    sets = [together.companions(names, "text-3", count, 0) for count in together.COUNTS]
    for chosen, count in zip(sets, together.COUNTS, strict=True):
        assert len(set(chosen)) == count
        assert "text-3" in chosen
    assert set(sets[0]) < set(sets[1]) < set(sets[2]) < set(sets[3])
    places = {together.companions(names, name, 8, 0).index(name) for name in names}
    assert len(places) > 2


def slots_of(bank, texts):
    """Buffers of two random slots in place of compiled ones."""
    header = len(split_prompts(BASE.tokenizer, STYLE, TEXT).header)
    shape = (BASE.config.num_layers, 2, BASE.config.num_kv_heads, BASE.config.head_size)
    for seed, (name, text) in enumerate(texts.items()):
        if bank.find(name) is None:
            k, v = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
            meta = dataclasses.replace(text_meta(BASE, text, STYLE, RECIPE), kind="buffer")
            write = lambda folder, made=Buffer(k, v, header, 32, "compact"), meta=meta: write_artefact(
                folder, made, SITE_MODULES, meta
            )
            bank.add(name, meta.key, write, text=text)


def test_several_documents_and_other_contents_are_asked_about(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, documents=2, questions=2, methods=("compiled",), together=(1, 2), contents=True)
    bench = c.Bench(BASE, STYLE, RECIPE, config, c.world_corpus(config), tmp_path)
    texts, items = c.world_items(config, 0)
    monkeypatch.setattr(c, "write_buffers", lambda bench, bank, texts, *rest: slots_of(bank, texts))
    monkeypatch.setattr(c, "ask_prompted", lambda bench, items, *rest: [item.answers[0] for item in items])
    monkeypatch.setattr(c, "ask_buffers", lambda bench, bank, items, *rest: [*(i.answers[0] for i in items[:-1]), "?"])
    with bench.bank("16") as bank:
        slots_of(bank, texts)
        said = together.ask_together(BASE, STYLE, bank, items, list(texts), 2, "shift", 4)
        engine = c.Engine(BASE, bank, STYLE)
        order = together.companions(list(texts), items[0].name, 2, 0)
        assert said[0] == read_together(engine, items[0].question, order, "shift", Sampling(max_tokens=4))
    several = c.run_together(bench, 0, list(texts), items)
    assert set(several) == {f"together/{join}-{count}" for join in ("shift", "raw") for count in (1, 2)}
    assert several["together/shift-1"] == several["together/raw-1"]
    found = c.run_contents(bench, 0)
    assert {f"right/full-{content}" for content in contents.CONTENTS} <= set(found)
    numbers = {key: float(np.mean(scores)) for key, scores in {**several, **found}.items()}
    named = ("full", "none", "truncated-16", "snapkv-16", "16")
    numbers |= {f"{key}/{column}": 0.5 for key in ("right", "general") for column in named}
    made = c.figures(numbers, config)
    assert made["retain_16x_lists"] == numbers["right/lists-16"]
    assert 0 < made["retain_16x_numbers"] < 1
    columns = together.together_columns(config.methods, config.together)
    assert together.draw_together(tmp_path / "a.png", numbers, columns).stat().st_size > 1000
    assert contents.draw_contents(tmp_path / "b.png", made, config.ratios).stat().st_size > 1000


def test_distractors_are_the_first_methods_buffers(tmp_path, monkeypatch):
    given = []
    bench = c.Bench(BASE, STYLE, RECIPE, CONFIG, c.world_corpus(CONFIG), tmp_path)
    texts = {"a": TEXT, "b": f"{TEXT} Halvic is far."}

    def compiled(*args, others, **more):
        given.append(others)
        raise InputError("far enough")

    monkeypatch.setattr(writers, "compile_context", compiled)
    monkeypatch.setattr(writers, "general_tasks", lambda *args: None)
    with bench.bank("16") as beside, bench.bank("distractors-16") as bank:
        slots_of(beside, texts)
        with pytest.raises(InputError, match="far enough"):
            c.write_buffers(bench, bank, texts, "distractors", 16.0, beside)
    assert [len(others) for others in given] == [1]  # not its own


def test_wrong_sizes_are_refused():
    with pytest.raises(ConfigError, match="ratios"):
        c.CompileEval(ratios=(0.5,))
    with pytest.raises(ConfigError, match="'magic' is unknown"):
        c.CompileEval(methods=("magic",))
    with pytest.raises(ConfigError, match="name compiled before it"):
        c.CompileEval(methods=("distractors", "compiled"))
    with pytest.raises(ConfigError, match="1 to 4 buffers"):
        c.CompileEval(documents=4, together=(1, 8))
    with pytest.raises(ConfigError, match="general is 0"):
        c.CompileEval(general=0)


def test_every_kind_of_memory_is_drawn_by_its_bytes(tmp_path):
    config = c.CompileEval(1, 2, 2, (4.0, 16.0), answer_tokens=4, adapters=(1, 2))
    evict = EvictRuler(policies_of("streaming,snapkv"), compile_bytes.shares_at(config.ratios))
    few = {"steps": 2, "rows": 3, "keep_batch": 2, "general": 6, "top_k": 4, "held_out": 0.4}
    distil = DistillConfig(sites=("q",), asked=0, turned=20, cloze=0, continued=4, **few)
    found = c.run_compile(BASE, STYLE, RECIPE, config, tmp_path, distil=distil, evict=evict)
    numbers = found["numbers"]
    texts, _ = c.world_items(config, 0)
    (context,) = (len(split_prompts(BASE.tokenizer, STYLE, text).context) for text in texts.values())
    token = numbers["bytes/full"] / context
    shape, itemsize = BASE.config, BASE.params["embed"].dtype.itemsize
    assert token == 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * itemsize
    assert numbers["bytes/tokens-16"] == -(-context // 16) * token
    factors = sum(site_shapes(shape)["q"])
    assert numbers["bytes/adapter-2"] == 2 * numbers["bytes/adapter-1"] == 2 * factors * shape.num_layers * itemsize
    for share in ("0.75", "0.9375"):
        assert numbers[f"right/snapkv/{share}_items"] == numbers["right/adapter-2_items"] == 2
    assert abs(numbers["bytes/streaming/0.75"] / numbers["bytes/tokens-4"] - 1) < 0.02
    lines = compile_bytes.curves(config.by_method(), config.ratios, config.adapters, evict)
    assert list(lines) == ["compiled", "beginning of the text", "adapter", "streaming", "snapkv"]
    assert all(f"bytes/{at}" in numbers and f"right/{column}" in numbers for line in lines.values() for at, column in line)
    assert compile_bytes.draw_bytes(tmp_path / "bytes.png", numbers, lines).stat().st_size > 1000
    assert found["setting"]["evict"]["policies"] == ["streaming", "snapkv"]
    with pytest.raises(ConfigError, match="an adapter of rank 0"):
        c.CompileEval(adapters=(0,))
