"""What internalised documents do beside answering: harm to other questions, likeness, and several of them at once.

An adapter that a hypernetwork emits is on whatever is asked, so an unrelated document has to leave answers as they are, and
documents that are added up have to leave the text whole (arXiv 2602.15902, section 12 of whose numbers says that its own
does neither).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np

from memjax.evaluate import niah
from memjax.evaluate.metrics import exact_match
from memjax.evaluate.qa import ANSWER_TOKENS, SPLIT, Scores, WorldItem, common_items, first_line
from memjax.evaluate.subjects import ROWS, Query, answer_with, query_tokens
from memjax.evaluate.world import documents, questions
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Adapter, Slots, recompress, side_by_side, update_inner
from memjax.models.base import Base
from memjax.models.decoder import Model, Params, forward, unembed
from memjax.models.generate import bucket, pad_prompts
from memjax.write.hypernet.chunks import document_tokens
from memjax.write.hypernet.encode import Hyper, Weigh, encode, encode_chunks
from memjax.write.prompts import PromptStyle

RULES: dict[str, Weigh] = {"sum": "sum", "root": "root", "mean": "mean", "level": "level", "svd": "sum"}
SVD_RANK = 16  # what the rule "svd" brings the sum of all documents to
TOKENS = 200  # of a document of the world
NEEDLE_BIN = (128, 256)  # tokens of a needle's document
ASKED = 4  # questions about a document of the world
UNRELATED = 24  # documents whose text is read for its perplexity


def internalized_items(base: Base, learnt: str, seed: int, limit: int) -> list[WorldItem]:
    """`limit` questions of what a network has learnt: "niah", a needle in each document; "world", some of each document."""
    if learnt == "niah":
        lines = niah.line_counts(lambda text: len(base.tokenizer.encode(text)), *NEEDLE_BIN)
        found = [niah.needle(lines, index, seed=niah.SEED + seed) for index in range(limit)]
        return [WorldItem(learnt, Query(n.question, n.context), n.answer) for n in found]
    docs = documents(SPLIT, seed, -(-limit // ASKED), TOKENS)
    asked = [(doc, q) for doc in docs for q in questions(doc, ["one_hop"], seed, ASKED)]
    return [WorldItem(q.kind, Query(q.text, doc.text), q.answer) for doc, q in asked][:limit]


def write_document(base: Base, hyper: Hyper, style: PromptStyle, text: str) -> Adapter:
    """The adapter of a text that fits one chunk, or of its chunks without overlap."""
    return encode(base, hyper, document_tokens(base.tokenizer, style, text))


def write_together(base: Base, hyper: Hyper, style: PromptStyle, texts: Sequence[str], rule: str) -> Adapter:
    """The adapter of several texts, each a chunk, by one of RULES."""
    chunks = [document_tokens(base.tokenizer, style, text) for text in texts]
    made = encode_chunks(base, hyper, chunks, weigh=RULES[rule])
    return recompress(made, SVD_RANK)[0] if rule == "svd" else made


def answers(base: Base, style: PromptStyle, adapters: Sequence[Adapter], asked: Sequence[str]) -> list[str]:
    """The first line of what each question is answered with, one adapter for each."""
    prompts = [query_tokens(base, style, Query(question)) for question in asked]
    said: list[str] = []
    for begin in range(0, len(prompts), ROWS):
        part = slice(begin, begin + ROWS)
        made = answer_with(base, adapters[part], prompts[part], ANSWER_TOKENS)
        said += [first_line(base.tokenizer.decode(tokens)) for tokens in made]
    return said


def harm_scores(
    base: Base,
    hyper: Hyper,
    style: PromptStyle,
    learnt: str,
    seed: int,
    limit: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """What an adapter does to questions that are none of its document's; scores of each item.

    common_base, common_adapter: exact match on common knowledge, of the base and with the adapter of a document that has
    nothing to do with it, `limit` facts; same: whether both say the same. cosine: of the updates of two documents, for
    `limit` pairs. moved_own, moved_other: KL [nats] of the next token, behind a question, of the base to the base with the
    adapter of the question's document, and of another one; an adapter of use moves the first and hardly the second.
    """
    facts = common_items(seed, limit, document=False)
    items = internalized_items(base, learnt, seed, limit)
    # The world's documents beside a network of needles: of those, every needle's document answers every needle's question.
    others = [doc.text for doc in documents(SPLIT, seed, -(-limit // ASKED), TOKENS, start=5000)]
    own = [item.query.context or "" for item in items]
    texts = list(dict.fromkeys(own))
    written: dict[str, Adapter] = {}
    for text in dict.fromkeys([*texts, *others]):
        written[text] = write_document(base, hyper, style, text)
        progress(len(written), len(texts) + len(others))
    strangers = [written[others[i % len(others)]] for i in range(limit)]
    asked = [fact.query.question for fact in facts]
    nothing = nothing_of(strangers[0])
    plain = answers(base, style, [nothing] * len(facts), asked)
    told = answers(base, style, strangers[: len(facts)], asked)
    rng = Random(f"internalize/{seed}")
    pairs = [rng.sample(texts, 2) for _ in range(limit)] if len(texts) > 1 else []
    moves = partial(moved, base, style, [item.query.question for item in items])
    return {
        "common_base": [exact_match(said, [fact.answer]) for said, fact in zip(plain, facts, strict=True)],
        "common_adapter": [exact_match(said, [fact.answer]) for said, fact in zip(told, facts, strict=True)],
        "same": [float(one == other) for one, other in zip(plain, told, strict=True)],
        "cosine": [cosine(written[one], written[other]) for one, other in pairs],
        "moved_own": moves([written[text] for text in own]),
        "moved_other": moves(strangers[: len(items)]),
    }


def stack_scores(
    base: Base,
    hyper: Hyper,
    style: PromptStyle,
    learnt: str,
    seed: int,
    limit: int,
    counts: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Questions about one of N documents that are internalised together, by each of RULES; scores of each item.

    right/RULE-N: exact match; the others are documents of the world that the question is not about, and lie before and
    behind. surprise/RULE-N: nats per token of unrelated text with that adapter on for all of it, less the base's, for
    UNRELATED documents: its exponential is the perplexity's ratio.
    """
    items = internalized_items(base, learnt, seed, limit)
    own = [item.query.context or "" for item in items]
    beside = [doc.text for doc in documents(SPLIT, seed, max(counts) * 4, TOKENS, start=6000)]
    unrelated = [doc.text for doc in documents(SPLIT, seed, UNRELATED, TOKENS, start=7000)]
    bare = surprise(base, style, unrelated, None)
    made: Scores = {}
    total, done = len(RULES) * len(counts), 0
    for rule in RULES:
        for count in counts:
            stacks = [companions(text, beside, count, Random(f"{seed}/{n}")) for n, text in enumerate(own)]
            written = {stack: write_together(base, hyper, style, stack, rule) for stack in dict.fromkeys(stacks)}
            said = answers(base, style, [written[stack] for stack in stacks], [item.query.question for item in items])
            made[f"right/{rule}-{count}"] = [exact_match(x, [item.answer]) for x, item in zip(said, items, strict=True)]
            adapters = [written[stacks[n % len(stacks)]] for n in range(len(unrelated))]
            loaded = surprise(base, style, unrelated, adapters)
            made[f"surprise/{rule}-{count}"] = [after - before for after, before in zip(loaded, bare, strict=True)]
            done += 1
            progress(done, total)
    return made


