"""The verbs of a memory store, as mem0's users know them, over texts: add, get, list, search, update, delete, history ...

`store.Bank` keeps memories that somebody has written; here a text goes in and the writer is called. What changes a
namespace also sets its gate anew, so that the gate never rests on a memory that is gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from memjax import ids
from memjax.bank.retrieve import search
from memjax.bank.store import DEFAULT_NAMESPACE, Bank, Entry
from memjax.errors import InputError

if TYPE_CHECKING:
    from memjax.models.base import Base
    from memjax.write.distill import DistillConfig

MERGED = "merged"  # the record of a namespace that says which memories were made of which


@dataclasses.dataclass(frozen=True)
class Hit:
    """A memory that a search found, and how well its text matches."""

    entry: Entry
    score: float


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """What a deletion did: the ids that the namespace is rid of, for whoever keeps slots or caches by id.

    still_in: names of memories that were merged from one of them and hold its content still; delete those too.
    """

    ids: tuple[str, ...]
    still_in: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Memories:
    """A bank as a store of texts. All verbs are scoped by `namespace`, and nothing of another one is ever seen.

    base, config: what texts are written with; only `add` and `update` need a base. progress: told of a write's stages.
    """

    bank: Bank
    base: Base | None = None
    config: DistillConfig | None = None
    progress: Callable[[str, float, dict[str, float]], None] | None = None

    def add(
        self,
        text: str,
        name: str | None = None,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        metadata: dict[str, Any] | None = None,
        expires_at: float | None = None,
    ) -> Entry:
        """Write a text into a new memory; one that the namespace holds already is not written again.

        name: by default made of the text's hash. expires_at: seconds since 1970. BankError if the name is taken.
        """
        return self._write(text, name or f"text-{ids.text_hash(text)[:12]}", False, namespace, metadata, expires_at)

    def update(
        self,
        name: str,
        text: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        metadata: dict[str, Any] | None = None,
        expires_at: float | None = None,
    ) -> Entry:
        """Write a text into the next version of a memory; metadata and expiry stay unless they are given.

        The version before is kept, for `rollback` and for requests that read it now, until `prune` or `delete`.
        """
        return self._write(text, name, True, namespace, metadata, expires_at)

    def get(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """The current version of a memory; BankError with the nearest names of the namespace if there is none."""
        return self.bank.get(name, namespace)

    def list(self, namespace: str = DEFAULT_NAMESPACE, limit: int | None = None, after: str = "") -> Sequence[Entry]:
        """The namespace's current memories in order of name; `limit` and `after` (a name) page through."""
        return self.bank.list(namespace, limit, after)

    def search(self, query: str, namespace: str = DEFAULT_NAMESPACE, limit: int = 5) -> tuple[Hit, ...]:
        """The memories whose texts match the query best, best first; those that share nothing with it are left out."""
        found = search(self.bank, query, limit, namespace)
        hits = [(self.bank.find_id(memory_id, namespace), score) for memory_id, score in found]
        return tuple(Hit(entry, score) for entry, score in hits if entry is not None)

    def history(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Sequence[Entry]:
        """All versions of a memory, oldest first."""
        return self.bank.history(name, namespace)

    def rollback(self, name: str, version: int | None = None, namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """Make another version of a memory the current one, by default the one before."""
        entry = self.bank.rollback(name, version, namespace)
        self._recalibrate(namespace)
        return entry

    def prune(self, name: str, keep: int = 0, namespace: str = DEFAULT_NAMESPACE) -> Forgotten:
        """Forget a memory's past versions but for the newest `keep`."""
        return self._forgotten(self.bank.prune(name, keep, namespace), namespace)

    def delete(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Forgotten:
        """Forget a memory: all its versions, its text, its questions and its files."""
        return self._forgotten(self.bank.delete(name, namespace), namespace)

    def delete_all(self, namespace: str = DEFAULT_NAMESPACE) -> Forgotten:
        """Forget everything in one namespace."""
        return Forgotten(self.bank.delete_all(namespace))

    def expire(self, name: str, at: float | None, namespace: str = DEFAULT_NAMESPACE) -> Entry:
        """Let a memory be absent from `at` (seconds since 1970) on; never if None. `purge` then removes its files."""
        self.bank.set_expiry(name, at, namespace)
        return self.bank.get(name, namespace)

    def purge(self) -> Forgotten:
        """Forget what has expired, in all namespaces."""
        gone = Forgotten(self.bank.purge())
        for namespace in self.bank.namespaces() if gone.ids else ():
            self._recalibrate(namespace)
        return gone

    def reset(self) -> Forgotten:
        """Forget everything in all namespaces, and the base that the bank was for."""
        return Forgotten(self.bank.reset())

    def _write(
        self,
        text: str,
        name: str,
        replace: bool,
        namespace: str,
        metadata: dict[str, Any] | None,
        expires_at: float | None,
    ) -> Entry:
        from memjax.bank.add import add_text
        from memjax.write.distill import DistillConfig
        from memjax.write.prompts import prompt_style

        if self.base is None:
            raise InputError("a text is written with a base; open the memories with Memories(bank, base)")
        style = prompt_style(self.base.tokenizer.prompt_style)
        options: dict[str, Any] = {"namespace": namespace, "metadata": metadata, "expires_at": expires_at}
        config = self.config or DistillConfig()
        if self.progress is not None:
            options["progress"] = self.progress
        return add_text(self.base, self.bank, text, name, style, config, replace=replace, **options)[0]

    def _forgotten(self, gone: tuple[str, ...], namespace: str) -> Forgotten:
        self._recalibrate(namespace)
        return Forgotten(gone, parts_in(self.bank, gone, namespace))

    def _recalibrate(self, namespace: str) -> None:
        from memjax.bank.calibrate import recalibrate

        recalibrate(self.bank, namespace)


def parts_in(bank: Bank, memory_ids: Collection[str], namespace: str = DEFAULT_NAMESPACE) -> tuple[str, ...]:
    """Names of current memories that were merged from any of these ids, directly or through another merge."""
    record = bank.record(MERGED, namespace)
    known: dict[str, list[str]] = record.value if record else {}
    held, found = set(memory_ids), set[str]()
    while more := {whole for whole, parts in known.items() if held & set(parts)} - found:
        found |= more
        held |= more
    entries = [bank.find_id(memory_id, namespace) for memory_id in sorted(found - set(memory_ids))]
    return tuple(sorted(entry.name for entry in entries if entry is not None))
