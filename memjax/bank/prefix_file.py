"""A buffer as a plain key/value prefix for readers that know nothing of buffers, such as `transformers`' DynamicCache.

Header and slots stand in one file as the base's own attention holds them: keys turned to their positions, layer by layer.
It is read with the weights that it was made with, and by nothing else (arXiv 2602.21221 section 6).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from memjax.bank.exchange import BaseShape
from memjax.bank.mapped import save_tensors
from memjax.bank.store import DEFAULT_NAMESPACE, Bank, Entry
from memjax.errors import InputError
from memjax.memory.buffer import Buffer
from memjax.memory.files import read_artefact
from memjax.models.base import Base
from memjax.models.buffers import buffer_prefix, read_buffer
from memjax.models.generate import read_prefix
from memjax.write.prompts import PromptStyle
from memjax.write.reading import header_tokens, tail_tokens

TENSORS, ABOUT = "prefix.safetensors", "prefix.json"


def export_prefix(
    bank: Bank, base: Base, style: PromptStyle, name: str, to: Path, namespace: str = DEFAULT_NAMESPACE
) -> Entry:
    """Write header and slots of a buffer to the new folder `to`: prefix.safetensors and prefix.json; its entry.

    `layers.I.key` and `layers.I.value` [1, K, S, H] float32, keys after rotary embedding; prefix.json holds the position of
    the first token to read after them (not S where slots lie behind the context's own places), the prompt that asks, with
    {question} in it, and the base's ids. InputError where `to` exists, for an adapter, or where layers see a sliding
    window, for which transformers has other caches; ArtefactError where a file is damaged.
    """
    entry, to, shape = bank.get(name, namespace), Path(to), BaseShape.of(base)
    if to.exists():
        raise InputError(f"{to} exists; name a new folder to export to")
    if base.config.window is not None:
        raise InputError(f"layers of {base.name} see a sliding window; a prefix can be written for full attention only")
    memory = read_artefact(
        bank.folder(entry.id), shape.site_shapes, shape.num_layers, shape.module_names, base.id, shape.heads
    )
    if memory.kind != "buffer":
        raise InputError(f"memory {name!r} is an adapter, not a buffer; PEFT loads what `memjax bank export` writes of it")
    header = header_tokens(base.tokenizer, style)
    k, v, *places = memory.artefact
    buffer = Buffer(jnp.asarray(k), jnp.asarray(v), *places)
    if len(header) != buffer.header:
        raise InputError(f"memory {name!r} was written behind another header; write it again with this version")
    read = read_prefix(base.model, base.params, header)
    held = buffer_prefix(read.segment, *read_buffer(base.config, buffer))
    at = np.asarray(held.segment.position[0])
    tensors: dict[str, np.ndarray] = {}
    for kind, leaf in (("key", held.segment.k), ("value", held.segment.v)):
        array = np.asarray(leaf, np.float32)[:, :, at >= 0].transpose(0, 1, 3, 2, 4)
        tensors |= {f"layers.{layer}.{kind}": array[layer] for layer in range(len(array))}
    about = {
        "base_id": base.id,
        "base_name": base.name,
        "tokenizer_id": base.tokenizer.id,
        "memory_id": entry.id,
        "layers": base.config.num_layers,
        "positions": at[at >= 0].tolist(),
        "next_position": int(held.length),
        "ask": base.tokenizer.decode(tail_tokens(base.tokenizer, style, "{question}"), keep_special=True),
    }
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        folder = Path(scratch) / "prefix"
        folder.mkdir()
        save_tensors(folder / TENSORS, tensors)
        (folder / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.rename(folder, to)
    return entry
