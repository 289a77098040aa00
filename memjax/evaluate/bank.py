"""The memory bank against the base, the text in the prompt and text retrieval, on documents that no model has seen.

The experiment of arXiv 2605.28889 (its Tables 1, 2, 6 and 7) on a corpus, such as the invented world: every document
becomes a memory, written without sight of the test questions; then these are answered in eight ways, and the gate is tried
on general knowledge that no document tells. Banks and answers are kept under the output folder: an interrupted run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memjax.bank.calibrate import keep_gate
from memjax.bank.gate import DEFAULT_RULE, RULES, Gate, Signals
from memjax.bank.route import Router, RouterConfig, keep_router, read_router
from memjax.bank.store import Bank, open_bank
from memjax.config import to_dict
from memjax.errors import BankError, ConfigError
from memjax.evaluate import world
from memjax.evaluate.corpora import Corpus, Item, world_corpus
from memjax.evaluate.kept import kept as keep_value
from memjax.evaluate.metrics import exact_match, f1
from memjax.evaluate.qa import first_line
from memjax.evaluate.subjects import Query, Setup, fit_window, make_subjects, with_passages
from memjax.evaluate.writers import write_texts
from memjax.memory.files import Meta, read_artefact, write_artefact
from memjax.models.base import Base
from memjax.models.decoder import site_shapes
from memjax.models.encoder import Encoder
from memjax.models.generate import Sampling
from memjax.models.weights import SITE_MODULES
from memjax.serve.choose import pick, signals_of, with_router
from memjax.serve.engine import Engine, EngineConfig
from memjax.serve.learn import learn_gate, learn_router, see_questions
from memjax.write.distill import DistillConfig
from memjax.write.prompts import PromptStyle, ask_tokens

COLUMNS = (
    "base", "in_context", "text_retrieval3", "oracle", "retrieval1", "retrieval3", "retrieval5", "shift",
)  # fmt: skip
GATED = 3  # candidates of the column that the gate is tried on
ROUTED = 5  # candidates that the router is trained on
RECALL = (1, 3, 5)
Scores = dict[str, list[float]]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """documents of `tokens` tokens, `questions` test questions of each; general: questions of common knowledge; near: how
    many near duplicates, probed `near_candidates` at a time (all, since retrieval has ties for them); answer_tokens:
    room for an answer; router: how it is trained.
    """

    documents: int = 64
    questions: int = 8
    tokens: int = 200
    general: int = 200
    near: int = 32
    near_candidates: int = 32
    answer_tokens: int = 12
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        for name in ("documents", "questions", "general", "near_candidates", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.documents < 2:
            raise ConfigError("documents is 1; a wrong memory needs at least 2")

    def world(self) -> Corpus:
        """The invented world in these sizes."""
        return world_corpus(self.documents, self.questions, self.tokens, self.general)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a seed's experiment is made with. `folder` holds its bank and its answers; jobs: how many processes write;
    drawn: see `Corpus.drawn`."""

    base: Base
    style: PromptStyle
    recipe: DistillConfig
    config: BankConfig
    corpus: Corpus
    folder: Path
    encoder: Encoder | None = None
    progress: Progress = lambda what, done, total: None
    jobs: int = 1
    drawn: str = ""

    def engine(self, bank: Bank, candidates: int, route: str = "auto", namespace: str = "default") -> Engine:
        """An engine over the bank that probes so many candidates."""
        resident = max(16, candidates)
        how = EngineConfig(
            candidates=candidates, resident=resident, rank=self.recipe.rank, marker=self.recipe.marker, route=route
        )
        return Engine(self.base, bank, self.style, how, namespace, self.encoder)


def write_bank(bench: Bench, bank: Bank, texts: Mapping[str, str], what: str = "writing") -> None:
    """Writes the texts that the bank does not hold yet. No question is handed in."""
    told = lambda done: bench.progress(what, done, len(texts))
    write_texts(bench.base, bank, texts, bench.style, bench.recipe, bench.jobs, progress=told)


