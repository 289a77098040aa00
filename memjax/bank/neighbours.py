"""Approximate nearest keys for very large banks: a graph by usearch (HNSW, arXiv 1603.09320), an extra of the install.

Up to `EXACT` keys a matrix product is fast and finds everything. Above it, where usearch is installed, a graph of each part
names the likely keys and their cosines are computed exactly. Without usearch all keys are compared, as below.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

EXACT = 100_000  # keys; their product with a query took 30 ms on two busy cores (width 384)
FOUND = 256  # keys that the graph is asked for


def build_graph(keys: np.ndarray) -> Any:
    """The graph over unit keys float32 [m, width]; None where usearch is not installed."""
    if importlib.util.find_spec("usearch") is None:
        return None
    from usearch.index import Index

    graph = Index(ndim=keys.shape[1], metric="ip", dtype="f16")
    graph.add(np.arange(len(keys)), keys)
    return graph


def graph_bytes(graph: Any) -> np.ndarray:
    """uint8 [bytes]: the graph as a tensor file holds it."""
    return np.frombuffer(graph.save(), np.uint8)


def load_graph(data: np.ndarray, count: int) -> Any:
    """The graph over `count` keys in uint8 [bytes], which may be memory-mapped; None where it cannot be read."""
    if importlib.util.find_spec("usearch") is None:
        return None
    from usearch.index import Index

    try:
        graph = Index.restore(memoryview(data.data), view=True)
    except (OSError, ValueError, RuntimeError):
        return None
    return graph if graph is not None and len(graph) == count else None


def near_scores(graph: Any, keys: np.ndarray, starts: np.ndarray, query: np.ndarray, found: int = FOUND) -> np.ndarray:
    """float32 [n]: the largest cosine of a query [width] with a key of each memory (`starts` [n]: each one's first key).

    Exact for memories whose best key is among the `found` nearest; the others all have the lowest of those cosines.
    """
    rows = np.sort(graph.search(query, min(found, len(keys))).keys.astype(np.int64))
    cosines = keys[rows] @ query
    scores = np.full(len(starts), cosines.min(), np.float32)
    np.maximum.at(scores, np.searchsorted(starts, rows, side="right") - 1, cosines)
    return scores
