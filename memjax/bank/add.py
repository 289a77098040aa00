"""From a text to a committed memory: check, write, calibrate, add."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memjax import ids
from memjax.bank.calibrate import CHANGED_SHARE, calibrate, probe_memory
from memjax.bank.store import DEFAULT_NAMESPACE, Bank, Entry
from memjax.errors import BankError, InputError
from memjax.memory.buffer import Buffer
from memjax.memory.files import Meta, read_artefact, write_artefact
from memjax.models.base import Base
from memjax.models.decoder import site_shapes
from memjax.models.weights import SITE_MODULES
from memjax.write.compile import CompileConfig, compile_context
from memjax.write.distill import DistillConfig, Written, distill
from memjax.write.distractors import POOL
from memjax.write.hypernet.encode import Hyper
from memjax.write.hypernet.internalize import InternalizeConfig, internalize
from memjax.write.prompts import PromptStyle, read_tokens
from memjax.write.reading import question_room
from memjax.write.teacher import Lesson

Config = DistillConfig | CompileConfig | InternalizeConfig
Progress = Callable[[str, float, dict[str, float]], None]


def text_meta(base: Base, text: str, style: PromptStyle, config: Config) -> Meta:
    """What the memory of this text is identified by: known before anything is written."""
    writers: dict[type, str] = {DistillConfig: "distill", CompileConfig: "compile", InternalizeConfig: "internalize"}
    writer = writers[type(config)]
    kind = "buffer" if writer == "compile" else "adapter"
    recipe = {"writer": writer, "prompt": style.name, **dataclasses.asdict(config)}
    return Meta(
        base_id=base.id,
        tokenizer_id=base.tokenizer.id,
        template_id=base.tokenizer.template_id,
        recipe=recipe,
        source_hash=ids.text_hash(text),
        kind=kind,
        base_name=base.name,
    )


def check_text(base: Base, text: str, style: PromptStyle, *, any_length: bool = False) -> int:
    """The text's tokens; InputError where it is empty or, unless any length will do, longer than the base reads at once."""
    if not text.strip():
        raise InputError("the text is empty; give it something to remember")
    tokens = len(base.tokenizer.encode(text))
    prompt = len(read_tokens(base.tokenizer, style, text, ""))
    room = base.config.max_positions - question_room(base.config.max_positions) - (prompt - tokens)
    if not any_length and tokens > room:
        raise InputError(
            f"the text has {tokens:,} tokens and {base.name} reads at most {room:,} of a text at once; split it into "
            f"{math.ceil(tokens / room)} files, or compile it (--how compile), which writes longer texts chunk by chunk"
        )
    return tokens


def add_text(
    base: Base,
    bank: Bank,
    text: str,
    name: str,
    style: PromptStyle,
    config: Config = DistillConfig(),
    *,
    namespace: str = DEFAULT_NAMESPACE,
    metadata: dict[str, Any] | None = None,
    expires_at: float | None = None,
    replace: bool = False,
    replay: Lesson | None = None,
    seconds: float | None = None,
    hyper: Hyper | None = None,
    progress: Progress = lambda stage, share, metrics: None,
) -> tuple[Entry, Written | None]:
    """(the entry of the text's memory, what was written, None where the bank held it already).

    config: of `distill` or `internalize` (with the `hyper` that its recipe names), which write an adapter, or of
    `compile_context`, which writes a buffer, with distractors beside `other_buffers` of the bank. Nothing is in the bank
    before all of it is: the memory, the text, the held-out questions with what a probe tells of them. Then the gate is
    set anew, where enough has changed. `replay` as in `distill`, `seconds` as in `compile_context`. replace: the name must
    exist, and this becomes its next version; the one before is kept for `rollback`. InputError for a text that cannot be
    written, BankError where the name is another memory's, or is unknown and to be replaced.
    """
    meta = text_meta(base, text, style, config)
    check_text(base, text, style, any_length=isinstance(config, CompileConfig | InternalizeConfig))
    put = bank.update if replace else bank.add
    options: dict[str, Any] = {"namespace": namespace, "text": text, "metadata": metadata, "expires_at": expires_at}
    taken = bank.get(name, namespace) if replace else bank.find(name, namespace)
    known = bank.find_key(meta.key, namespace)
    if known is not None:
        entry = put(name, meta.key, _never, **options)
        if replace:
            calibrate(base, bank, namespace, share=CHANGED_SHARE)
        return entry, None
    if taken is not None and not replace:
        raise BankError(f"the name {name!r} already stands for another memory; choose another name or delete it first")
    others: Sequence[Buffer] = ()
    if isinstance(config, CompileConfig) and config.distractors:
        others = other_buffers(base, bank, config, text, namespace)
    written, probes = write_text(
        base, text, style, config, replay=replay, seconds=seconds, hyper=hyper, others=others, progress=progress
    )
    meta = dataclasses.replace(meta, metrics=written.metrics)

    def write(folder: Path) -> Any:
        return write_artefact(folder, written.artefact, SITE_MODULES, meta)

    entry = put(name, meta.key, write, questions=probes, **options)
    calibrate(base, bank, namespace, share=CHANGED_SHARE)
    progress("calibrate", 1.0, {})
    return entry, written


def write_text(
    base: Base,
    text: str,
    style: PromptStyle,
    config: Config,
    *,
    replay: Lesson | None = None,
    seconds: float | None = None,
    hyper: Hyper | None = None,
    others: Sequence[Buffer] = (),
    progress: Progress = lambda stage, share, metrics: None,
) -> tuple[Written, dict[str, Any]]:
    """(what the writer of `config` makes of the text, what a probe tells of it): all of `add_text` that the base computes.

    Where the base lies on a mesh of several processes, each of them calls this, and one of them holds the bank.
    """
    if isinstance(config, CompileConfig):
        written = compile_context(base, text, style, config, seconds=seconds, others=others, progress=progress)
    elif isinstance(config, InternalizeConfig):
        if hyper is None:
            raise InputError("a text is internalised by a hypernetwork; load one with load_hyper and give it as hyper")
        written = internalize(base, text, style, config, hyper, progress=progress)
    else:
        written = distill(base, text, style, config, replay=replay, progress=progress)
    progress("calibrate", 0.0, {})
    return written, probe_memory(base, written, style, config.marker if isinstance(config, DistillConfig) else 1)


def other_buffers(
    base: Base, bank: Bank, config: CompileConfig, text: str, namespace: str = DEFAULT_NAMESPACE
) -> list[Buffer]:
    """Buffers of a namespace's other texts, to train with as distractors: drawn by the recipe's seed, `POOL` for each that
    is read at once. InputError where there is none, ArtefactError where one is damaged."""
    own, config_of = ids.text_hash(text), base.config
    entries = [e for e in bank.list(namespace) if e.kind == "buffer" and e.source_hash != own]
    if not entries:
        raise InputError(f"namespace {namespace!r} holds no buffer of another text to train with; compile some first")
    drawn = random.Random(config.seed).sample(entries, min(POOL * config.distractors, len(entries)))
    given = (site_shapes(config_of), config_of.num_layers, SITE_MODULES, base.id)
    heads = (config_of.num_kv_heads, config_of.head_size)
    return [Buffer(*read_artefact(bank.folder(entry.id), *given, heads).artefact) for entry in drawn]


def _never(folder: Path) -> Any:
    raise AssertionError("a memory that the bank holds already is not written again")