def kept(bench: Bench, what: str, about: Any, make: Callable[[], Any]) -> Any:
    """The JSON value kept in the seed's folder for `what` if it was made by the same set-up, else made now and kept.

    about: whatever the value depends on beside base, recipe and config.
    """
    setup = [bench.base.id, dataclasses.asdict(bench.recipe), to_dict(bench.config), bench.corpus.name, bench.drawn]
    return keep_value(bench.folder / f"{what}.json", [*setup, _encoder_id(bench), about], make)


def _encoder_id(bench: Bench) -> str:
    return "" if bench.encoder is None else bench.encoder.id


# ------------------------------------------------------------------------------------------------------------ the table


def ask_columns(
    bench: Bench, bank: Bank, items: Sequence[Item], texts: Mapping[str, str], columns: Sequence[str] = COLUMNS
) -> dict[str, list[dict[str, Any]]]:
    """{column: a row {text, memory} per item}. A column that was answered before by the same set-up is read, not asked."""
    names = list(texts)
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    ids = {name: entry.id for name in names if (entry := bank.find(name)) is not None}
    queries = [Query(item.question, texts[item.name]) for item in items]
    # Text retrieval searches the texts of all documents together, as a bank does.
    setup = Setup(bench.base, bench.style, truncate=True, passages=3, progress=bench.progress)
    by_prompt = {"base": "no_context", "in_context": "in_context", "text_retrieval3": "retrieval"}
    by_bank: dict[str, tuple[int, str, Callable[[Item], str | None]]] = {
        "oracle": (1, "retrieval", lambda item: item.name),
        "shift": (1, "retrieval", lambda item: following[item.name]),
        "retrieval1": (1, "retrieval", lambda item: None),
        "retrieval3": (3, "auto", lambda item: None),
        "retrieval5": (5, "auto", lambda item: None),
    }

    def prompted(column: str) -> list[dict[str, Any]]:
        (subject,) = make_subjects([by_prompt[column]], setup)
        return [{"text": text, "memory": None} for text in subject.answers(queries, bench.config.answer_tokens).texts]

    def remembered(column: str) -> list[dict[str, Any]]:
        candidates, route, named = by_bank[column]
        engine = bench.engine(bank, candidates, route)
        rows = []
        for number, item in enumerate(items, start=1):
            sampling = Sampling(max_tokens=bench.config.answer_tokens)
            answer = engine.ask(item.question, memory=named(item), gate=False, sampling=sampling)
            rows.append({"text": answer.text, "memory": answer.choice.memory})
            bench.progress(column, number, len(items))
        return rows

    router = read_router(bench.base, bank)
    learned = None if router is None else router.metrics
    made = {}
    for column in columns:
        about = [column, ids if column in by_bank else None, learned if column in ("retrieval3", "retrieval5") else None]
        make = remembered if column in by_bank else prompted
        made[column] = kept(bench, f"answers-{column}", about, functools.partial(make, column))
    return made


