"""Training a hypernetwork: on needles in a haystack, as in Doc-to-LoRA (arXiv 2602.15902, section 4.1), and on questions.

Documents are those of `evaluate.niah` in the training bins, those of the invented world's training split, and passages that
the base has asked itself about (`memjax data selfgen`), each cut into a random number of chunks; beside them come prompts
that have nothing to do with the document, or that have none, which the adapter must leave as the base says them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config import to_dict
from memjax.errors import ConfigError
from memjax.evaluate import niah
from memjax.evaluate.pretrain_long import prose
from memjax.evaluate.world import QUESTION_KINDS, Document, Question, document, documents, questions
from memjax.evaluate.world.documents import MIN_TOKENS, random_document
from memjax.models.base import Base
from memjax.models.generate import Sampling, generate_all, read_prefix
from memjax.sharding import MeshConfig, build_mesh, fetch, put, shardings
from memjax.train.base import load
from memjax.train.checkpoint import start_of
from memjax.train.data import EXAMPLES
from memjax.train.fit import FitConfig, Fitted, fit
from memjax.train.optimizer import OptimizerConfig
from memjax.write.distill import general_questions
from memjax.write.hypernet.batches import BatchShape, Example, make_batch, one_hot
from memjax.write.hypernet.chunks import Affixes, affixes_of, document_tokens, split_evenly
from memjax.write.hypernet.encode import Hyper
from memjax.write.hypernet.files import load_hyper, save_hyper
from memjax.write.hypernet.loss import Reader, hyper_loss, read_answers, write_documents
from memjax.write.hypernet.network import HyperConfig, hyper_counts, init_hyper
from memjax.write.hypernet.selfgen import Records
from memjax.write.prompts import PromptStyle, answer_text, ask_tokens, prompt_style, read_tokens
from memjax.write.reading import header_tokens
from memjax.write.tasks import scored
from memjax.write.teacher import BLOCK, header_length

HYPER = "hyper"  # the folder within a run's that holds the trained hypernetwork
STRIDE = 4096  # documents that a step may draw from, more than it ever does
NEEDLE_TOKENS = 12  # of the line that holds the number
PROSE = 0.85  # how long a document of the invented world is, as a share of what it is with a line for each sentence
_VALIDATION = 2**40  # where validation's documents begin
_PASSAGES = 2**41  # and those whose text is read as it is


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """What is drawn: documents of the length bins in turn, in 1, 2, … chunks with the probabilities `chunk_shares`, as far
    as chunks keep at least `least` and at most `most` tokens (the wrapped document's own), with `overlap` between
    neighbours. Shares of examples: `unrelated` (a document, and a general prompt), `nothing` (the general prompt alone).
    Shares of documents: `world` of the invented world, of one of the lengths `world_tokens`, each with `shape.questions`
    questions of the `kinds` in turn, their forms changed a little with `vary` (`world.vary`);
    `recorded` of the folder `records`, with the base's own answers; the rest holds needles, of which the share `prose` lies
    among sentences of the invented world's training split instead of one line said again and again, or in the share
    `spelled` of these among words that the tokenizer has to spell (`pretrain_long.prose`), as it does any English text.
    """

    bins: tuple[tuple[int, int], ...] = niah.TRAIN_BINS
    chunk_shares: tuple[float, ...] = (0.5, 0.125, *(0.0625,) * 6)
    least: int = 25
    most: int = 512
    overlap: int = 0
    unrelated: float = 0.1
    nothing: float = 0.05
    world: float = 0.0
    world_tokens: tuple[int, ...] = (64, 96, 128, 192, 240)
    kinds: tuple[str, ...] = QUESTION_KINDS
    vary: bool = False
    recorded: float = 0.0
    records: str | None = None
    prose: float = 0.0
    spelled: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.bins or not self.chunk_shares or min(self.chunk_shares) < 0 or sum(self.chunk_shares) <= 0:
            raise ConfigError("data.bins and data.chunk_shares must not be empty, and shares must be positive")
        if min(self.unrelated, self.nothing) < 0 or self.unrelated + self.nothing >= 1:
            raise ConfigError("data.unrelated and data.nothing are shares of the examples; together they stay below 1")
        if min(self.world, self.recorded) < 0 or self.world + self.recorded > 1 or not self.world_tokens:
            raise ConfigError("data.world and data.recorded are shares of the documents; together they are at most 1")
        if not self.kinds or set(self.kinds) - set(QUESTION_KINDS):
            raise ConfigError(f"data.kinds are {', '.join(self.kinds) or 'none'}; use {', '.join(QUESTION_KINDS)}")
        if not 0 <= self.prose <= 1:
            raise ConfigError(f"data.prose is {self.prose}; it is a share of the needles, from 0 to 1")
        if not 0 <= self.spelled <= 1:
            raise ConfigError(f"data.spelled is {self.spelled}; it is a share of the needles in prose, from 0 to 1")
        if (self.recorded > 0) != (self.records is not None):
            raise ConfigError("data.records is a folder of memjax data selfgen, data.recorded its share; give both")
        if not 0 <= self.overlap < self.least:
            raise ConfigError(f"data.overlap is {self.overlap}; give 0 to below least={self.least}")
        if self.seed == niah.SEED:
            raise ConfigError(f"data.seed {niah.SEED} draws the needles that evaluation draws; take another")


@dataclasses.dataclass(frozen=True)
class HypernetConfig:
    """A training run. base: path or name; network: the hypernetwork's shape; teacher "answer": cross-entropy on the number;
    "base": the `shape.top_k` most likely tokens of the base with the document in its prompt. l1: weight of the adapters'
    mean absolute value; marker: tokens of a prompt that are read with the adapter on, 1 being how the bank's engine reads
    and 0 the paper's whole prompt. general: prompts that have nothing to do with any document; answer_tokens: how much of
    the base's own answers to them counts; passages: beside them, so many stretches of the world's training documents, whose
    tokens must stay as likely as they are to the base. max_chunk: what the trained network takes as its longest chunk, 0
    for the longest document of `data`. start: a hypernetwork's folder to begin from, with a fresh optimizer (a second
    stage); b_scale: what the scalers of B start at where there is none (see `init_hyper`; 0 is the paper's).
    validation: needles that are scored at every evaluation.
    """

    base: str = "tiny"
    network: HyperConfig = dataclasses.field(default_factory=HyperConfig)
    data: NeedleConfig = dataclasses.field(default_factory=NeedleConfig)
    shape: BatchShape = dataclasses.field(default_factory=BatchShape)
    teacher: Literal["answer", "base"] = "answer"
    l1: float = 1.5
    marker: int = 1
    general: int = 160
    passages: int = 0
    answer_tokens: int = 6
    max_chunk: int = 0
    start: str | None = None
    b_scale: float = 0.0
    validation: int = 64
    remat: bool = False
    fit: FitConfig = dataclasses.field(
        default_factory=lambda: FitConfig(
            optimizer=OptimizerConfig(learning_rate=4e-5, warmup=100, final=0.0025, beta2=0.999, weight_decay=0.01)
        )
    )
    mesh: MeshConfig | None = None

    def __post_init__(self) -> None:
        if (
            min(self.l1, self.marker, self.max_chunk, self.passages) < 0
            or min(self.general, self.answer_tokens, self.validation) < 1
        ):
            raise ConfigError(
                "l1, marker, max_chunk and passages are at least 0; general, answer_tokens and validation at least 1"
            )
        if self.answer_tokens > self.shape.answer:
            raise ConfigError(
                f"answer_tokens={self.answer_tokens} do not fit shape.answer={self.shape.answer}; enlarge shape"
            )
        if len(self.data.chunk_shares) > self.shape.chunks:
            raise ConfigError(f"shape.chunks is {self.shape.chunks} and data draws up to {len(self.data.chunk_shares)}")
        if self.shape.groups * self.shape.documents > STRIDE:
            raise ConfigError(f"shape.groups times shape.documents is above {STRIDE}; take fewer, and fit.accumulate")
        if self.shape.groups % self.fit.accumulate:
            raise ConfigError(f"shape.groups is {self.shape.groups}; fit.accumulate={self.fit.accumulate} must divide it")


@dataclasses.dataclass(frozen=True)
class Needles:
    """Where examples come from: the base with its style and template, line counts of each bin, and general prompts with
    the base's own answers.
    """

    base: Base
    config: HypernetConfig
    style: PromptStyle
    affixes: Affixes
    counts: tuple[Sequence[int], ...]
    general: tuple[Example, ...]
    records: Records | None = None


class Item(NamedTuple):
    """A document with a question about it and the answer."""

    context: str
    question: str
    answer: str


def open_needles(base: Base, config: HypernetConfig) -> Needles:
    """The source of examples for a base; it answers the general prompts, once."""
    style = prompt_style(base.tokenizer.prompt_style)
    count = lambda text: len(base.tokenizer.encode(text))
    counts = tuple(niah.line_counts(count, *tokens) for tokens in config.data.bins)
    general = tuple(_general_examples(base, style, config))
    records = Records(config.data.records, base) if config.data.records else None
    if records is not None and (records.top_k != config.shape.top_k or not len(records)):
        raise ConfigError(
            f"{config.data.records} holds {len(records)} records of {records.top_k} classes and shape.top_k is "
            f"{config.shape.top_k}; make them equal"
        )
    return Needles(base, config, style, affixes_of(base.tokenizer, style), counts, general, records)


def batch_at(needles: Needles, step: int, begin: int = 0) -> dict[str, np.ndarray]:
    """The batch of a step with its `examples`: a pure function of the seed and the step, so that a run can be resumed."""
    shape = needles.config.shape
    first = begin + step * STRIDE
    indices = range(first, first + shape.groups * shape.documents)
    batch = make_batch(_examples(needles, indices), shape, needles.config.marker)
    return {**batch, EXAMPLES: np.asarray(indices)}


def chunk_count(rng: np.random.Generator, data: NeedleConfig, tokens: int) -> int:
    """How many chunks a wrapped document of so many tokens is cut into (the reference's second stage)."""
    most, least = math.ceil(tokens / data.least), math.ceil(tokens / data.most)
    counts = np.arange(1, len(data.chunk_shares) + 1)
    shares = np.where((counts >= least) & (counts <= most), data.chunk_shares, 0.0)
    if not shares.sum():  # the reference crashes here
        return min(max(least, 1), len(counts))
    return int(rng.choice(counts, p=shares / shares.sum()))


def _examples(needles: Needles, indices: Sequence[int]) -> Iterator[Example]:
    """The examples of the documents of these numbers, in their order."""
    data, base, most = needles.config.data, needles.base, needles.config.shape.questions
    drawn: list[tuple[Item | None, Example]] = []
    for index in indices:
        rng = np.random.default_rng([data.seed, index])
        found, recorded = _drawn(needles, rng, index, most)
        tokens = document_tokens(base.tokenizer, needles.style, found[0].context)
        chunks = tuple(split_evenly(tokens, needles.affixes, chunk_count(rng, data, len(tokens)), data.overlap))
        kind = rng.random()
        for item in found:
            other = needles.general[rng.integers(len(needles.general))]
            if kind < data.nothing:
                drawn.append((None, dataclasses.replace(other, chunks=())))
                break
            if kind < data.nothing + data.unrelated:
                drawn.append((None, dataclasses.replace(other, chunks=chunks)))
            elif recorded is not None:
                drawn.append((None, _recorded(needles, recorded, chunks)))
            else:
                drawn.append((item, _asked(needles, item, chunks)))
            kind = rng.uniform(data.nothing, 1.0)  # of the next question: there is a document
    if needles.config.teacher == "base":
        drawn = _taught(needles, drawn)
    return iter([example for _, example in drawn])


def _drawn(needles: Needles, rng: np.random.Generator, index: int, most: int) -> tuple[list[Item], dict[str, Any] | None]:
    """(up to `most` questions of one document, the record that it is of, if it is of one)."""
    data = needles.config.data
    source = rng.random() if data.world + data.recorded > 0 else 1.0
    if source < data.world:
        tokens = int(rng.choice(data.world_tokens))
        doc = (
            random_document(Random(f"{data.seed}/{index}"), "train", tokens, True)
            if data.vary
            else document("train", data.seed, index, tokens)
        )
        return [Item(doc.text, asked.text, asked.answer) for asked in _asked_of(doc, data.kinds, rng, index, most)], None
    if source < data.world + data.recorded and needles.records is not None:
        record = needles.records[int(rng.integers(len(needles.records)))]
        return [Item(record["text"], record["question"], record["answer"])], record
    part = rng.integers(len(needles.counts))
    if data.prose and rng.random() < data.prose:
        needle = _in_prose(needles, rng, index, data.bins[part])
    else:
        needle = niah.needle(needles.counts[part], index, seed=data.seed)
    return [Item(needle.context, needle.question, needle.answer)], None


def _asked_of(doc: Document, kinds: Sequence[str], rng: np.random.Generator, index: int, most: int) -> list[Question]:
    """Up to `most` questions about a document, of the kinds in turn in a drawn order: one named twice has two turns."""
    waiting = {kind: questions(doc, [kind], index, most) for kind in dict.fromkeys(kinds)}
    turns = [kinds[int(i)] for i in rng.permutation(len(kinds))]
    asked: list[Question] = []
    while len(asked) < most and any(waiting.values()):
        asked += [waiting[kind].pop(0) for kind in turns if waiting[kind]]
    if not asked:
        asked = questions(doc, QUESTION_KINDS, index, 1)
    return asked[:most]


def _in_prose(needles: Needles, rng: np.random.Generator, index: int, tokens: tuple[int, int]) -> niah.Needle:
    """A needle among the sentences of a document of the invented world, or of spelled words, about as long as a bin's."""
    data = needles.config.data
    room = max(int(rng.integers(*tokens) * PROSE) - NEEDLE_TOKENS, MIN_TOKENS)
    if data.spelled and rng.random() < data.spelled:
        every = niah.sentences(" ".join(prose(Random(f"{data.seed}/{index}"), room)))
        lengths = np.cumsum([len(needles.base.tokenizer.encode(line)) for line in every])
        lines = every[: max(1, int(np.searchsorted(lengths, room, side="right")))]
    else:
        lines = niah.sentences(documents("train", data.seed, 1, room, index)[0].text)
    return niah.needle([len(lines) + 1], index, seed=data.seed, filler=lines)


def _recorded(needles: Needles, record: Mapping[str, Any], chunks: Sequence[Sequence[int]]) -> Example:
    """A record's question with the base's own answer and classes."""
    prompt = ask_tokens(needles.base.tokenizer, needles.style, record["question"])
    target, logp = np.asarray(record["target"], np.int32), np.asarray(record["logp"], np.float32)
    return Example(tuple(chunks), [*prompt, *record["tokens"][:-1]], target, logp, len(prompt), exact=False)


def _asked(needles: Needles, found: Item, chunks: Sequence[Sequence[int]]) -> Example:
    """A question with its answer."""
    base, style = needles.base, needles.style
    prompt, answer = ask_tokens(base.tokenizer, style, found.question), _answer_tokens(base, style, found.answer)
    target, logp = one_hot(answer, needles.config.shape.top_k)
    return Example(tuple(chunks), [*prompt, *answer[:-1]], target, logp, len(prompt))


def _answer_tokens(base: Base, style: PromptStyle, answer: str) -> list[int]:
    return [*base.tokenizer.encode(answer_text(base.tokenizer, style, answer)), *base.tokenizer.eos_ids[:1]]


def _taught(needles: Needles, drawn: Sequence[tuple[Item | None, Example]]) -> list[tuple[Item | None, Example]]:
    """The same with what the base, with the document in its prompt, gives for the tokens of the answers to items."""
    base, style, top_k = needles.base, needles.style, needles.config.shape.top_k
    header = header_tokens(base.tokenizer, style)
    exact = [(number, item) for number, (item, _) in enumerate(drawn) if item is not None]
    if not exact:
        return list(drawn)
    prompts = [read_tokens(base.tokenizer, style, item.context, item.question)[len(header) :] for _, item in exact]
    answers = [_answer_tokens(base, style, item.answer) for _, item in exact]
    tasks = scored(base, prompts, answers, read_prefix(base.model, base.params, header), top_k)
    taught = list(drawn)
    for row, (i, _) in enumerate(exact):
        said = np.flatnonzero(np.asarray(tasks.weight[row]))
        example = dataclasses.replace(
            drawn[i][1], target=np.asarray(tasks.target[row])[said], logp=np.asarray(tasks.logp[row])[said]
        )
        taught[i] = (None, example)
    return taught


def _general_examples(base: Base, style: PromptStyle, config: HypernetConfig) -> Iterator[Example]:
    """General prompts with what the base says to them without any document, as far as they fit the batch's shape, and
    passages with how they go on."""
    header = header_length(base, style)
    asks = [ask_tokens(base.tokenizer, style, q.text) for q in general_questions(style, config.general)]
    asks = [ask for ask in asks if len(ask) + config.answer_tokens <= config.shape.query]
    if not asks:
        raise ConfigError(f"shape.query is {config.shape.query}, too short for any general prompt; enlarge it")
    prefix = read_prefix(base.model, base.params, asks[0][:header])
    tails = [ask[header:] for ask in asks]
    sampling = Sampling(max_tokens=config.answer_tokens)
    made = generate_all(base.model, base.params, tails, base.tokenizer.eos_ids, sampling, prefix=prefix, rows=BLOCK)
    stop = list(base.tokenizer.eos_ids[:1])
    answers = [[*answer, *stop][: config.answer_tokens] for answer in made]
    stretches = _passages(base, style, config, header)
    if any(read[:header] != asks[0][:header] for read, _ in stretches):
        raise ConfigError("passages are for a base whose documents and questions begin alike; leave passages at 0")
    asks += [read for read, _ in stretches]
    tails += [read[header:] for read, _ in stretches]
    answers += [rest for _, rest in stretches]
    tasks = scored(base, tails, answers, prefix, config.shape.top_k)
    for row, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        said = np.flatnonzero(np.asarray(tasks.weight[row]))
        target, logp = (np.asarray(x[row])[said] for x in (tasks.target, tasks.logp))
        yield Example((), [*ask, *answer[:-1]], target, logp, len(ask), exact=False)


def _passages(base: Base, style: PromptStyle, config: HypernetConfig, header: int) -> list[tuple[list[int], list[int]]]:
    """(beginning, the `answer_tokens` that go on) of documents of the world's training split, as the base reads them."""
    drawn = []
    for index in range(config.passages):
        text = document("train", config.data.seed, _PASSAGES + index, MIN_TOKENS).text
        tokens = document_tokens(base.tokenizer, style, text)[: config.shape.query]
        rng = np.random.default_rng([config.data.seed, _PASSAGES, index])
        most = len(tokens) - config.answer_tokens
        at = int(rng.integers(min(header + config.marker, most), most + 1))
        drawn.append((tokens[:at], tokens[at : at + config.answer_tokens]))
    return drawn


def train_hypernet(
    config: HypernetConfig, out: str | Path, *, resume: bool = False, progress: bool | None = None
) -> Fitted:
    """Trains a hypernetwork and leaves it in `out`/hyper, beside checkpoints/, metrics.jsonl and loss.png."""
    out = Path(out)
    mesh = build_mesh(config.mesh) if config.mesh else None
    base = load(config.base, mesh=mesh)
    # Of several processes each has the teacher on its own devices: what it says is read by the host, example by example.
    needles = open_needles(base if jax.process_count() == 1 else load(config.base), config)
    start = start_of(config.start, out, resume)
    # A resumed run reads it no more, but says what it began from where that is still there.
    begun = load_hyper(config.start, base) if config.start and (start or Path(config.start).is_dir()) else None
    if start and begun is not None:
        if begun.config != config.network:
            raise ConfigError(f"{start} holds a hypernetwork of another shape than network; make them equal")
        params = begun.params
    else:
        params = init_hyper(config.network, base.config, jax.random.key(config.fit.seed), config.b_scale)
    if mesh is not None:
        params = put(params, shardings(params, "hyper", mesh, counts=hyper_counts(config.network)))
    reader = reader_of(base, config)
    longest = _longest(needles) + len(needles.affixes.prefix) + len(needles.affixes.suffix)
    fitted = fit(
        jax.tree_util.Partial(hyper_loss, reader),
        params,
        lambda step: batch_at(needles, step),
        fit_settings(config),
        out=out,
        resume=resume,
        evaluate=checks(needles, reader),
        progress=progress,
        name="hypernetwork",
        run={"hypernet": to_dict(config)},
    )
    trained = fetch(fitted.params)
    if jax.process_index() == 0:
        hyper = Hyper(config.network, trained, needles.affixes, config.max_chunk or longest, base.id)
        # The path of a folder says nothing elsewhere and something about the machine.
        told = {**to_dict(config), "start": begun.id if begun is not None else None}
        save_hyper(out / HYPER, hyper, base.name, {"config": told, "metrics": fitted.told})
    return fitted


def _longest(needles: Needles) -> int:
    """Tokens of the longest document that is drawn."""
    data = needles.config.data
    drawn = [high for _, high in data.bins] if data.world + data.recorded < 1 else []
    drawn += data.world_tokens if data.world else ()
    drawn += [needles.records.passage] if needles.records is not None else []
    return max(drawn)


def reader_of(base: Base, config: HypernetConfig) -> Reader:
    """What the loss of a run reads and does not train."""
    return Reader(
        base.params,
        jnp.float32(config.l1),
        model=base.model,
        config=config.network,
        slots=config.shape.slots,
        remat=config.remat,
    )


def fit_settings(config: HypernetConfig) -> FitConfig:
    """How a run trains: latents are exempt from weight decay, as biases, norms and scalers are by their names."""
    own = config.fit.optimizer
    kept = tuple(dict.fromkeys((*own.no_decay, "latents")))
    return dataclasses.replace(config.fit, optimizer=dataclasses.replace(own, no_decay=kept))


def checks(needles: Needles, reader: Reader) -> Callable[[Any], Mapping[str, float]]:
    """A function params -> {loss, right: shares of validation needles whose whole answer is, teacher-forced, which equals
    greedy exact match; right_1, right_more: of those in one chunk, and in several}."""
    shape, config = needles.config.shape, needles.config
    batches = -(-config.validation // (shape.groups * shape.documents))
    plain = dataclasses.replace(needles, config=dataclasses.replace(config, teacher="answer"))  # the number itself is right
    sets = [batch_at(plain, step, _VALIDATION) for step in range(batches)]

    @jax.jit
    def score(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        return read_answers(reader, write_documents(reader, params, batch), batch)

    def scores(params: Any) -> Mapping[str, float]:
        rows = []
        for batch in sets:
            each, right = fetch(score(params, {k: v for k, v in batch.items() if k != EXAMPLES}))
            kept = batch["exact"] & (batch["document"] >= 0)
            counts = (batch["index"] >= 0).sum(axis=-1)  # of documents; each question has its document's
            chunks = np.take_along_axis(counts, np.maximum(batch["document"], 0), axis=1)
            rows.append(np.stack([each[kept], right[kept], chunks[kept]]))
        loss, right, chunks = np.concatenate(rows, axis=1)
        part = lambda chosen: float(right[chosen].mean()) if chosen.any() else 0.0
        return {
            "loss": float(loss.mean()),
            "right": part(chunks > 0),
            "right_1": part(chunks == 1),
            "right_more": part(chunks > 1),
        }

    return scores
