"""A bank of three memories of a small random base, and an engine over it; the fixture `bank` is in conftest.py."""

import dataclasses

import jax
import numpy as np

from memjax.bank.calibrate import GATE
from memjax.bank.gate import Gate
from memjax.memory.buffer import Buffer
from memjax.memory.files import Meta, write_artefact
from memjax.models.decoder import forward
from memjax.models.generate import Sampling, generate
from memjax.models.weights import SITE_MODULES
from memjax.serve.engine import Engine, EngineConfig
from memjax.write.prompts import ask_tokens, prompt_style, read_tokens
from memjax.write.reading import split_prompts
from tests.support import random_adapter, small_base

BASE = small_base(max_positions=1024)
STYLE = prompt_style("plain")
SAMPLING = Sampling(max_tokens=8)
_read = jax.jit(forward, static_argnums=0, static_argnames=("taps",))
TEXTS = {
    "ferry": "The ferry to Vask leaves at 6:40.",
    "harp": "The harp of Halvic has 72 strings.",
    "oven": "The oven of Brindle bakes chestnut bread.",
}


def add(bank, name, seed, base=BASE, text=None, rank=4, questions=None):
    meta = Meta(base.id, base.tokenizer.id, base.tokenizer.template_id, {"seed": seed}, base_name=base.name)
    write = lambda folder: write_artefact(folder, random_adapter(base.config, seed, rank), SITE_MODULES, meta)
    return bank.add(name, meta.key, write, text=text or TEXTS.get(name, name), questions=questions)


def whole_buffer(text):
    """A buffer of a slot per token, the base's own keys and values of a text: read, it is the text in the prompt."""
    split = split_prompts(BASE.tokenizer, STYLE, text)
    before, count = len(split.header), len(split.context)
    ids = np.asarray([[*split.header, *split.context]], np.int32)
    out = _read(BASE.model, BASE.params, ids, np.arange(before + count)[None], taps=("k_raw", "v"))
    k, v = (np.asarray(out.taps[name][:, 0, before:]) for name in ("k_raw", "v"))
    return Buffer(k, v, before, count, "spread")


def add_buffer(bank, name, text=None, questions=None, template_id=BASE.tokenizer.template_id, **changes):
    buffer = dataclasses.replace(whole_buffer(text or TEXTS[name]), **changes)
    recipe = {"writer": "compile", "text": text or TEXTS[name], **changes}
    meta = Meta(BASE.id, BASE.tokenizer.id, template_id, recipe, kind="buffer", base_name=BASE.name)
    write = lambda folder: write_artefact(folder, buffer, SITE_MODULES, meta)
    return bank.add(name, meta.key, write, text=text or TEXTS[name], questions=questions)


def read_text(text, question, history=()):
    """What the base says with the text in its prompt."""
    tokens = read_tokens(BASE.tokenizer, STYLE, text, question, history)
    out = generate(BASE.model, BASE.params, [tokens], BASE.tokenizer.eos_ids, SAMPLING)
    return BASE.tokenizer.decode(out[0]).strip()


def engine(bank, **config):
    return Engine(BASE, bank, STYLE, EngineConfig(**{"candidates": 3, "resident": 4, "rank": 4, **config}))


def set_gate(bank, threshold, base_id=BASE.id):
    gate = Gate(threshold, 1.0, 1, 1, base_id, BASE.tokenizer.template_id, bank.version)
    bank.set_record(GATE, dataclasses.asdict(gate), "default")


def base_text(question):
    tokens = ask_tokens(BASE.tokenizer, STYLE, question)
    out = generate(BASE.model, BASE.params, [tokens], BASE.tokenizer.eos_ids, SAMPLING)
    return BASE.tokenizer.decode(out[0]).strip()