def gold_losses(
    bench: Bench,
    bank: Bank,
    items: Sequence[Item],
    texts: Mapping[str, str],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Scores:
    """{loss/column: nats per token of each item's gold answer}, read as the column's own answer was."""
    base, style, room = bench.base, bench.style, bench.config.answer_tokens
    queries = [Query(item.question, texts[item.name]) for item in items]
    shown = {
        "base": [dataclasses.replace(query, context=None) for query in queries],
        "in_context": queries,
        "text_retrieval3": with_passages(queries, 3, pooled=True),
    }

    def make(column: str) -> list[float]:
        engine, made = bench.engine(bank, 1, "retrieval"), []
        for number, item in enumerate(items):
            if column in shown:
                tokens, memory = fit_window(base, style, shown[column][number], room, truncate=True)[0], None
            else:
                tokens = ask_tokens(base.tokenizer, style, item.question)
                memory = answers[column][number]["memory"]
            made += engine.answer_losses(tokens, item.answers[0], [memory])
            bench.progress(f"loss, {column}", number + 1, len(items))
        return made

    return {f"loss/{c}": kept(bench, f"losses-{c}", rows, functools.partial(make, c)) for c, rows in answers.items()}


def table_scores(corpus: Corpus, items: Sequence[Item], answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> Scores:
    """{exact_match/column, f1/column, right/column, routed/column}: the score of each item; right: by the corpus's own
    judge; routed: its own memory was read from."""
    made: Scores = {}
    for column, rows in answers.items():
        said = [first_line(row["text"]) for row in rows]
        made[f"exact_match/{column}"] = [exact_match(s, i.answers) for s, i in zip(said, items, strict=True)]
        made[f"f1/{column}"] = [f1(s, i.answers) for s, i in zip(said, items, strict=True)]
        made[f"right/{column}"] = corpus.right(said, items)
        if column.startswith("retrieval"):
            made[f"routed/{column}"] = [float(r["memory"] == i.name) for r, i in zip(rows, items, strict=True)]
    return made


def learn(bench: Bench, bank: Bank) -> dict[str, Any]:
    """Trains router and gates on the memories' held-out questions, and keeps the router and the default gate in the bank.

    {router: its metrics, gates: {rule: the gate's record}}. Where there are too few questions the router is left out.
    """

    def make() -> dict[str, Any]:
        seen = see_questions(
            bench.engine(bank, ROUTED, "retrieval"), progress=lambda done, total: bench.progress("held-out", done, total)
        )
        engine = bench.engine(bank, ROUTED, "retrieval")
        router: Router | None = None
        with_none: Router | None = None
        try:
            # The class "none" is trained apart: what routes must be what the paper routes with.
            with_none = learn_router(engine, dataclasses.replace(bench.config.router, none=True), seen, progress=False)
            router = learn_router(engine, bench.config.router, seen, progress=False)
        except BankError:
            router = with_none = None
        in_use = router if router is not None and router.helps else None
        gates = {}
        for rule in RULES:
            if rule != "none" or with_none is not None:
                gate = learn_gate(engine, rule, seen, with_none if rule == "none" else in_use, keep=False)
                gates[rule] = dataclasses.asdict(gate)
        recall = {f"held_out_recall{k}": _recall(seen, k) for k in (1, 3, 5)}
        return {"router": dict(router.metrics) if router else {}, "gates": gates, **recall}

    ids = {entry.name: entry.id for entry in bank.list()}
    found = kept(bench, "learned", [ids, RULES], make)
    if DEFAULT_RULE in found["gates"]:
        keep_gate(bank, Gate(**found["gates"][DEFAULT_RULE]))
    return found


def _recall(seen: Sequence[Any], k: int) -> float:
    asked = [s for s in seen if s.memory is not None]
    return float(np.mean([s.memory in [c.id for c in s.observed.candidates[:k]] for s in asked]))


# -------------------------------------------------------------------------------------------------------------- the gate


def observe_all(bench: Bench, bank: Bank, questions: Sequence[str], what: str) -> list[dict[str, Any]]:
    """A row per question: the signals of the candidate that is read from, its name, and the candidates' names in order."""
    ids = {entry.name: entry.id for entry in bank.list()}

    def make() -> list[dict[str, Any]]:
        engine, rows = bench.engine(bank, GATED), []
        router = read_router(bench.base, bank)
        for number, question in enumerate(questions, start=1):
            seen = engine.observe(question, ahead=True)
            best = pick(seen.candidates, "retrieval" if router is None else "router")
            signals = dataclasses.asdict(signals_of(with_router(seen, router), best))
            rows.append(
                {"signals": signals, "memory": seen.candidates[best].name, "names": [c.name for c in seen.candidates]}
            )
            bench.progress(f"probing {what}", number, len(questions))
        return rows

    return kept(bench, f"observed-{what}", [ids, list(questions)], make)


def gate_scores(
    bench: Bench,
    bank: Bank,
    seed: int,
    items: Sequence[Item],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    gates: Mapping[str, Mapping[str, Any]],
) -> tuple[Scores, dict[str, list[float]]]:
    """(scores of each item, entropies for the histograms): what every gate opens for, and what it costs and saves.

    Keys: opened/RULE of test questions, closed/RULE of general ones, foreign/RULE: opened of questions about documents that
    the bank does not hold; general/base, general/ungated, general/RULE and in_bank/ungated, in_bank/RULE: whether what
    would be said is right. A gate was calibrated on held-out synthetic questions and general prompts; neither these
    questions nor their answers had a part in it.
    """
    general = bench.corpus.general(seed)
    asked = [item.question for item in general]
    near = observe_all(bench, bank, [item.question for item in items], "in_bank")
    far = observe_all(bench, bank, asked, "general")
    foreign = observe_all(bench, bank, [item.question for item in bench.corpus.foreign(seed)], "foreign")
    alone = [row["text"] for row in answers["base"]]
    read = [row["text"] for row in answers[f"retrieval{GATED}"]]
    plain, loose = kept(bench, "general", far, lambda: _general_answers(bench, bank, asked))
    right = bench.corpus.right
    made: Scores = {
        "general/base": right(plain, general),
        "general/ungated": right(loose, general),
        "in_bank/ungated": right(read, items),
    }
    for rule, record in gates.items():
        gate = Gate(**record)
        opened = [gate.opens(Signals(**row["signals"])) for row in near]
        leaked = [gate.opens(Signals(**row["signals"])) for row in far]
        made[f"opened/{rule}"] = [float(o) for o in opened]
        made[f"closed/{rule}"] = [float(not o) for o in leaked]
        if foreign:
            made[f"foreign/{rule}"] = [float(gate.opens(Signals(**row["signals"]))) for row in foreign]
        made[f"in_bank/{rule}"] = right([r if o else a for o, r, a in zip(opened, read, alone, strict=True)], items)
        made[f"general/{rule}"] = right([u if o else p for o, u, p in zip(leaked, loose, plain, strict=True)], general)
    entropies = {
        f"{who}, {kind}": [row["signals"][key] for row in rows]
        for kind, rows in (("in the bank", near), ("general", far))
        for who, key in (("adapter", "entropy"), ("base", "base_entropy"))
    }
    return made, entropies


def _general_answers(bench: Bench, bank: Bank, asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the base's own answers, those read from the best candidate whatever a gate would say)."""
    (subject,) = make_subjects(["no_context"], Setup(bench.base, bench.style, progress=bench.progress))
    room = bench.config.answer_tokens
    plain = subject.answers([Query(question) for question in asked], room).texts
    engine = bench.engine(bank, GATED)
    loose = []
    for number, question in enumerate(asked, start=1):
        loose.append(engine.ask(question, gate=False, sampling=Sampling(max_tokens=room)).text)
        bench.progress("general, no gate", number, len(asked))
    return plain, loose


# ------------------------------------------------------------------------------------------------------------- the parts


def run_main(bench: Bench, seed: int) -> tuple[Scores, dict[str, Any]]:
    """(scores of each item, {learned, entropies, bytes}) of one seed: columns, recall and gates."""
    texts, items = bench.corpus.texts(seed), bench.corpus.items(seed)
    bench.folder.mkdir(parents=True, exist_ok=True)
    with open_bank(bench.folder / "bank", create=True, base_id=bench.base.id, base_name=bench.base.name) as bank:
        write_bank(bench, bank, texts)
        learned = learn(bench, bank)
        answers = ask_columns(bench, bank, items, texts)
        scores = table_scores(bench.corpus, items, answers) | gold_losses(bench, bank, items, texts, answers)
        gated, entropies = gate_scores(bench, bank, seed, items, answers, learned["gates"])
        scores |= recall_scores(bench, bank, items)
        sizes = bytes_per_memory(bench, bank, texts)
    return {**scores, **gated}, {"learned": learned, "entropies": entropies, "bytes": sizes}


def recall_scores(bench: Bench, bank: Bank, items: Sequence[Item]) -> Scores:
    """{recall/k: whether each item's own memory is among the k that are retrieved first}: what caps all that follows."""
    found = bench.engine(bank, max(RECALL)).retrieved([item.question for item in items])
    return {f"recall/{k}": [float(i.name in names[:k]) for i, names in zip(items, found, strict=True)] for k in RECALL}


def bytes_per_memory(bench: Bench, bank: Bank, texts: Mapping[str, str]) -> dict[str, float]:
    """Mean bytes of a document's adapter as stored, of its text, and of the base's plain cache of it in the same dtype."""
    c = bench.base.config
    per_token = 2 * c.num_layers * c.num_kv_heads * c.head_size * np.dtype(bench.base.params["embed"].dtype).itemsize
    tokens = [len(bench.base.tokenizer.encode(text)) for text in texts.values()]
    return {
        "bytes_adapter": float(np.mean([bank.get(name).bytes for name in texts])),
        "bytes_text": float(np.mean([len(text.encode()) for text in texts.values()])),
        "bytes_cache": float(np.mean(tokens)) * per_token,
    }


def main_numbers(numbers: Mapping[str, float]) -> dict[str, float]:
    """The figures that the experiment is judged by, from the means of `run_main`'s scores; see the head of `cli.eval`."""
    mean = lambda key: numbers[key]
    ratio = lambda a, b: mean(a) / mean(b) if mean(b) else 0.0
    made = {
        "oracle_over_incontext": ratio("right/oracle", "right/in_context"),
        "retrieval3_over_oracle": ratio("right/retrieval3", "right/oracle"),
        "general_loss_ungated_points": 100 * (mean("general/base") - mean("general/ungated")),
    }
    for rule in RULES:
        if f"opened/{rule}" not in numbers:
            continue
        end = "" if rule == DEFAULT_RULE else f"/{rule}"  # a key without a rule is the default's
        made[f"gate_balanced_accuracy{end}"] = (mean(f"opened/{rule}") + mean(f"closed/{rule}")) / 2
        made[f"general_loss_gated_points{end}"] = 100 * (mean("general/base") - mean(f"general/{rule}"))
        if f"foreign/{rule}" in numbers:
            made[f"foreign_opened_points{end}"] = 100 * mean(f"foreign/{rule}")
        made[f"in_bank_loss_gated_points{end}"] = 100 * (mean("in_bank/ungated") - mean(f"in_bank/{rule}"))
    return made


def run_near(bench: Bench, seed: int) -> Scores:
    """{near/exact_match/WAY, near/routed/WAY} of near duplicates: 32 documents that differ in the name of one place and
    what is said of it, asked through its people ("the Tavinfolk"), so that no word of a question tells them apart.

    Ways: retrieval1, and among `near_candidates` retrieval, lowest entropy and router (retrieval where it does not help);
    `oracle`.
    The router is learnt from this bank's held-out questions, as `memjax train router` does.
    """
    pairs = world.near_duplicates("test", seed, bench.config.near, min(bench.config.tokens, 120), vary_answer=True)
    texts = {f"near-{number:03d}": doc.text for number, (doc, _) in enumerate(pairs)}
    items = [Item(f"near-{number:03d}", q.text, (q.answer,)) for number, (_, q) in enumerate(pairs)]
    bench.folder.mkdir(parents=True, exist_ok=True)
    made: Scores = {}
    with open_bank(bench.folder / "near", create=True, base_id=bench.base.id, base_name=bench.base.name) as bank:
        write_bank(bench, bank, texts, "near duplicates")
        _learn_near(bench, bank)
        ways = {
            "oracle": (1, "retrieval"),
            "retrieval1": (1, "retrieval"),
            "retrieval": (bench.config.near_candidates, "retrieval"),
            "entropy": (bench.config.near_candidates, "entropy"),
            "router": (bench.config.near_candidates, "auto"),
        }
        for way, (candidates, route) in ways.items():
            engine = bench.engine(bank, candidates, route)
            sampling = Sampling(max_tokens=bench.config.answer_tokens)
            for number, item in enumerate(items, start=1):
                named = item.name if way == "oracle" else None
                answer = engine.ask(item.question, memory=named, gate=False, sampling=sampling)
                said = first_line(answer.text)
                made.setdefault(f"near/exact_match/{way}", []).append(exact_match(said, item.answers))
                made.setdefault(f"near/routed/{way}", []).append(float(answer.choice.memory == item.name))
                bench.progress(f"near, {way}", number, len(items))
    return made


def _learn_near(bench: Bench, bank: Bank) -> None:
    """Trains the router of the near duplicates' own bank; there is none where there are too few questions to learn one."""
    config = dataclasses.replace(bench.config.router, candidates=bench.config.near_candidates)
    engine = bench.engine(bank, bench.config.near_candidates, "retrieval")
    told = lambda done, total: bench.progress("near, held-out", done, total)
    with contextlib.suppress(BankError):
        learn_router(engine, config, see_questions(engine, general=0, progress=told), progress=False)


def near_numbers(numbers: Mapping[str, float]) -> dict[str, float]:
    """{router_gain_points, entropy_gain_points}: exact match over plain retrieval on near duplicates, in points."""
    plain = numbers["near/exact_match/retrieval1"]
    ways = {"router_gain_points": "router", "entropy_gain_points": "entropy"}
    key = "near/exact_match/{}"
    return {n: 100 * (numbers[key.format(w)] - plain) for n, w in ways.items() if key.format(w) in numbers}


def run_sizes(bench: Bench, seed: int, sizes: Sequence[int] = (1, 4, 16, 64)) -> dict[str, float]:
    """{accuracy_at/N: share right of retrieval@3 on the first documents' questions, where the bank holds N documents}.

    The same questions at every size, so that only the number of other memories differs. Namespaces of the main bank stand
    for the smaller banks.
    """
    texts, items = bench.corpus.texts(seed), bench.corpus.items(seed)
    names = list(texts)
    sizes = sorted({min(size, len(names)) for size in sizes})
    probed = [item for item in items if item.name in names[: max(1, min(4, sizes[-1]))]]
    made = {}
    with open_bank(bench.folder / "bank") as bank:
        router = read_router(bench.base, bank)
        for size in sizes:
            namespace = f"first-{size}"
            share_names(bench, bank, names[:size], texts, namespace)
            if router is not None:
                keep_router(bank, router, namespace)
            engine = bench.engine(bank, GATED, "auto", namespace)
            asked = [item for item in probed if item.name in names[:size]]
            sampling = Sampling(max_tokens=bench.config.answer_tokens)
            said = [engine.ask(item.question, gate=False, sampling=sampling).text for item in asked]
            made[f"accuracy_at/{size}"] = float(np.mean(bench.corpus.right(said, asked)))
    return made


def share_names(bench: Bench, bank: Bank, names: Sequence[str], texts: Mapping[str, str], namespace: str) -> None:
    """Point a namespace's names at memories that another one holds: the artefact is written again, and is the same."""
    config = bench.base.config
    for name in names:
        if bank.find(name, namespace) is None:
            entry = bank.get(name)
            memory = read_artefact(bank.folder(entry.id), site_shapes(config), config.num_layers, SITE_MODULES)
            meta = Meta(**memory.provenance)
            write = lambda folder, m=memory, t=meta: write_artefact(folder, m.artefact, SITE_MODULES, t)
            bank.add(name, entry.key, write, namespace=namespace, text=texts[name])
