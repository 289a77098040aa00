"""Key/value prefixes that PEFT trained, cartridges and prefix tuning, as buffers of the bank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from memjax import ids
from memjax.bank.store import DEFAULT_NAMESPACE, Bank, Entry
from memjax.errors import ArtefactError
from memjax.memory.buffer import Buffer
from memjax.memory.files import Memory, Meta, write_artefact
from memjax.memory.kv_prefix import read_kv_prefix
from memjax.memory.peft import CONFIG_FILE, WEIGHTS_FILE
from memjax.models.base import Base
from memjax.models.buffers import rotate_layers
from memjax.models.weights import SITE_MODULES
from memjax.write.prompts import PromptStyle
from memjax.write.reading import header_tokens


def import_prefix(
    bank: Bank,
    base: Base,
    style: PromptStyle,
    folder: Path,
    name: str,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    text: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    licence: str = "",
) -> Entry:
    """Keep the prefix of a PEFT folder as a buffer of this base; its entry. Twice is one memory.

    It was trained at the positions 0 ... P - 1 with the whole prompt behind it; here its slots stand behind the header of a
    reading prompt, as compact ones do. Frozen first tokens, an attention sink, are left out as far as the header, which
    stands in their place, has tokens: two beginnings are known to harm (`models.buffers`). Only shapes can tell whose
    prefix it is. text: what to retrieve it by. ArtefactError as in `memory.kv_prefix.read_kv_prefix`.
    """
    config, folder = base.config, Path(folder)
    found = read_kv_prefix(folder, (config.num_layers, config.num_kv_heads, config.head_size))
    header = len(header_tokens(base.tokenizer, style))
    begin = min(found.frozen, header)
    if begin == found.k.shape[1]:
        raise ArtefactError(f"{folder} holds {begin} frozen tokens and no other; there is nothing to read from it")
    k = rotate_layers(config, jnp.asarray(found.k), np.arange(found.k.shape[1]), back=True)
    slots = found.k.shape[1] - begin
    buffer = Buffer(k[:, begin:], jnp.asarray(found.v[:, begin:]), header, slots, "compact")
    files = {each: ids.file_hash(folder / each) for each in (CONFIG_FILE, WEIGHTS_FILE)}
    recipe = {"writer": "import", "prompt": style.name, "files": ids.files_hash(files)}
    token_ids = (base.tokenizer.id, base.tokenizer.template_id)
    meta = Meta(base.id, *token_ids, recipe, kind="buffer", base_name=base.name, licence=licence)
    dtype = "bfloat16" if found.k.dtype.name == "bfloat16" else "float32"

    def write(new: Path) -> Memory:
        return write_artefact(new, buffer, SITE_MODULES, meta, dtype)

    return bank.add(name, meta.key, write, namespace=namespace, text=text, metadata=metadata)
