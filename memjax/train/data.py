"""Data through Grain: seeded order, fixed shapes, and a position that means the same on any number of hosts.

Examples are addressed by one global order: a seeded permutation of the source, another one each epoch. Batch s of
`batched` takes places s*B to (s+1)*B-1 of it, and host h of H the h-th contiguous share of those rows, so the position
in the data is one number and a run resumed on fewer hosts sees the same global batches. `packed` puts the same order
through Grain's packing. Both are Grain datasets; their iterators' `get_state` is what a checkpoint stores.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import grain
import grain.experimental
import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import ConfigError, DataError

Example = Mapping[str, np.ndarray]
EXAMPLES = "examples"  # the entry of a batch that holds the indices of its examples; it stays on the host


class Source(Protocol):
    """Examples by index. `source[i]` must depend on nothing but i (a list, a memory-mapped file, `Generated`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Generated:
    """A source made on the fly: example i is `make(i, rng)` with a generator seeded by (seed, i)."""

    make: Callable[[int, np.random.Generator], Example]
    size: int
    seed: int = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        return self.make(int(index), np.random.default_rng([self.seed, int(index)]))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`batch` rows in a global batch; `length` tokens in a packed row; `epochs` None repeats for ever.

    `window` batches are packed together: more of them leave less padding and hold more examples in memory.
    `prefetch` batches are made ahead in a thread.
    """

    batch: int = 16
    length: int = 512
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    window: int = 8
    too_long: Literal["refuse", "truncate"] = "refuse"
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name, least in {"batch": 1, "length": 1, "window": 1, "prefetch": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; give at least {least}")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"data.epochs is {self.epochs}; give at least 1, or null to repeat for ever")


def order(source: Source, config: DataConfig) -> grain.MapDataset:
    """The global order of example indices: place → index, random access, reshuffled each epoch.

    Raises DataError for an empty source.
    """
    if not len(source):
        raise DataError("the training data holds no examples")
    places = grain.MapDataset.range(len(source)).seed(config.seed)
    if config.shuffle:
        places = places.shuffle()
    return places.repeat(config.epochs)


def batched(source: Source, config: DataConfig, *, host: int | None = None, hosts: int | None = None) -> grain.IterDataset:
    """Batches of examples of equal shapes, stacked: {name: [B / hosts, ...]}, and `examples` [B] (the whole batch's).

    An incomplete last batch is dropped. Raises ConfigError when hosts do not divide the batch.
    """
    rows = _host_rows(config, host, hosts)

    def load(indices: np.ndarray) -> dict[str, np.ndarray]:
        found = [source[int(i)] for i in indices[rows]]
        try:
            batch = {name: np.stack([np.asarray(example[name]) for example in found]) for name in found[0]}
        except (ValueError, KeyError) as error:
            raise DataError(f"examples {indices[rows].tolist()} do not stack into a batch ({error}); pack them") from None
        return {**batch, EXAMPLES: indices}

    batches = order(source, config).batch(config.batch, drop_remainder=True).map(load)
    return _prefetched(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)), config)


def packed(source: Source, config: DataConfig, *, host: int | None = None, hosts: int | None = None) -> grain.IterDataset:
    """Variable-length examples packed into rows: {name: [B / hosts, T]} with segments, positions and `examples`.

    An example is {name: [n], ...}, all of one length n, `tokens` among them (and by habit `mask`: 1 where the token is
    a target). It stays whole in one row. `segments` int32 counts the examples of a row from 1, 0 is padding;
    `positions` int32 count from 0 in each segment. Rows are filled by Grain's best-fit packing over `window * batch`
    rows at a time. Every host packs the global order and keeps its rows: reading is repeated, but the order never
    depends on the host count, and `examples` names those of the whole batch.
    Raises DataError for an example longer than `length` unless `too_long` is "truncate".
    """
    rows = _host_rows(config, host, hosts)
    names = sorted(source[0]) if len(source) else []

    def load(index: int) -> dict[str, Any]:
        example = {name: np.asarray(value) for name, value in source[int(index)].items()}
        lengths = {name: len(value) for name, value in example.items()}
        if sorted(example) != names or len(set(lengths.values())) != 1:
            raise DataError(f"example {index} has fields {lengths}; every one needs {', '.join(names)}, all of one length")
        n = lengths["tokens"]
        if n > config.length and config.too_long == "refuse":
            raise DataError(
                f"example {index} has {n} tokens and a row {config.length}; "
                "set data.too_long=truncate or a larger data.length"
            )
        return {name: value[: config.length] for name, value in example.items()} | {EXAMPLES: np.int64(index)}

    def gather(found: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        mine = found[rows]
        batch = {name: np.stack([row[name] for row in mine]) for name in names}
        batch["segments"] = np.stack([row["tokens_segment_ids"] for row in mine])
        batch["positions"] = np.stack([row["tokens_positions"] for row in mine])
        batch[EXAMPLES] = np.concatenate([np.asarray(row[EXAMPLES], np.int64).ravel() for row in found])
        return batch

    examples = order(source, config).map(load)
    stream = examples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    stream = grain.experimental.BestFitPackIterDataset(
        stream,
        length_struct=dict.fromkeys(names, config.length),
        num_packing_bins=config.batch * config.window,
        seed=config.seed,
        shuffle_bins=True,  # rows opened last are the emptiest; they should not all meet in one batch
        meta_features=(EXAMPLES,),
    )
    return _prefetched(stream.batch(config.batch, drop_remainder=True, batch_fn=gather), config)


def _prefetched(stream: grain.IterDataset, config: DataConfig) -> grain.IterDataset:
    if not config.prefetch:
        return stream
    return grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=config.prefetch)


def _host_rows(config: DataConfig, host: int | None, hosts: int | None) -> slice:
    """Which rows of the global batch this host loads: a contiguous share, so that shares concatenate to the batch."""
    host = jax.process_index() if host is None else host
    hosts = jax.process_count() if hosts is None else hosts
    if config.batch % hosts:
        raise ConfigError(f"data.batch is {config.batch}; it must be a multiple of the {hosts} hosts")
    share = config.batch // hosts
    return slice(host * share, (host + 1) * share)


def next_token_targets(
    tokens: jax.Array, segments: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(targets int32 [B,T], weights float32 [B,T]) for next-token training of packed rows.

    targets[:, t] = tokens[:, t+1]; the weight is mask[:, t+1] (1 without a mask) where both tokens belong to one
    segment,
    and 0 elsewhere: at the end of a segment and in padding.
    """
    after = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    same = (segments == after(segments)) & (segments > 0)
    weights = same if mask is None else same * after(mask)
    return after(tokens), weights.astype(jnp.float32)


class Stream:
    """Pairs of (batch, indices of its examples or None), with a position that can be saved as JSON and set again."""

    def __init__(self, batches: Iterator[Any], *, resumable: bool) -> None:
        self._batches, self.resumable = batches, resumable

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Any, np.ndarray | None]:
        batch = next(self._batches)
        if isinstance(batch, Mapping) and EXAMPLES in batch:
            examples = np.asarray(batch[EXAMPLES]).ravel()
            return {name: value for name, value in batch.items() if name != EXAMPLES}, examples
        return batch, None

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._batches.set_state(dict(state))

    def close(self) -> None:
        if hasattr(self._batches, "close"):
            self._batches.close()


@dataclasses.dataclass(frozen=True)
class _Calls:
    """A function step → batch as a source without end."""

    make: Callable[[int], Any]

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, step: int) -> Any:
        return self.make(int(step))


def open_stream(batches: Any) -> Stream:
    """A `Stream` over what `fit` accepts as batches.

    A list is cycled in its order; a function is called with the step (0-based); Grain datasets and iterators keep their
    own position. Any other iterable is read through once and cannot be resumed. Raises DataError for an empty list.
    """
    if isinstance(batches, (grain.DatasetIterator, Stream)):
        return batches if isinstance(batches, Stream) else Stream(batches, resumable=True)
    if isinstance(batches, (list, tuple)):
        if not batches:
            raise DataError("the list of batches is empty")
        batches = grain.MapDataset.source(batches).repeat()
    elif callable(batches):
        batches = grain.MapDataset.source(_Calls(batches))
    if isinstance(batches, grain.MapDataset):
        batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if isinstance(batches, grain.IterDataset):
        return Stream(iter(batches), resumable=True)
    return Stream(itertools.chain(batches), resumable=False)
