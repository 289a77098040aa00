"""Several buffers read at once: one answer of the untouched base behind the slots of all of them (arXiv 2602.21221 names
the use and measures nothing; joins as in `models.buffers.read_buffers`)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from memjax.errors import ArtefactError, InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.buffer import Buffer
from memjax.models.buffers import Join, buffer_prefix, read_buffers
from memjax.models.config import ModelConfig
from memjax.models.generate import Prefix, Sampling, bucket, check_window, generate
from memjax.serve.engine import Engine
from memjax.write.reading import tail_tokens

JOINS: tuple[Join, ...] = ("shift", "raw")


def buffers_prefix(config: ModelConfig, header: Segment, buffers: Sequence[Buffer], join: Join = "shift") -> Prefix:
    """The header once, and the slots of all buffers behind it, filled up to a bucket of slots; see `read_buffers`."""
    segment, following = read_buffers(config, buffers, join)
    short = bucket(segment.k.shape[2]) - segment.k.shape[2]
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0), (0, 0))) for x in (segment.k, segment.v))
    position = jnp.pad(segment.position, ((0, 0), (0, short)), constant_values=-1)
    return buffer_prefix(header, Segment(k, v, position), following)


def named_buffers(engine: Engine, names: Sequence[str]) -> list[Buffer]:
    """The buffers of these names in an engine's bank, in their order.

    InputError where one is an adapter, ArtefactError where one is damaged or was written behind another header, BankError
    for an unknown name.
    """
    found = []
    for name in names:
        artefact = engine.pools.load(engine.bank, engine.bank.get(name, engine.namespace))
        if not isinstance(artefact, Buffer):
            raise InputError(f"memory {name!r} is an adapter, and only buffers are read at once; use a vote or a mix")
        if artefact.header != int(engine.reading_header().length):
            raise ArtefactError(f"memory {name!r} was written with another prompt style; write it again")
        found.append(artefact)
    return found


def nearest_buffers(engine: Engine, question: str) -> tuple[str, ...]:
    """The names of a question's candidates that are buffers, best first; InputError where there are none."""
    held = {name: engine.bank.get(name, engine.namespace).kind for name in engine.retrieved([question])[0]}
    names = tuple(name for name, kind in held.items() if kind == "buffer")
    if not names:
        raise InputError("none of the candidates is a buffer; name memories with --memory, or write some --how compile")
    return names


def read_together(
    engine: Engine, question: str, names: Sequence[str], join: Join = "shift", sampling: Sampling = Sampling(max_tokens=48)
) -> str:
    """What the base says to a question behind these buffers, read at once and without a gate; see `named_buffers`."""
    base = engine.base
    prefix = buffers_prefix(base.config, engine.reading_header().segment, named_buffers(engine, names), join)
    tail = tail_tokens(base.tokenizer, engine.style, question)
    check_window(base.model, int(prefix.length) + len(tail), sampling.max_tokens)
    (tokens,) = generate(base.model, base.params, [tail], base.tokenizer.eos_ids, sampling, prefix=prefix)
    return base.tokenizer.decode(tokens).strip()
