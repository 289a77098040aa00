"""The writer of Doc-to-LoRA: a text of any length becomes an adapter of the bank in one pass (arXiv 2602.15902)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from memjax.errors import ConfigError, InputError
from memjax.memory.adapter import Adapter, recompress, update_inner
from memjax.models.base import Base
from memjax.write.distill import Written, probe_questions
from memjax.write.hypernet.chunks import document_tokens, split_tokens
from memjax.write.hypernet.encode import Hyper, Weigh, encode_chunks
from memjax.write.prompts import PromptStyle, read_tokens
from memjax.write.reading import question_room


@dataclasses.dataclass(frozen=True)
class InternalizeConfig:
    """How a text is internalised.

    network: id of the hypernetwork. max_chunk: tokens of a chunk (0: the hypernetwork's own); overlap: tokens that
    neighbours share, so that a fact on a boundary is whole in one of them (reference: 0); weigh: what each of K chunks
    counts, 1 (the reference; the update's norm grows with K), 1 / sqrt(K), 1 / K, or so much that the sum is as large as
    one chunk's update ("level"; see `encode.levelled`); rank: an adapter of a higher rank is recompressed to it by SVD.
    probes: questions about the text that gates are calibrated with.
    """

    network: str
    max_chunk: int = 0
    overlap: int = 16
    weigh: Weigh = "sum"
    rank: int = 64
    iterative: bool = False
    probes: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.max_chunk, self.overlap, self.probes) < 0 or self.rank < 1:
            raise ConfigError("internalising wants max_chunk, overlap and probes of at least 0, and a rank of at least 1")


def internalize(
    base: Base,
    text: str,
    style: PromptStyle,
    config: InternalizeConfig,
    hyper: Hyper,
    *,
    progress: Callable[[str, float, dict[str, float]], None] = lambda stage, share, metrics: None,
) -> Written:
    """Write `text` into an adapter of the frozen base by `hyper`, chunk by chunk where it is long.

    Its metrics: `chunks`, `rank` as emitted, `recompressed` (the relative error where the rank was above the config's, else
    0), `update` (the largest share, over layers and sites, of the update's norm in the weight's), `seconds_pass`. Questions
    for the gate are made of the part of the text that the base can read at once. InputError for a text that is empty, or a
    hypernetwork that is not the config's.
    """
    if config.network != hyper.id:
        raise InputError(
            f"the recipe names the hypernetwork {config.network[:12]}, and {hyper.id[:12]} is loaded; give that"
        )
    if not text.strip():
        raise InputError("the text is empty; give it something to remember")
    progress("questions", 0.0, {})
    probes = probe_questions(base, _readable(base, style, text), style, config.probes, config.seed)
    progress("train", 0.0, {})
    began = time.monotonic()
    tokens = document_tokens(base.tokenizer, style, text)
    longest = config.max_chunk or hyper.max_chunk
    chunks = split_tokens(tokens, hyper.affixes, longest, min(config.overlap, longest - 1), base.config.max_positions)
    adapter = encode_chunks(base, hyper, chunks, weigh=config.weigh, iterative=config.iterative)
    emitted, error = adapter.rank, 0.0
    if emitted > config.rank:
        adapter, error = recompress(adapter, config.rank)
    adapter = jax.block_until_ready(adapter)
    seconds = time.monotonic() - began
    progress("train", 1.0, {})
    metrics = {
        "chunks": float(len(chunks)),
        "rank": float(emitted),
        "recompressed": error,
        "update": max(float(share.max()) for share in update_shares(base, adapter).values()),
        "seconds_pass": seconds,
    }
    return Written(adapter, tuple(probes), metrics)


def update_shares(base: Base, adapter: Adapter) -> dict[str, np.ndarray]:
    """{site: [L]} Frobenius norm of the update of each layer's weight as a share of the weight's own, float64."""
    shares = {}
    for site, squared in update_inner(adapter, adapter).items():
        weight = np.linalg.norm(np.asarray(base.params["layers"][site], np.float64), axis=(1, 2))
        shares[site] = np.sqrt(np.maximum(squared, 0)) / np.maximum(weight, 1e-12)
    return shares


def _readable(base: Base, style: PromptStyle, text: str) -> str:
    """As much of the text's beginning as the base reads at once beside a question."""
    window, prompt = base.config.max_positions, read_tokens(base.tokenizer, style, "", "")
    room = window - question_room(window) - len(prompt)
    tokens = base.tokenizer.encode(text)
    return text if len(tokens) <= room else base.tokenizer.decode(tokens[: max(room, 1)])
