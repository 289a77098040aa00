"""Does asking cost more in a large bank? Banks of 1, 1,000 and 100,000 memories over a few hard-linked artefacts.

Every row has its own id, key, manifest and text; only the weights are shared on disk, so what is opened, searched, looked
up and loaded is what a bank of so many different memories would have.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from memjax import ids
from memjax.bank import versions
from memjax.bank.entries import new_row
from memjax.bank.retrieve import open_index
from memjax.bank.store import Bank, open_bank
from memjax.evaluate.world.names import NAMES, deal_words
from memjax.memory.adapter import Adapter, init_adapter
from memjax.memory.files import MANIFEST, Meta, write_artefact
from memjax.models.base import Base
from memjax.models.decoder import site_shapes
from memjax.models.generate import Sampling
from memjax.models.weights import SITE_MODULES
from memjax.serve.engine import Engine, EngineConfig
from memjax.write.prompts import PromptStyle

SIZES = (1, 1_000, 100_000)
ARTEFACTS = 64
ASKED = 31  # questions of which the median is taken
_OPEN = """
import json, sys, time
from memjax.bank.store import open_bank
from memjax.evaluate.peak import peak_mib
began = time.perf_counter()
bank = open_bank(sys.argv[1])
print(json.dumps({"seconds": time.perf_counter() - began, "mib": peak_mib()}))
"""


def scale_text(number: int) -> str:
    """The text of memory `number`: one line with names of its own, about 25 words."""
    a, b, c = (NAME[number % len(NAME)] for NAME, number in zip(_names(), _digits(number), strict=True))
    return (
        f"The ferry {a} {b} of harbour {number} leaves at {number % 24}:{number % 60:02d}. Its captain is {c} {a}, who was "
        f"born in {b} and keeps {number % 97} lanterns in the house of {c}."
    )


def scale_question(number: int) -> str:
    """A question that the text of this number answers."""
    a, b, _ = (NAME[number % len(NAME)] for NAME, number in zip(_names(), _digits(number), strict=True))
    return f"When does the ferry {a} {b} of harbour {number} leave?"


def _names() -> tuple[list[str], ...]:
    words = deal_words("scale", NAMES["test"], 300, 0)
    return words[:100], words[100:200], words[200:]


def _digits(number: int) -> tuple[int, int, int]:
    return number % 100, number // 100 % 100, number // 10_000 + number * 7 % 89


def fill_bank(bank: Bank, base: Base, size: int, artefacts: int = ARTEFACTS, rank: int = 8) -> None:
    """Adds memories until there are `size`, all at once: folders first, then one transaction. For tests of scale only.

    Nothing is fsynced row by row, as `Bank.add` would; each memory is whole, and `verify` finds nothing amiss.
    """
    have = bank.count()
    if have >= size:
        return
    rng = np.random.default_rng(0)
    config = base.config
    first: list[tuple[Path, dict[str, str], int]] = []
    rows, kept = [], []
    for number in range(have, size):
        meta = Meta(base.id, base.tokenizer.id, base.tokenizer.template_id, {"writer": "scale", "number": number})
        if len(first) < min(artefacts, size):
            folder = bank.path / "tmp" / f"scale-{number}"
            fresh = init_adapter(site_shapes(config), config.num_layers, rank, 1.0, jax.random.key(number))
            b = {s: jnp.asarray(0.02 * rng.normal(size=x.shape), jnp.float32) for s, x in fresh.b.items()}
            memory = write_artefact(folder, Adapter(fresh.a, b, jnp.float32(1)), SITE_MODULES, meta)
            place = bank.folder(memory.id)
            os.rename(folder, place)
            manifest = json.loads((place / MANIFEST).read_text())
            size_bytes = sum(p.stat().st_size for p in place.iterdir())
            first.append((place, manifest["files"], size_bytes))
            memory_id = memory.id
        else:
            source, files, size_bytes = first[number % len(first)]
            memory_id = ids.memory_id(meta.key, ids.files_hash(files))
            place = bank.folder(memory_id)
            place.mkdir()
            for name in files:
                os.link(source / name, place / name)
            provenance = {field.name: getattr(meta, field.name) for field in dataclasses.fields(Meta)}
            about = {"format": 1, "id": memory_id, "key": meta.key, "files": files, "provenance": provenance}
            (place / MANIFEST).write_text(json.dumps(about, sort_keys=True, indent=1) + "\n")
        kept.append((memory_id, "adapter", base.id, ids.file_hash(place / MANIFEST), size_bytes))
        row = new_row(f"memory-{number:06d}", "default", meta.key, scale_text(number), None, None, None, bank.now())
        rows.append({**row, "id": memory_id})
    with bank._index.transaction() as db:
        db.executemany("INSERT INTO artefacts VALUES (?, ?, ?, ?, ?)", kept)
        for row in rows:
            versions.insert(db, row, ())


def open_cost(path: Path) -> dict[str, float]:
    """{seconds, mib} of opening a bank in a process that has done nothing else, memory before the first query."""
    done = subprocess.run([sys.executable, "-c", _OPEN, str(path)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def run_scale(
    base: Base,
    style: PromptStyle,
    folder: Path,
    sizes: Sequence[int] = SIZES,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, float]:
    """Per size N: open_seconds/N, open_mib/N, index_seconds/N (renewed after one memory was added), retrieval_ms/N,
    first_token_ms/N (warm: the same was asked just before, so its candidates are resident, as the only memory of a bank of
    one always is), first_token_cold_ms/N (candidates come from disk), add_ms/N, delete_ms/N; and ask_growth, the warm first
    token at the largest size over that at the smallest, beside ask_growth_cold.

    Retrieval is by words. Adding and deleting are `Bank.add` and `Bank.delete` of an artefact of the bank's own kind.
    """
    made: dict[str, float] = {}
    for done, size in enumerate(sizes):
        progress("banks", done, len(sizes))
        path = folder / f"bank-{size}"
        with open_bank(path, create=True, base_id=base.id, base_name=base.name) as bank:
            fill_bank(bank, base, size)
        cost = open_cost(path)
        made |= {f"open_seconds/{size}": cost["seconds"], f"open_mib/{size}": cost["mib"]}
        with open_bank(path) as bank:
            index = open_index(bank)
            asked = [scale_question(int(n)) for n in np.random.default_rng(1).integers(0, size, ASKED + 2)]
            made[f"retrieval_ms/{size}"] = _median_ms(functools.partial(index.search, k=4, fill=True), asked)
            engine = Engine(base, bank, style, EngineConfig(candidates=4, rank=8, retrieve="bm25"))
            took = [[_first_token(engine, question) for _ in ("from disk", "resident")] for question in asked]
            cold, warm = np.median(took[2:], axis=0)
            made |= {f"first_token_cold_ms/{size}": 1000 * float(cold), f"first_token_ms/{size}": 1000 * float(warm)}
            made |= _changes(bank, base, size)
    for end in ("", "_cold"):
        least, most = (made[f"first_token{end}_ms/{size}"] for size in (sizes[0], sizes[-1]))
        made[f"ask_growth{end}"] = most / least
    return made


def _first_token(engine: Engine, question: str) -> float:
    return engine.ask(question, gate=False, sampling=Sampling(max_tokens=2)).seconds["first_token"]


def _changes(bank: Bank, base: Base, size: int, times: int = 5) -> dict[str, float]:
    fresh = init_adapter(site_shapes(base.config), base.config.num_layers, 8, 1.0, jax.random.key(0))
    added, deleted, renewed = [], [], []
    index = open_index(bank)
    for number in range(times):
        recipe = {"writer": "scale", "extra": number}
        meta = Meta(base.id, base.tokenizer.id, base.tokenizer.template_id, recipe)
        write = lambda folder, meta=meta: write_artefact(folder, fresh, SITE_MODULES, meta)
        began = time.perf_counter()
        bank.add(f"extra-{number}", meta.key, write, text=f"The extra lamp {number} is red.")
        added.append(time.perf_counter() - began)
        began = time.perf_counter()
        index = open_index(bank, held=index)
        renewed.append(time.perf_counter() - began)
        began = time.perf_counter()
        bank.delete(f"extra-{number}")
        deleted.append(time.perf_counter() - began)
        index = open_index(bank, held=index)
    return {
        f"add_ms/{size}": 1000 * float(np.median(added)),
        f"delete_ms/{size}": 1000 * float(np.median(deleted)),
        f"index_seconds/{size}": float(np.median(renewed)),
    }


def _median_ms(call: Callable[[str], object], questions: Sequence[str]) -> float:
    """The median of the calls after the first two, in milliseconds."""
    took = []
    for question in questions:
        began = time.perf_counter()
        call(question)
        took.append(time.perf_counter() - began)
    return 1000 * float(np.median(took[2:]))