def companions(own: str, beside: Sequence[str], count: int, rng: Random) -> tuple[str, ...]:
    """`count` texts in any order, `own` among them."""
    chosen = [own, *rng.sample([text for text in beside if text != own], count - 1)]
    return tuple(rng.sample(chosen, count))


def stack_numbers(numbers: Mapping[str, float]) -> dict[str, float]:
    """perplexity/RULE-N: the ratio of unrelated text's perplexity with the adapters to the base's, for every `surprise`,
    with its interval and how many texts it is of."""
    found = {key.partition("/")[2]: value for key, value in numbers.items() if key.startswith("surprise/")}
    ratio = lambda name, value: value if name.endswith("_items") else float(np.exp(value))
    return {f"perplexity/{name}": ratio(name, value) for name, value in found.items()}


def nothing_of(adapter: Adapter) -> Adapter:
    """An adapter of the same shapes that changes nothing."""
    return dataclasses.replace(adapter, b={site: jnp.zeros_like(b) for site, b in adapter.b.items()})


def cosine(one: Adapter, other: Adapter) -> float:
    """The cosine between two adapters' updates, over all sites and layers as one vector; the updates are never formed."""
    return inner(one, other) / max(np.sqrt(inner(one, one) * inner(other, other)), 1e-30)


def inner(one: Adapter, other: Adapter) -> float:
    """The sum over sites and layers of the updates' inner products."""
    return float(sum(product.sum() for product in update_inner(one, other).values()))


