"""What one pass of a hypernetwork costs, by the length of the document: seconds, bytes at once, bytes of what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bench.timing import SMOLLM2_SHAPE, bytes_allocated, in_turn
from memjax.models.config import ModelConfig
from memjax.models.decoder import abstract_params, init_params, make_model
from memjax.models.generate import batch_bucket, bucket, pad_prompts
from memjax.write.hypernet.encode import CHUNKS, read_chunks
from memjax.write.hypernet.network import HyperConfig, abstract_hyper, init_hyper

WAYS = {"batched": False, "iterative": True}
NETWORK = HyperConfig(width=256, heads=8, kv_heads=2, head_size=64, blocks=4)


def pass_cost(
    config: ModelConfig = SMOLLM2_SHAPE,
    tokens: Sequence[int] = (512, 2048, 8192),
    chunk: int = 512,
    times: int = 3,
    network: HyperConfig = NETWORK,
) -> dict[str, float]:
    """{seconds/…-N, peak_bytes/…-N for batched and iterative, adapter_bytes-N, cache_bytes-N, adapter_over_cache-N}.

    Documents of N tokens in chunks of `chunk`, of which CHUNKS are read at once; random weights, float32. seconds: medians
    of `times` calls in turn. peak_bytes: what the compiler allocates for the program that reads those chunks, without the
    parameters. adapter_bytes: all its factors, the bias rows included; cache_bytes: keys and values of the N tokens, both
    in two bytes a number: what a question would read instead.
    """
    model, params = make_model(config), init_params(config, jax.random.key(0))
    hyper = init_hyper(network, config, jax.random.key(1), 0.3)
    made: dict[str, float] = {}
    rng = np.random.default_rng(0)
    for count in tokens:
        chunks = [rng.integers(0, config.vocab_size, min(chunk, count)).tolist() for _ in range(-(-count // chunk))]
        rows = batch_bucket(min(len(chunks), CHUNKS))
        parts = [
            pad_prompts(chunks[begin : begin + CHUNKS], rows, bucket(chunk)) for begin in range(0, len(chunks), CHUNKS)
        ]

        def read(iterative: bool, parts: Sequence[tuple[np.ndarray, np.ndarray]] = parts) -> list[Any]:
            return [read_chunks(model, network, params, hyper, *part, iterative=iterative) for part in parts]

        took = in_turn({way: partial(read, iterative) for way, iterative in WAYS.items()}, times)
        made |= {f"seconds/{way}-{count}": float(np.median(seconds)) for way, seconds in took.items()}
        made |= {f"peak_bytes/{way}-{count}": peak_bytes(config, network, rows, chunk, it) for way, it in WAYS.items()}
        numbers = sum(map(sum, network.sizes(config).values())) * config.num_layers * network.rank * (len(chunks) + 1)
        cached = 2 * config.num_layers * config.num_kv_heads * config.head_size * count
        made |= {
            f"adapter_bytes-{count}": 2.0 * numbers,
            f"cache_bytes-{count}": 2.0 * cached,
            f"adapter_over_cache-{count}": numbers / cached,
        }
    return made


def peak_bytes(config: ModelConfig, network: HyperConfig, rows: int, length: int, iterative: bool) -> float:
    """Bytes that reading `rows` chunks of `length` tokens at once allocates, the parameters left out."""
    params, hyper = abstract_params(config), abstract_hyper(network, config)
    ids = jax.ShapeDtypeStruct((rows, bucket(length)), jnp.int32)
    used = bytes_allocated(read_chunks, make_model(config), network, params, hyper, ids, ids, iterative=iterative)
    weights = sum(leaf.size * leaf.dtype.itemsize for tree in (params, hyper) for leaf in jax.tree.leaves(tree))
    return used - float(weights)
