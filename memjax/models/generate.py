"""Reading with a base: prefill and decode as two compiled programs per bucket of lengths, and generation on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import InputError
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Slots
from memjax.memory.cache import Cache
from memjax.memory.latent import Residual
from memjax.models.decoder import Model, Params, empty_cache, forward, unembed
from memjax.sharding import mesh_of, readable

DECODE_LIMIT = 64  # tokens that one call of `decode` can make
PREFILL_BLOCK = 512  # longer prompts are read in blocks of this many tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy; top_p keeps the smallest set of that much probability."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError("sampling wants max_tokens >= 1, temperature >= 0 and 0 < top_p <= 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Where a batch of rows stands: token [B] (chosen, not yet read), position [B] of it, cache, done [B], key."""

    token: jax.Array
    position: jax.Array
    cache: Cache
    done: jax.Array
    key: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """A prompt read once by the base and shared, read-only, by every row that continues it.

    segment: k, v [L, 1, S, K, H], position [1, S]; length int32 [], the position at which rows continue. Or, from
    `side_by_side`, one prompt for each row: B in place of 1, and length [B]. latent: the memory of what was evicted.
    """

    segment: Segment
    length: jax.Array
    latent: Residual | None = None


def bucket(length: int) -> int:
    """The smallest compiled length that holds `length` tokens: 32, 64, 96, 128, 192, 256, 384, 512, 768, ..."""
    size = 32
    while size < length:
        if size >= 64 and size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def batch_bucket(rows: int) -> int:
    """The smallest compiled number of rows: a power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def pad_prompts(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, positions) int32 [rows, length] of right-padded prompts; padding and unused rows have position -1."""
    ids = np.zeros((rows, length), np.int32)
    positions = np.full((rows, length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
    return ids, positions


@partial(jax.jit, static_argnums=0, donate_argnames=("cache",))
def prefill(
    model: Model,
    params: Params,
    ids: jax.Array,
    positions: jax.Array,
    cache: Cache,
    segments: Sequence[Segment] = (),
    slots: Slots | None = None,
    slot_ids: jax.Array | None = None,
    latent: Residual | None = None,
) -> tuple[jax.Array, Cache]:
    """(hidden [B, D] of each row's last valid token, cache) after reading ids [B, T]; zeros for rows without any."""
    out = forward(model, params, ids, positions, cache, segments=segments, latent=latent, slots=slots, slot_ids=slot_ids)
    assert out.cache is not None
    last = (positions >= 0).sum(axis=1) - 1
    hidden = jnp.take_along_axis(out.hidden, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(last[:, None] >= 0, hidden, 0), out.cache


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Token ids [B] drawn from logits [B, V]; greedy where temperature is 0 (nucleus sampling, arXiv 1904.09751)."""

    def draw() -> jax.Array:
        scaled = logits / jnp.maximum(temperature, 1e-6)
        kept = jax.lax.cond(top_p < 1, lambda: nucleus(jax.nn.softmax(scaled, axis=-1), top_p), lambda: scaled > -jnp.inf)
        return jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf), axis=-1)

    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def nucleus(probability: jax.Array, top_p: jax.Array) -> jax.Array:
    """bool [B, V]: the fewest most likely tokens that hold `top_p` of the probability [B, V]; ties at its edge all count.

    The edge is found by bisection: sorting a vocabulary takes longer than reading a token with a small base.
    """

    def halve(_: jax.Array, edges: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = edges
        middle = (low + high) / 2
        enough = jnp.where(probability >= middle, probability, 0).sum(axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    most = probability.max(axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(most), most))
    return probability >= low


@partial(jax.jit, static_argnums=0, donate_argnames=("cache",))
def start(
    model: Model,
    params: Params,
    hidden: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    stops: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
) -> Decoding:
    """The first token of each row from hidden [B, D] of its last prompt token; a row of length 0 is done at once."""
    key, draw = jax.random.split(key)
    token = sample(unembed(model, params, hidden), draw, temperature, top_p)
    state = Decoding(token, lengths, cache, _stopped(token, stops) | (lengths == 0), key)
    return _readable(state, params)


@partial(jax.jit, static_argnums=0, donate_argnames=("state",))
def decode(
    model: Model,
    params: Params,
    state: Decoding,
    steps: jax.Array,
    stops: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    segments: Sequence[Segment] = (),
    slots: Slots | None = None,
    slot_ids: jax.Array | None = None,
    latent: Residual | None = None,
) -> tuple[jax.Array, Decoding]:
    """(tokens [B, DECODE_LIMIT], state) after up to `steps` further tokens; -1 after a row has stopped.

    The token in `state` is read first and is not repeated in `tokens`; stop tokens are not written either.
    """
    batch = state.token.shape[0]

    def unfinished(carry: tuple[jax.Array, jax.Array, Decoding]) -> jax.Array:
        index, _, state = carry
        return (index < steps) & ~state.done.all()

    def body(carry: tuple[jax.Array, jax.Array, Decoding]) -> tuple[jax.Array, jax.Array, Decoding]:
        index, tokens, state = carry
        position = jnp.where(state.done, -1, state.position)
        out = forward(
            model,
            params,
            state.token[:, None],
            position[:, None],
            state.cache,
            segments=segments,
            latent=latent,
            slots=slots,
            slot_ids=slot_ids,
        )
        assert out.cache is not None
        key, draw = jax.random.split(state.key)
        token = sample(unembed(model, params, out.hidden[:, 0]), draw, temperature, top_p)
        done = state.done | _stopped(token, stops)
        tokens = tokens.at[:, index].set(jnp.where(done, -1, token))
        return index + 1, tokens, Decoding(token, state.position + 1, out.cache, done, key)

    tokens = jnp.full((batch, DECODE_LIMIT), -1, jnp.int32)
    _, tokens, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), tokens, state))
    return readable(tokens, mesh_of(params["embed"])), _readable(state, params)


def _readable(state: Decoding, params: Params) -> Decoding:
    """The state with what the host looks at, all but the cache, on every device of a mesh."""
    shown = readable((state.token, state.position, state.done), mesh_of(params["embed"]))
    return dataclasses.replace(state, token=shown[0], position=shown[1], done=shown[2])


def _stopped(token: jax.Array, stops: jax.Array) -> jax.Array:
    return (token[:, None] == stops[None, :]).any(axis=1)


def read_prompts(
    model: Model, params: Params, prompts: Sequence[Sequence[int]], room: int, prefix: Prefix | None = None
) -> tuple[jax.Array, Cache, np.ndarray]:
    """(hidden [B, D] of the last tokens, cache with `room` more places, lengths [B]) of prompts read in blocks.

    B is bucketed; unused rows have length 0. With a `prefix`, prompts continue it and their lengths do not count it.
    InputError where a prompt does not fit the base's window.
    """
    before, rows = length_of(prefix), batch_bucket(len(prompts))
    if before.ndim and len(before) != rows:
        raise InputError(f"{len(before)} prefixes stand side by side, but {rows} rows continue them; give as many of each")
    longest = check_prompts(model, prompts, room)
    starts = np.broadcast_to(before, (rows,))[: len(prompts)]
    check_window(model, max(int(start) + len(p) for start, p in zip(starts, prompts, strict=True)), room)
    lengths = np.zeros((rows,), np.int32)
    lengths[: len(prompts)] = [len(p) for p in prompts]
    # The sum of two buckets, not the bucket of the sum: prompts of one bucket share the programs that go on from them.
    cache = empty_cache(model.config, rows, bucket(longest) + (bucket(room) if room else 0), params["embed"])
    hidden = jnp.zeros((rows, model.config.width), params["embed"].dtype)
    for begin in range(0, longest, PREFILL_BLOCK):
        parts = [p[begin : begin + PREFILL_BLOCK] for p in prompts]
        ids, positions = pad_prompts(parts, rows, bucket(max(len(p) for p in parts)))
        positions = np.where(positions >= 0, positions + before.reshape(-1, 1) + begin, -1)
        last, cache = prefill(model, params, ids, positions, cache, segments_of(prefix), latent=latent_of(prefix))
        ends_here = (lengths > begin) & (lengths <= begin + PREFILL_BLOCK)
        hidden = jnp.where(ends_here[:, None], last, hidden)
    return hidden, cache, lengths


def read_prefix(model: Model, params: Params, tokens: Sequence[int]) -> Prefix:
    """The base's cache of `tokens` as a prefix that any number of rows may continue."""
    _, cache, _ = read_prompts(model, params, [tokens], 0)
    return Prefix(Segment(cache.k, cache.v, cache.position), jnp.int32(len(tokens)))


def side_by_side(prefixes: Sequence[Prefix]) -> Prefix:
    """Prefixes of one prompt each as one, of which row b continues the b-th; rows are bucketed, places the most."""
    rows = batch_bucket(len(prefixes))
    places = max(prefix.segment.k.shape[2] for prefix in prefixes)

    def joined(parts: Sequence[jax.Array], axis: int, empty: int) -> jax.Array:
        """Along the axis of rows, the one before that of places; both filled up with `empty`."""
        widths = [[(0, 0)] * part.ndim for part in parts]
        for width, part in zip(widths, parts, strict=True):
            width[axis + 1] = (0, places - part.shape[axis + 1])
        filled = [jnp.pad(part, width, constant_values=empty) for part, width in zip(parts, widths, strict=True)]
        return jnp.concatenate([*filled, *[jnp.full_like(filled[0], empty)] * (rows - len(filled))], axis=axis)

    held = [prefix.segment for prefix in prefixes]
    k, v = joined([s.k for s in held], 1, 0), joined([s.v for s in held], 1, 0)
    position = joined([s.position for s in held], 0 if held[0].position.ndim == 2 else 1, -1)
    lengths = [*(int(prefix.length) for prefix in prefixes), *[0] * (rows - len(prefixes))]
    latent = prefixes[0].latent
    if latent is not None:
        states = [prefix.latent.latent for prefix in prefixes if prefix.latent is not None]
        states += [jax.tree.map(jnp.zeros_like, states[0])] * (rows - len(states))
        latent = dataclasses.replace(latent, latent=jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *states))
    return Prefix(Segment(k, v, position), jnp.asarray(lengths, jnp.int32), latent)


def length_of(prefix: Prefix | None) -> np.ndarray:
    """The position at which rows continue, int32 [] or [B]; 0 without a prefix."""
    return np.asarray(0 if prefix is None else prefix.length, np.int32)


def latent_of(prefix: Prefix | None) -> Residual | None:
    """The prefix's memory of what was evicted, as `forward` takes it."""
    return None if prefix is None else prefix.latent


def segments_of(prefix: Prefix | None) -> tuple[Segment, ...]:
    """The prefix as `forward` takes it."""
    return () if prefix is None else (prefix.segment,)


def check_prompts(model: Model, prompts: Sequence[Sequence[int]], room: int, what: str = "prompt") -> int:
    """The tokens of the longest prompt; InputError where one is empty or does not fit the base's window."""
    longest = max(len(p) for p in prompts)
    if min(len(p) for p in prompts) == 0:
        raise InputError(f"the {what} is empty; give at least one token")
    check_window(model, longest, room)
    return longest


def check_window(model: Model, prompt: int, room: int) -> None:
    """InputError where `prompt` tokens and `room` more exceed the base's window."""
    if prompt + room > model.config.max_positions:
        raise InputError(
            f"the prompt has {prompt} tokens and {room} more are asked for, but the base reads at most "
            f"{model.config.max_positions}; shorten the one or the other"
        )


def stream(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    sampling: Sampling = Sampling(),
    *,
    prefix: Prefix | None = None,
    every: int = DECODE_LIMIT,
) -> Iterator[list[list[int]]]:
    """New tokens of each prompt, up to `every` at a time, until each has stopped or has `max_tokens`."""
    hidden, cache, lengths = read_prompts(model, params, prompts, sampling.max_tokens, prefix)
    before = length_of(prefix)
    yield from stream_from(
        model,
        params,
        hidden,
        np.where(lengths > 0, lengths + before, 0),
        cache,
        stops,
        sampling,
        segments=segments_of(prefix),
        latent=latent_of(prefix),
        every=every,
        rows=len(prompts),
    )


def stream_from(
    model: Model,
    params: Params,
    hidden: jax.Array,
    next_position: np.ndarray,
    cache: Cache,
    stops: Sequence[int],
    sampling: Sampling,
    *,
    segments: Sequence[Segment] = (),
    latent: Residual | None = None,
    slots: Slots | None = None,
    slot_ids: jax.Array | None = None,
    every: int = DECODE_LIMIT,
    rows: int | None = None,
) -> Iterator[list[list[int]]]:
    """New tokens of rows that have been read up to `next_position` [B] (0: an unused row), from their hidden states.

    hidden [B, D] of the last token read; cache is donated; only the first `rows` rows are given out.
    """
    stop_ids = np.asarray(sorted(stops) or [-2], np.int32)
    temperature, top_p = np.float32(sampling.temperature), np.float32(sampling.top_p)
    key = jax.random.key(sampling.seed)
    state = start(model, params, hidden, next_position, cache, stop_ids, key, temperature, top_p)
    first, done = np.asarray(state.token), np.asarray(state.done)
    count = len(first) if rows is None else rows
    yield [[] if done[row] else [int(first[row])] for row in range(count)]
    made = 1
    while made < sampling.max_tokens and not done.all():
        steps = np.int32(min(every, DECODE_LIMIT, sampling.max_tokens - made))
        how = (segments, slots, slot_ids, latent)
        tokens, state = decode(model, params, state, steps, stop_ids, temperature, top_p, *how)
        made += int(steps)
        done = np.asarray(state.done)
        yield [[int(t) for t in row if t >= 0] for row in np.asarray(tokens)[:count]]


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    sampling: Sampling = Sampling(),
    *,
    prefix: Prefix | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, stop tokens left out."""
    return collect(stream(model, params, prompts, stops, sampling, prefix=prefix))


def generate_all(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    sampling: Sampling = Sampling(),
    *,
    prefix: Prefix | None = None,
    rows: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """`generate` for any number of prompts, `rows` at a time; what all begin with is read once unless `prefix` is given.

    The last batch is filled up with the longest prompt, so that batches of like prompts share their compiled programs.
    progress is told how many are answered.
    """
    if not prompts:
        return []
    if prefix is None:
        shared = common_prefix(prompts)
        prefix = read_prefix(model, params, prompts[0][:shared]) if shared else None
        prompts = [p[shared:] for p in prompts]
    rows = min(rows, batch_bucket(len(prompts)))
    longest = max(prompts, key=len)
    made: list[list[int]] = []
    for begin in range(0, len(prompts), rows):
        part = prompts[begin : begin + rows]
        fed = [*part, *[longest] * (rows - len(part))]
        made += generate(model, params, fed, stops, sampling, prefix=prefix)[: len(part)]
        progress(len(made))
    return made


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, at least one being left to each."""
    shortest = min(len(p) for p in prompts)
    shared = 0
    while shared < shortest - 1 and len({p[shared] for p in prompts}) == 1:
        shared += 1
    return shared


def collect(pieces: Iterator[list[list[int]]]) -> list[list[int]]:
    """All tokens of each row of a stream."""
    made: list[list[int]] = []
    for new in pieces:
        made = made or [[] for _ in new]
        for row, tokens in zip(made, new, strict=True):
            row.extend(tokens)
    return made