def moved(base: Base, style: PromptStyle, asked: Sequence[str], adapters: Sequence[Adapter]) -> list[float]:
    """KL [nats] of the base's next token behind each question to that with the adapter on for the prompt's last token."""
    prompts = [query_tokens(base, style, Query(question)) for question in asked]
    said: list[float] = []
    for begin in range(0, len(prompts), ROWS):
        part, own = prompts[begin : begin + ROWS], adapters[begin : begin + ROWS]
        plain, told = (next_logits(base, part, given) for given in ([nothing_of(x) for x in own], own))
        p, q = (jax.nn.log_softmax(x, axis=-1) for x in (plain, told))
        said += np.asarray((jnp.exp(p) * (p - q)).sum(axis=-1), np.float64)[: len(part)].tolist()
    return said


def next_logits(base: Base, prompts: Sequence[Sequence[int]], adapters: Sequence[Adapter]) -> jax.Array:
    """Logits [B, V] float32 behind each prompt; the adapter is on for its last token, as `answer_with` reads."""
    ids, positions = pad_prompts([prompt[:-1] for prompt in prompts], len(prompts), bucket(max(map(len, prompts))))
    last = np.asarray([prompt[-1:] for prompt in prompts], np.int32)
    return _next(base.model, base.params, ids, positions, last, side_by_side(adapters))


@partial(jax.jit, static_argnums=0)
def _next(model: Model, params: Params, ids: jax.Array, positions: jax.Array, last: jax.Array, slots: Slots) -> jax.Array:
    read = forward(model, params, ids, positions, taps=("k", "v")).taps
    before = Segment(read["k"], read["v"], positions)
    place, rows = positions.max(axis=1, keepdims=True) + 1, jnp.arange(len(ids), dtype=jnp.int32)
    out = forward(model, params, last, place, segments=[before], slots=slots, slot_ids=rows)
    return unembed(model, params, out.hidden[:, 0]).astype(jnp.float32)


def surprise(base: Base, style: PromptStyle, texts: Sequence[str], adapters: Sequence[Adapter] | None) -> list[float]:
    """Nats per token of each text behind the template's header, with an adapter of its own on for all of it, or none."""
    wrapped = [document_tokens(base.tokenizer, style, text) for text in texts]
    length = max(map(len, wrapped))
    said: list[float] = []
    for begin in range(0, len(wrapped), ROWS):
        part = wrapped[begin : begin + ROWS]
        ids, positions = pad_prompts(part, len(part), length)
        slots = side_by_side(adapters[begin : begin + ROWS]) if adapters is not None else None
        said += np.asarray(_surprise(base.model, base.params, ids, positions, slots), np.float64).tolist()
    return said


@partial(jax.jit, static_argnums=0)
def _surprise(model: Model, params: Params, ids: jax.Array, positions: jax.Array, slots: Slots | None) -> jax.Array:
    rows = jnp.arange(len(ids), dtype=jnp.int32)
    out = forward(model, params, ids, positions, slots=slots, slot_ids=None if slots is None else rows)
    logp = jax.nn.log_softmax(unembed(model, params, out.hidden[:, :-1]).astype(jnp.float32), axis=-1)
    each = -jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
    told = (positions[:, 1:] > 0).astype(jnp.float32)
    return (each * told).sum(axis=1) / told.sum(axis=1)


def draw_stack(path: Path, numbers: Mapping[str, float], counts: Sequence[int]) -> Path:
    """Draws exact match and perplexity by how many documents are internalised together into the PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("right", "perplexity"), ("exact match", "perplexity of other text / base's"), strict=True
    ):
        for rule in RULES:
            axes.plot(
                counts,
                [numbers[f"{key}/{rule}-{count}"] for count in counts],
                marker="o",
                label=rule,
                linestyle="--" if rule == "svd" else "-",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("documents together")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)
    return path
