"""What sharing the base's cache is worth: trained with and without it, time to the first token, time of a training step.

Adapters trained over the base's cache of the prompt against adapters trained with their own reading of it, both served
over the base's cache (arXiv 2605.28889, Table 8); and the two savings, as ratios on one machine (its Figures 7 and 8).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bank.calibrate import probe_memory
from memjax.bank.store import open_bank
from memjax.bench.timing import SMOLLM2_SHAPE, in_turn, ratio
from memjax.errors import DataError
from memjax.evaluate.bank import Bench, Scores
from memjax.evaluate.corpora import Item
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Adapter, as_slots, init_adapter, insert, make_slots
from memjax.memory.files import Meta, write_artefact
from memjax.models.config import ModelConfig
from memjax.models.decoder import Model, Params, empty_cache, forward, init_params, make_model, site_shapes, unembed
from memjax.models.generate import Sampling, read_prefix
from memjax.models.weights import SITE_MODULES
from memjax.serve.engine import Engine, EngineConfig
from memjax.serve.probe import probe
from memjax.write.distill import distill, general_questions, make_questions, replay_lesson
from memjax.write.prompts import ask_tokens

PROMPT = 480  # tokens of the prompt, and of the context in training
ANSWER, ASK = 16, 16  # tokens of an answer and of a question in the training step


def run_share(bench: Bench, texts: Mapping[str, str], items: Sequence[Item]) -> Scores:
    """{share_trained, share_untrained, share_own: whether each item is answered right} of the documents in `texts`.

    trained: written over the base's cache; untrained: written with the adapter on in the whole question, but served over
    the base's cache; own: the same, served as it was written.
    """
    base, style, recipe = bench.base, bench.style, bench.recipe
    marker = _whole_question(bench, texts)
    if marker <= recipe.marker:
        raise DataError("the questions are too short to tell the two ways of training apart; take longer documents")
    # Rows grow with the marker, so that a step holds as many answers as the recipe's.
    more = (marker - recipe.marker) * max(recipe.row_tokens // recipe.keep_tokens, 1)
    own = dataclasses.replace(recipe, marker=marker, row_tokens=recipe.row_tokens + more)
    bench.folder.mkdir(parents=True, exist_ok=True)
    made: Scores = {"share_trained": [], "share_untrained": [], "share_own": []}
    for how, config in (("shared", recipe), ("alone", own)):
        with open_bank(bench.folder / f"share-{how}", create=True, base_id=base.id, base_name=base.name) as bank:
            replay = None
            for done, (name, text) in enumerate(texts.items()):
                bench.progress(f"writing, {how}", done, len(texts))
                if bank.find(name) is not None:
                    continue
                if replay is None and config.keep and config.general:
                    replay = replay_lesson(base, style, config)
                written = distill(base, text, style, config, replay=replay)
                settings = {"writer": "distill", "share": how, **dataclasses.asdict(config)}
                meta = Meta(base.id, base.tokenizer.id, base.tokenizer.template_id, settings, base_name=base.name)
                # One document, one key: the recipe of a memory that has no source names it.
                meta = dataclasses.replace(meta, recipe={**settings, "document": name})
                write = lambda folder, w=written, m=meta: write_artefact(folder, w.artefact, SITE_MODULES, m)
                bank.add(name, meta.key, write, text=text, questions=probe_memory(base, written, style, config.marker))
            for key, served in (
                ("share_trained", recipe.marker),
                ("share_untrained", recipe.marker),
                ("share_own", marker),
            ):
                if (key == "share_trained") == (how == "shared"):
                    made[key] = _score(bench, bank, items, served)
    return made


def _whole_question(bench: Bench, texts: Mapping[str, str]) -> int:
    """Prompt tokens that can be read with the adapter on in every training prompt: all but what the shortest lacks."""
    base, style, recipe = bench.base, bench.style, bench.recipe
    asked = [q for text in texts.values() for q in make_questions(base, text, style, recipe)]
    asked += general_questions(style, recipe.general) if recipe.keep else []
    return min(len(ask_tokens(base.tokenizer, style, q.text)) for q in asked) - 1


def _score(bench: Bench, bank: Any, items: Sequence[Item], marker: int) -> list[float]:
    how = EngineConfig(candidates=1, rank=bench.recipe.rank, marker=marker, route="retrieval")
    engine = Engine(bench.base, bank, bench.style, how)
    sampling = Sampling(max_tokens=bench.config.answer_tokens)
    said = [engine.ask(item.question, memory=item.name, sampling=sampling).text for item in items]
    return bench.corpus.right(said, items)


# ------------------------------------------------------------------------------------------------------------ two ratios


def first_token_ratio(
    config: ModelConfig = SMOLLM2_SHAPE, prompt: int = PROMPT, rank: int = 16, times: int = 15
) -> dict[str, float]:
    """{ttft_share_ratio, ttft_shared_ms, ttft_fresh_ms}: the first token of another adapter over a prefix that is there,
    against a fresh prefill of the same prompt with it. Random weights: time does not depend on them.
    """
    model, params = _random(config)
    tokens = [int(x) for x in np.random.default_rng(0).integers(5, config.vocab_size, prompt)]
    slots = make_slots(site_shapes(config), config.num_layers, 3, rank)
    for slot in (1, 2):
        adapter = init_adapter(site_shapes(config), config.num_layers, rank, 1.0, jax.random.key(slot))
        slots = insert(slots, slot, adapter)
    prefix = read_prefix(model, params, tokens[:-1])

    slot_ids = itertools.cycle(jnp.asarray([slot], jnp.int32) for slot in (1, 1, 2, 2))  # a round of both calls with each

    def shared() -> jax.Array:
        ids, positions = np.asarray([[tokens[-1]]], np.int32), np.asarray([[prompt - 1]], np.int32)
        cache = empty_cache(config, 1, 16)
        return probe(model, params, ids, positions, cache, prefix.segment, slots, next(slot_ids))[0]

    def fresh() -> jax.Array:
        return _fresh(model, params, np.asarray([tokens], np.int32), slots, next(slot_ids))

    seconds = in_turn({"shared": shared, "fresh": fresh}, times)
    return {
        "ttft_share_ratio": ratio(seconds["shared"], seconds["fresh"]),
        "ttft_shared_ms": 1000 * float(np.median(seconds["shared"])),
        "ttft_fresh_ms": 1000 * float(np.median(seconds["fresh"])),
    }


@partial(jax.jit, static_argnums=0)
def _fresh(model: Model, params: Params, ids: jax.Array, slots: Any, slot_ids: jax.Array) -> jax.Array:
    """Logits [B, V] after a prompt that is read from its beginning with an adapter on."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    out = forward(model, params, ids, positions, slots=slots, slot_ids=slot_ids)
    return unembed(model, params, out.hidden[:, -1])


