"""A bank of three memories of a small random base, and an engine over it; the fixture `bank` is in conftest.py."""

import dataclasses

from memjax.bank.calibrate import GATE
from memjax.bank.gate import Gate
from memjax.memory.files import Meta, write_artefact
from memjax.models.generate import Sampling, generate
from memjax.models.weights import SITE_MODULES
from memjax.serve.engine import Engine, EngineConfig
from memjax.write.prompts import ask_tokens, prompt_style
from tests.support import random_adapter, small_base

BASE = small_base(max_positions=1024)
STYLE = prompt_style("plain")
SAMPLING = Sampling(max_tokens=8)
TEXTS = {
    "ferry": "The ferry to Vask leaves at 6:40.",
    "harp": "The harp of Halvic has 72 strings.",
    "oven": "The oven of Brindle bakes chestnut bread.",
}


def add(bank, name, seed, base=BASE, text=None, rank=4, questions=None):
    meta = Meta(base.id, base.tokenizer.id, base.tokenizer.template_id, {"seed": seed}, base_name=base.name)
    write = lambda folder: write_artefact(folder, random_adapter(base.config, seed, rank), SITE_MODULES, meta)
    return bank.add(name, meta.key, write, text=text or TEXTS.get(name, name), questions=questions)


def engine(bank, **config):
    return Engine(BASE, bank, STYLE, EngineConfig(**{"candidates": 3, "resident": 4, "rank": 4, **config}))


def set_gate(bank, threshold, base_id=BASE.id):
    gate = Gate(threshold, 1.0, 1, 1, base_id, BASE.tokenizer.template_id, bank.version)
    bank.set_record(GATE, dataclasses.asdict(gate), "default")


def base_text(question):
    tokens = ask_tokens(BASE.tokenizer, STYLE, question)
    out = generate(BASE.model, BASE.params, [tokens], BASE.tokenizer.eos_ids, SAMPLING)
    return BASE.tokenizer.decode(out[0]).strip()
