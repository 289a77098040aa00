"""Compiled buffers against the whole text in the prompt and against as many bytes of it, on documents of the test world.

The experiment of arXiv 2602.21221 (its section 4) on the invented world: every document is compiled at several ratios
without sight of its questions, which the untouched base then answers behind the slots; general knowledge is asked with a
buffer loaded too, against no context at all. Controls compile in other ways. Buffers and answers are kept under the output
folder: an interrupted run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memjax.bank.store import Bank, open_bank
from memjax.config import to_dict
from memjax.errors import ConfigError
from memjax.evaluate import world
from memjax.evaluate.compile_bytes import ask_evicted, held_bytes
from memjax.evaluate.compile_contents import CONTENTS, content_document
from memjax.evaluate.compile_evict import ask_kept
from memjax.evaluate.compile_loss import gold_losses
from memjax.evaluate.compile_together import ask_together, bank_buffer, together_columns
from memjax.evaluate.corpora import Corpus, Item, common_questions
from memjax.evaluate.kept import kept
from memjax.evaluate.peak import peak_mib
from memjax.evaluate.report import setting, summarize
from memjax.evaluate.ruler_evict import FULL, EvictRuler
from memjax.evaluate.subjects import Query, Setup, make_subjects
from memjax.evaluate.writers import check_jobs, compile_at_ratios, write_texts
from memjax.memory.buffer import Buffer
from memjax.memory.files import read_manifest
from memjax.models.base import Base
from memjax.models.generate import Sampling
from memjax.serve.engine import Engine, EngineConfig
from memjax.write.break_even import break_even, reading_seconds
from memjax.write.compile import CompileConfig
from memjax.write.distill import DistillConfig
from memjax.write.prompts import PromptStyle
from memjax.write.tasks import KINDS

SIZES = (256, 320, 384, 448)  # tokens of the documents, in turn
QUESTION_KINDS = {"one_hop": 5, "two_hop": 3}  # of the questions of a document, in these shares
# Way of compiling -> what it changes of the recipe. The first is the recipe itself.
METHODS: dict[str, dict[str, Any]] = {
    "compiled": {},
    "paper": {"asks": 0, "windows": 8, "queries": 8, "recon": 0.5},  # no questions about the text
    "no_queries": {"recon": 1.0},  # no general prompts in the loss
    "query_context": {"query_teacher": "context"},  # they are answered by the base that has read the text
    # Keys and values are trained themselves (Cartridges).
    "direct": {"through": "slots", "optimizer": "adamw", "learning_rate": 0.5},
    "inputs": {"through": "inputs", "optimizer": "adamw", "learning_rate": 1e-2, "slots_rate": 10.0},  # prompt tuning
    "distractors": {"distractors": 7},  # among other documents' buffers, those of the first method
    "kl": {"loss": "kl"},  # over the whole vocabulary
    "mse": {"loss": "mse"},  # of the teacher's likeliest classes' logits
    "coupled": {"coupled": True},  # the adapter stays on in the reader, and is missing in the end
}
# As many keys and values of the text itself as a buffer has: its beginning, and what SnapKV chooses.
CONTROLS = {"truncated": "beginning of the text", "snapkv": "SnapKV's tokens"}
Scores = dict[str, list[float]]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class CompileEval:
    """documents of 256 to 448 tokens, `questions` of each; general: questions of common knowledge, asked with a buffer
    loaded; ratios: context tokens per slot, one buffer of every document each; methods: see `METHODS`; answer_tokens: room
    for an answer. contents: ratios also by content, see `compile_contents`; together: with how many documents' buffers
    loaded questions are asked too, at the ratio of `middle`. adapters: ranks of adapters that are distilled of every
    document too."""

    documents: int = 32
    questions: int = 8
    general: int = 64
    ratios: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0)
    methods: tuple[str, ...] = ("compiled",)
    answer_tokens: int = 12
    contents: bool = False
    together: tuple[int, ...] = ()
    adapters: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("documents", "questions", "general", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if not self.ratios or min(self.ratios) < 1:
            raise ConfigError("ratios: give at least one, none below 1")
        if self.adapters and min(self.adapters) < 1:
            raise ConfigError(f"an adapter of rank {min(self.adapters)}: give ranks of at least 1")
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ConfigError(f"method {unknown[0]!r} is unknown; use some of {', '.join(METHODS)}")
        if "distractors" in self.methods and "compiled" not in self.methods[: self.methods.index("distractors")]:
            raise ConfigError(
                "the method distractors reads the buffers of compiled beside its own; name compiled before it"
            )
        if self.together and not 1 <= min(self.together) <= max(self.together) <= self.documents:
            raise ConfigError(f"together: of {self.documents} documents 1 to {self.documents} buffers can be loaded")
        if (self.together or self.contents) and "compiled" not in self.methods:
            raise ConfigError("contents and together are measured with the method compiled; name it among the methods")

    @property
    def middle(self) -> float:
        """The ratio 16, or the middle one of those that are run."""
        return 16.0 if 16.0 in self.ratios else sorted(self.ratios)[len(self.ratios) // 2]

    def columns(self) -> dict[str, tuple[str, float]]:
        """{column: (method, ratio)}; those of the recipe itself are called by their ratio."""
        return {
            f"{ratio:g}" if method == "compiled" else f"{method}-{ratio:g}": (method, ratio)
            for method in self.methods
            for ratio in self.ratios
        }

    def by_method(self) -> dict[str, list[str]]:
        """{method: its columns, by ratio}."""
        return {method: [c for c, (m, _) in self.columns().items() if m == method] for method in self.methods}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a seed's experiment is made with. `folder` holds its banks, one for each ratio, and its answers; drawn: see
    `Corpus.drawn`; distil: the recipe of adapters; evict: policies whose caches are asked too."""

    base: Base
    style: PromptStyle
    recipe: CompileConfig
    config: CompileEval
    corpus: Corpus
    folder: Path
    progress: Progress = lambda what, done, total: None
    jobs: int = 1
    drawn: str = ""
    distil: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    evict: EvictRuler | None = None

    def kept(self, what: str, about: Any, make: Callable[[], Any]) -> Any:
        """See `evaluate.kept`."""
        made_of = [self.base.id, self.style.name, self.corpus.name, self.drawn, to_dict(self.config), about]
        return kept(self.folder / f"{what}.json", made_of, make)

    def bank(self, column: str) -> Bank:
        """The bank of a column, opened."""
        return open_bank(self.folder / f"bank-{column}", create=True, base_id=self.base.id, base_name=self.base.name)


