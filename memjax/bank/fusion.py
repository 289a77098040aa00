"""One interface to retrieval, and the fusion of words (BM25) with meaning (vectors).

Whatever retrieves has `ids` [n], `scores(query)` [n] and `search(query, k)`. Words find names that an encoder has never
seen; meaning finds paraphrases that share no word: `fuse` combines both scores of each memory. Reciprocal rank fusion is
that of Cormack, Clarke and Buettcher (SIGIR 2009); the weighted sums are of scores made comparable within one query.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

import numpy as np

from memjax.bank.parts import top
from memjax.bank.retrieve import TextIndex, open_index
from memjax.bank.store import DEFAULT_NAMESPACE, Bank
from memjax.bank.vectors import Vectors, open_vectors
from memjax.errors import ConfigError

if TYPE_CHECKING:
    from memjax.models.encoder import Encoder

KINDS = ("auto", "bm25", "dense", "fusion")
RULES = ("rrf", "zscore", "minmax")


class Retriever(Protocol):
    """What finds memories: by words, by meaning, or by both."""

    @property
    def ids(self) -> np.ndarray: ...
    def scores(self, query: str) -> np.ndarray: ...
    def search(self, query: str, k: int, fill: bool = False) -> list[tuple[str, float]]: ...


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """rule: rrf | zscore | minmax; weight: that of the dense score, 0 to 1; rank: the constant of rrf."""

    rule: str = "minmax"
    weight: float = 0.5
    rank: float = 60.0

    def __post_init__(self) -> None:
        if self.rule not in RULES or not 0 <= self.weight <= 1 or self.rank < 0:
            raise ConfigError(f"fusion wants a rule of {', '.join(RULES)}, a weight of 0 to 1 and a rank of at least 0")


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Words and meaning over the same memories."""

    text: TextIndex
    vectors: Vectors
    config: FusionConfig = FusionConfig()

    @property
    def ids(self) -> np.ndarray:
        """[n], those of the text index."""
        return self.text.ids

    def scores(self, query: str) -> np.ndarray:
        """float32 [n]: the fused score of each memory."""
        return fuse(self.text.scores(query), self.aligned(self.vectors.scores(query)), self.config)

    def search(self, query: str, k: int, fill: bool = True) -> list[tuple[str, float]]:
        """The k best memories as (id, fused score), best first; every memory has some score, so `fill` is moot."""
        return top(self.ids, self.scores(query), k)

    def aligned(self, scores: np.ndarray) -> np.ndarray:
        """Dense scores in the order of the text index.

        The two differ for an instant where a bank changes between the opening of one and of the other; a memory without
        vectors then counts as the worst.
        """
        if np.array_equal(self.text.ids, self.vectors.ids):
            return scores
        place = {str(name): i for i, name in enumerate(self.vectors.ids)}
        worst = float(scores.min()) if len(scores) else 0.0
        found = (place.get(str(name)) for name in self.text.ids)
        return np.array([worst if i is None else scores[i] for i in found], np.float32)


def fuse(text: np.ndarray, dense: np.ndarray, config: FusionConfig = FusionConfig()) -> np.ndarray:
    """Fused scores float32 [n] of a query's BM25 scores [n] and cosines [n]. Without any shared word, dense alone counts.

    rrf: sum of weight / (rank + place); zscore: weighted sum of (score - mean) / deviation over all memories; minmax:
    weighted sum of scores scaled to 0 ... 1.
    """
    scale = {"rrf": lambda s: _reciprocal(s, config.rank), "zscore": _zscore, "minmax": _minmax}[config.rule]
    return ((1 - config.weight) * scale(text) + config.weight * scale(dense)).astype(np.float32)


def _reciprocal(scores: np.ndarray, rank: float, places: int = 200) -> np.ndarray:
    """1 / (rank + place) for the best `places` scores, equal scores sharing their first place, and 0 for the others.

    Scores at the minimum count as not found: where BM25 knows no word of the query, it has no say.
    """
    made = np.zeros(len(scores), np.float32)
    if not len(scores):
        return made
    size = min(places, len(scores))
    best = np.argpartition(-scores, size - 1)[:size]
    best = best[scores[best] > scores.min()]
    ordered = np.sort(-scores[best])
    made[best] = 1 / (rank + 1 + np.searchsorted(ordered, -scores[best]))
    return made


def _zscore(scores: np.ndarray) -> np.ndarray:
    deviation = scores.std() if len(scores) else 0.0
    return (scores - scores.mean()) / deviation if deviation > 0 else np.zeros_like(scores)


def _minmax(scores: np.ndarray) -> np.ndarray:
    span = np.ptp(scores) if len(scores) else 0.0
    return (scores - scores.min()) / span if span > 0 else np.zeros_like(scores)


def open_retriever(
    bank: Bank,
    kind: str = "auto",
    encoder: Encoder | None = None,
    namespace: str = DEFAULT_NAMESPACE,
    held: Retriever | None = None,
    config: FusionConfig = FusionConfig(),
) -> Retriever:
    """What retrieves from a namespace as it is now; only its own texts and keys are read.

    kind: bm25 | dense | fusion; auto is fusion where an encoder is given and bm25 where none is. `held`: what an earlier
    call gave, so that nothing is opened twice. ConfigError for another kind, or where an encoder is wanted and missing.
    """
    if kind not in KINDS:
        raise ConfigError(f"retrieval {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if kind == "auto":
        kind = "bm25" if encoder is None else "fusion"
    if kind == "bm25":
        return open_index(bank, namespace, held if isinstance(held, TextIndex) else _part(held, "text"))
    if encoder is None:
        raise ConfigError(f"retrieval {kind!r} needs an encoder; give one, or use bm25")
    old = held if isinstance(held, Vectors) else _part(held, "vectors")
    if kind == "dense":
        return open_vectors(bank, encoder, namespace, old)
    text = open_index(bank, namespace, _part(held, "text"))
    vectors = open_vectors(bank, encoder, namespace, old)
    if isinstance(held, Fusion) and held.text is text and held.vectors is vectors and held.config == config:
        return held
    return Fusion(text, vectors, config)


def _part(held: Retriever | None, name: str):
    return getattr(held, name) if isinstance(held, Fusion) else None