def train_speedup(
    config: ModelConfig = SMOLLM2_SHAPE, context: int = PROMPT, rows: int = 4, rank: int = 16, times: int = 3
) -> dict[str, float]:
    """{train_speedup, step_seconds_shared, step_seconds_plain}: a distillation step without caches over one with both.

    The same `rows` answers of `ANSWER` tokens to questions of `ASK` tokens in both. With caches the teacher reads question
    and answer over the context's cache, and the student the answer over the base's cache of the question; without, both
    read everything, and the student's gradient runs through the question. The teacher is recomputed in both.
    """
    model, params = _random(config)
    adapter = init_adapter(site_shapes(config), config.num_layers, rank, 2.0, jax.random.key(0))
    rng = np.random.default_rng(0)
    text = rng.integers(5, config.vocab_size, context).astype(np.int32)
    asked = jnp.asarray(rng.integers(5, config.vocab_size, (rows, ASK)), jnp.int32)
    said = rng.integers(5, config.vocab_size, (rows, ANSWER)).astype(np.int32)
    held = read_prefix(model, params, text.tolist()).segment
    question = forward(model, params, asked[:, :-1], _places(rows, ASK - 1), empty_cache(config, rows, ASK - 1)).cache
    trained = {"a": adapter.a, "b": adapter.b}
    calls = {
        "shared": lambda: _shared_step(model, params, trained, held, question, asked, said),
        "plain": lambda: _plain_step(model, params, trained, text, asked, said),
    }
    seconds = in_turn(calls, times)
    return {
        "train_speedup": ratio(seconds["plain"], seconds["shared"]),
        "step_seconds_shared": float(np.median(seconds["shared"])),
        "step_seconds_plain": float(np.median(seconds["plain"])),
    }


def _places(rows: int, length: int, start: int = 0) -> jax.Array:
    return jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), (rows, length))


def _kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    logp, logq = (jax.nn.log_softmax(x, axis=-1) for x in (teacher, student))
    return (jnp.exp(logp) * (logp - logq)).sum(axis=-1).mean()


@partial(jax.jit, static_argnums=0)
def _shared_step(
    model: Model, params: Params, trained: Any, held: Any, question: Any, asked: jax.Array, said: jax.Array
) -> tuple[jax.Array, Any]:
    """(KL, gradient) of a step over both caches."""
    rows, length = said.shape
    fed = jnp.concatenate([asked, said[:, :-1]], axis=1)
    places = held.position.max() + 1 + _places(rows, fed.shape[1])
    teacher = unembed(model, params, forward(model, params, fed, places, segments=(held,)).hidden[:, ASK - 1 :])
    prefix = Segment(question.k, question.v, question.position)
    ids = jnp.concatenate([asked[:, -1:], said[:, :-1]], axis=1)

    def loss(trained: Any) -> jax.Array:
        slots = as_slots(Adapter(trained["a"], trained["b"], jnp.float32(2.0)))
        out = forward(model, params, ids, _places(rows, length, ASK - 1), segments=(prefix,), slots=slots)
        return _kl(jax.lax.stop_gradient(teacher), unembed(model, params, out.hidden))

    return jax.value_and_grad(loss)(trained)


@partial(jax.jit, static_argnums=0)
def _plain_step(
    model: Model, params: Params, trained: Any, text: jax.Array, asked: jax.Array, said: jax.Array
) -> tuple[jax.Array, Any]:
    """(KL, gradient) of a step in which teacher and student read everything anew."""
    rows, length = said.shape
    ids = jnp.concatenate([asked, said[:, :-1]], axis=1)
    whole = jnp.concatenate([jnp.broadcast_to(text, (rows, len(text))), ids], axis=1)
    out = forward(model, params, whole, _places(rows, whole.shape[1]))
    teacher = unembed(model, params, out.hidden[:, -length:])

    def loss(trained: Any) -> jax.Array:
        slots = as_slots(Adapter(trained["a"], trained["b"], jnp.float32(2.0)))
        out = forward(model, params, ids, _places(rows, ids.shape[1]), slots=slots)
        return _kl(jax.lax.stop_gradient(teacher), unembed(model, params, out.hidden[:, -length:]))

    return jax.value_and_grad(loss)(trained)


def _random(config: ModelConfig) -> tuple[Model, Params]:
    return make_model(config), init_params(config, jax.random.key(0))