def world_items(config: CompileEval, seed: int) -> tuple[dict[str, str], list[Item]]:
    """({name: text}, questions about them) of the test world: sizes in turn, the kinds of questions in their shares."""
    texts: dict[str, str] = {}
    items: list[Item] = []
    wanted = {kind: -(-config.questions * share // sum(QUESTION_KINDS.values())) for kind, share in QUESTION_KINDS.items()}
    for number in range(config.documents):
        (doc,) = world.documents("test", seed, 1, SIZES[number % len(SIZES)], start=number // len(SIZES))
        name = f"document-{number:03d}"
        texts[name] = doc.text
        asked = [q for kind, count in wanted.items() for q in world.questions(doc, (kind,), seed, count)]
        items += [Item(name, q.text, (q.answer,)) for q in asked[: config.questions]]
    return texts, items


def content_items(base: Base, config: CompileEval, seed: int, content: str) -> tuple[dict[str, str], list[Item]]:
    """({name: text}, one-hop questions about them) of a content; prose is the texts of `world_items`."""
    texts: dict[str, str] = {}
    items: list[Item] = []
    size = lambda text: len(base.tokenizer.encode(text))
    for number in range(config.documents):
        tokens, index = SIZES[number % len(SIZES)], number // len(SIZES)
        doc = content_document(content, seed, index, tokens, size)
        name = f"document-{number:03d}"
        texts[name] = doc.text
        asked = world.questions(doc, ("one_hop",), seed, config.questions)
        items += [Item(name, q.text, (q.answer,)) for q in asked]
    return texts, items


def world_corpus(config: CompileEval) -> Corpus:
    """The documents and questions of `world_items`; common knowledge as the general questions."""
    general = functools.partial(common_questions, config.general)
    texts, items = (lambda seed: world_items(config, seed)[0]), (lambda seed: world_items(config, seed)[1])
    return Corpus("world", texts, items, general, lambda seed: [])


def general_items(corpus: Corpus, seed: int, names: Sequence[str]) -> list[Item]:
    """The corpus's general questions; `name` is the document whose buffer is loaded while one is asked, in turn."""
    return [dataclasses.replace(item, name=names[i % len(names)]) for i, item in enumerate(corpus.general(seed))]


def write_buffers(
    bench: Bench, bank: Bank, texts: Mapping[str, str], method: str, ratio: float, beside: Bank | None = None
) -> None:
    """Compiles the texts that the bank does not hold yet; beside: whose buffers a method with distractors trains among.

    No question about them is handed in. ConfigError where the bank holds another text by one of the names.
    """
    recipe = dataclasses.replace(bench.recipe, ratio=ratio, probes=0, **METHODS[method])
    told = lambda done: bench.progress(f"compiling at {ratio:g} ({method})", done, len(texts))
    write_texts(bench.base, bank, texts, bench.style, recipe, bench.jobs, beside, told)


def write_ratios(bench: Bench, texts: Mapping[str, str], method: str) -> None:
    """`write_buffers` at all ratios of a method, each into its own bank, with one lesson for a text."""
    columns = {column: ratio for column, (held, ratio) in bench.config.columns().items() if held == method}
    recipe = dataclasses.replace(bench.recipe, probes=0, **METHODS[method])
    told = lambda done: bench.progress(f"compiling ({method})", done, len(texts) * len(columns))
    with contextlib.ExitStack() as stack:
        banks = [(stack.enter_context(bench.bank(c)), dataclasses.replace(recipe, ratio=r)) for c, r in columns.items()]
        compile_at_ratios(bench.base, banks, texts, bench.style, bench.jobs, told)


def ask_buffers(bench: Bench, bank: Bank, items: Sequence[Item], what: str) -> list[str]:
    """What the base says to each item with the buffer of its document loaded, and no gate."""
    engine = Engine(bench.base, bank, bench.style, EngineConfig(candidates=1, resident=4))
    sampling = Sampling(max_tokens=bench.config.answer_tokens)
    said = []
    for item in items:
        said.append(engine.ask(item.question, memory=item.name, gate=False, sampling=sampling).text)
        bench.progress(what, len(said), len(items))
    return said


def ask_prompted(bench: Bench, items: Sequence[Item], contexts: Mapping[str, str], what: str) -> list[str]:
    """What the base says with a text (or none) in its prompt."""
    queries = [Query(item.question, contexts.get(item.name)) for item in items]
    setup = Setup(bench.base, bench.style, progress=lambda _, done, total: bench.progress(what, done, total))
    (subject,) = make_subjects(["in_context"], setup)
    return subject.answers(queries, bench.config.answer_tokens).texts


def beginning(base: Base, text: str, ratio: float) -> str:
    """The first tokens of a text, as many as a buffer has slots."""
    ids = base.tokenizer.encode(text)
    return base.tokenizer.decode(ids[: math.ceil(len(ids) / ratio)])


def run_seed(bench: Bench, seed: int) -> Scores:
    """{right/COLUMN, general/COLUMN, loss/COLUMN: of each question; seconds/COLUMN, held_out_*/COLUMN: of each document;
    first_token_seconds/COLUMN: of one question about the first document}.

    Columns: none, full, truncated-RATIO (the beginning of the text, of as many tokens as there are slots), snapkv-RATIO
    (as many of its tokens as SnapKV keeps, see `compile_evict`), and those of `CompileEval.columns`; with policies
    POLICY/SHARE, as `ruler_evict` calls them. bytes/COLUMN: see `compile_bytes.held_bytes`. Also what `run_adapters`,
    `run_together` and `run_contents` give, where they are asked for.
    """
    bench.folder.mkdir(parents=True, exist_ok=True)
    texts, items = bench.corpus.texts(seed), bench.corpus.items(seed)
    general = general_items(bench.corpus, seed, list(texts))
    made: Scores = {}

    def judge(column: str, said: Sequence[str], of: Sequence[Item], key: str = "right") -> None:
        made[f"{key}/{column}"] = bench.corpus.right(said, of)

    def lose(column: str, about: Any, contexts: Mapping[str, str], buffers: Mapping[str, Buffer] | None = None) -> None:
        told = lambda done: bench.progress(f"loss, {column}", done, len(items))
        make = lambda: gold_losses(bench.base, bench.style, items, contexts, buffers, told)
        made[f"loss/{column}"] = bench.kept(f"loss-{column}", about, make)

    def prompted(column: str, contexts: Mapping[str, str], of: Sequence[Item], key: str = "right") -> None:
        judge(column, bench.kept(f"{key}-{column}", seed, lambda: ask_prompted(bench, of, contexts, column)), of, key)

    prompted("none", {}, items)
    prompted("full", texts, items)
    lose("none", seed, {})
    lose("full", seed, texts)
    prompted("none", {}, general, "general")
    prompted("full", texts, general, "general")
    for ratio in bench.config.ratios:
        column = f"truncated-{ratio:g}"
        prompted(column, {n: beginning(bench.base, t, ratio) for n, t in texts.items()}, items)
        column = f"snapkv-{ratio:g}"
        told = lambda done, column=column: bench.progress(f"asking at {column}", done, len(items))
        ask_few = lambda ratio=ratio, told=told: ask_kept(
            bench.base, bench.style, texts, items, ratio, bench.config.answer_tokens, told
        )
        judge(column, bench.kept(f"right-{column}", seed, ask_few), items)
    for method in bench.config.methods:
        if method != "distractors":  # which are the buffers of each ratio
            write_ratios(bench, texts, method)
    for column, (method, ratio) in bench.config.columns().items():
        with contextlib.ExitStack() as stack:
            bank = stack.enter_context(bench.bank(column))
            if method == "distractors":
                write_buffers(bench, bank, texts, method, ratio, stack.enter_context(bench.bank(f"{ratio:g}")))
            entries = [bank.get(document) for document in texts]
            about = [seed, [entry.id for entry in entries]]
            for key, of in (("right", items), ("general", general)):
                ask = lambda bank=bank, of=of, name=column: ask_buffers(bench, bank, of, f"asking at {name}")
                judge(column, bench.kept(f"{key}-{column}", about, ask), of, key)
            buffers = {name: bank_buffer(bench.base, bank, name) for name in texts}
            lose(column, about, {}, buffers)
            first = next(iter(texts))
            read = lambda text=texts[first], buffer=buffers[first]: reading_seconds(bench.base, bench.style, text, buffer)
            whole, short = bench.kept(f"reading-{column}", about, read)
            made[f"first_token_seconds/{column}"] = [short]
            if whole is not None:
                made["first_token_seconds/full"] = [whole]
            written = [read_manifest(bank.folder(entry.id))["provenance"]["metrics"] for entry in entries]
        for metric in ("seconds", *(f"held_out_kl_{kind}" for kind in KINDS)):
            if metric in written[0]:
                made[f"{metric}/{column}"] = [float(metrics[metric]) for metrics in written]
    if bench.config.adapters:
        made |= run_adapters(bench, texts, items, seed)
    if bench.evict is not None:
        made |= run_evicted(bench, bench.evict, texts, items, seed)
    made |= held_bytes(
        bench.base, bench.style, texts, bench.config.ratios, bench.config.adapters, bench.distil, bench.evict
    )
    if bench.config.together:
        made |= run_together(bench, seed, list(texts), items)
    if bench.config.contents:
        made |= run_contents(bench, seed)
    return made


def run_adapters(bench: Bench, texts: Mapping[str, str], items: Sequence[Item], seed: int) -> Scores:
    """{right/adapter-RANK: of each question} with the distilled adapter of its document loaded."""
    made: Scores = {}
    for rank in bench.config.adapters:
        column = f"adapter-{rank}"
        # The adapter's strength, alpha / rank, stays the recipe's.
        recipe = dataclasses.replace(bench.distil, rank=rank, alpha=bench.distil.alpha * rank / bench.distil.rank)
        told = lambda done, rank=rank: bench.progress(f"distilling at rank {rank}", done, len(texts))
        with bench.bank(column) as bank:
            write_texts(bench.base, bank, texts, bench.style, recipe, bench.jobs, None, told)
            about = [seed, [bank.get(name).id for name in texts]]
            ask = lambda bank=bank, column=column: ask_buffers(bench, bank, items, f"asking at {column}")
            made[f"right/{column}"] = bench.corpus.right(bench.kept(f"right-{column}", about, ask), items)
    return made


def run_evicted(bench: Bench, evict: EvictRuler, texts: Mapping[str, str], items: Sequence[Item], seed: int) -> Scores:
    """{right/POLICY/SHARE: of each question} behind what each policy keeps of its document."""
    told = lambda done: bench.progress("asking what policies keep", done, len(items))
    make = lambda: ask_evicted(bench.base, texts, items, evict, bench.config.answer_tokens, told)
    said = bench.kept("evicted", [seed, evict.told()], make)
    return {f"right/{column}": bench.corpus.right(answers, items) for column, answers in said.items() if column != FULL}


def run_together(bench: Bench, seed: int, names: Sequence[str], items: Sequence[Item]) -> Scores:
    """{together/COLUMN: of each question} with the buffers of several documents loaded; columns of `together_columns`."""
    made: Scores = {}
    config, ratio = bench.config, bench.config.middle
    for column, (method, join, count) in together_columns(config.methods, config.together).items():
        held = f"{ratio:g}" if method == "compiled" else f"{method}-{ratio:g}"
        with bench.bank(held) as bank:
            given = (bank, items, names, count, join, config.answer_tokens, seed)
            about = [seed, column, [bank.get(name).id for name in names]]
            ask = lambda given=given: ask_together(bench.base, bench.style, *given)
            said = bench.kept(f"together-{column}", about, ask)
        made[f"together/{column}"] = bench.corpus.right(said, items)
        bench.progress("asking of several", len(made), len(together_columns(config.methods, config.together)))
    return made


def run_contents(bench: Bench, seed: int) -> Scores:
    """{right/full-CONTENT, right/CONTENT-RATIO: of each one-hop question about prose, lists and numbers}."""
    made: Scores = {}
    for content in CONTENTS:
        texts, items = content_items(bench.base, bench.config, seed, content)
        column = f"full-{content}"
        read = lambda texts=texts, items=items, column=column: ask_prompted(bench, items, texts, column)
        made[f"right/{column}"] = bench.corpus.right(bench.kept(f"right-{column}", seed, read), items)
        for ratio in bench.config.ratios:
            column = f"{content}-{ratio:g}"
            # Prose is the texts that the buffers of the main columns were written of.
            with bench.bank(f"{ratio:g}" if content == "prose" else column) as bank:
                write_buffers(bench, bank, texts, "compiled", ratio)
                about = [seed, [bank.get(name).id for name in texts]]
                ask = lambda bank=bank, items=items, name=column: ask_buffers(bench, bank, items, f"asking at {name}")
                made[f"right/{column}"] = bench.corpus.right(bench.kept(f"right-{column}", about, ask), items)
    return made


def figures(numbers: Mapping[str, float], config: CompileEval) -> dict[str, float]:
    """retain_Rx: share of the full context's accuracy; harm_points_Rx: points of general accuracy lost against no context;
    break_even_Rx: questions that make up for compiling, as fast as this machine was, where a buffer is read faster.

    Those of other methods end in _METHOD, those by content in _CONTENT. `harm_points` is that of the ratio `middle`.
    """
    made = {}
    full = max(numbers["right/full"], 1e-9)
    for ratio in config.ratios:
        for control in CONTROLS:
            made[f"retain_{ratio:g}x_{control}"] = numbers[f"right/{control}-{ratio:g}"] / full
    for column, (method, ratio) in config.columns().items():
        name = f"{ratio:g}x" if method == "compiled" else f"{ratio:g}x_{method}"
        made[f"retain_{name}"] = numbers[f"right/{column}"] / full
        made[f"harm_points_{name}"] = 100 * (numbers["general/none"] - numbers[f"general/{column}"])
        costs = [f"seconds/{column}", "first_token_seconds/full", f"first_token_seconds/{column}"]
        if all(key in numbers for key in costs):
            even = break_even(*(numbers[key] for key in costs))
            made |= {} if even is None else {f"break_even_{name}": float(even)}
    if "compiled" in config.methods:
        made["harm_points"] = made[f"harm_points_{config.middle:g}x"]
    for content in CONTENTS if config.contents else ():
        for ratio in config.ratios:
            right = numbers[f"right/{content}-{ratio:g}"]
            made[f"retain_{ratio:g}x_{content}"] = right / max(numbers[f"right/full-{content}"], 1e-9)
    made["harm_points_full"] = 100 * (numbers["general/none"] - numbers["general/full"])
    return made


def run_compile(
    base: Base,
    style: PromptStyle,
    recipe: CompileConfig,
    config: CompileEval,
    out: Path,
    *,
    corpus: Corpus | None = None,
    seeds: Sequence[int] = (0,),
    progress: Progress = lambda what, done, total: None,
    jobs: int = 1,
    distil: DistillConfig = DistillConfig(),
    evict: EvictRuler | None = None,
) -> dict[str, Any]:
    """{numbers, headline, setting} of the experiment over seeds; recipe: its ratio is replaced by each of the config's;
    corpus: what it is about, the invented world unless given; jobs: how many processes compile side by side; distil,
    evict: see `Bench`.

    ConfigError where the world's contents are asked for of another corpus.
    """
    check_jobs(jobs)
    corpus = corpus or world_corpus(config)
    if config.contents and corpus.name != "world":
        raise ConfigError("accuracy by content is of the invented world's texts; leave --sweep out")
    began = time.perf_counter()
    bench = functools.partial(Bench, base, style, recipe, config, corpus)
    given = lambda seed: (out / f"seed-{seed}", progress, jobs, corpus.drawn(seed), distil, evict)
    runs = [run_seed(bench(*given(seed)), seed) for seed in seeds]
    numbers = summarize(runs)
    headline = figures(numbers, config)
    if corpus.name != "world" and base.name.startswith("smollm2"):
        headline |= {f"smol_{key}": value for key, value in headline.items() if key.startswith("retain_")}
    told = setting(base, config=to_dict(config), recipe=dataclasses.asdict(recipe), seeds=list(seeds), corpus=corpus.name)
    told |= {"distil": dataclasses.asdict(distil)} if config.adapters else {}
    told |= {"evict": evict.told()} if evict else {}
    return {
        "numbers": {**numbers, **headline, "seconds": time.perf_counter() - began, "peak_mib": peak_mib()},
        "headline": list(headline),
        "setting": told,
    }


def draw_ratios(path: Path, numbers: Mapping[str, float], config: CompileEval) -> Path:
    """Draws accuracy by ratio, of buffers and of as much text, between no context and all of it, into the PNG at `path`."""
    ratios = config.ratios
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = [f"{ratio:g}" for ratio in ratios]
    lines = config.by_method()
    controls = {label: [f"{control}-{name}" for name in names] for control, label in CONTROLS.items()}
    for label, columns in {**lines, **controls}.items():
        keys = [f"right/{column}" for column in columns]
        means = np.asarray([numbers[key] for key in keys])
        below = np.maximum([m - numbers[f"{k}_low"] for m, k in zip(means, keys, strict=True)], 0)
        above = np.maximum([numbers[f"{k}_high"] - m for m, k in zip(means, keys, strict=True)], 0)
        axes.errorbar(list(ratios), means, yerr=[below, above], marker="o", capsize=2, label=label)
    for column, style, label in (("full", "--", "all of the text"), ("none", ":", "no context")):
        axes.axhline(numbers[f"right/{column}"], linestyle=style, color="gray", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ratios), names)
    axes.set_xlabel("context tokens per slot")
    axes.set_ylabel("right")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    return path
