"""The texts of an experiment become memories of a bank, one after the other or by several processes side by side.

A step of a small base on short answers leaves most of a second core idle; two documents do not. Run as a program
(`python -m memjax.evaluate.writers`) this is one of those processes: it reads what to write as JSON from its input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal

import jax

from memjax.bank.add import add_text, other_buffers, text_meta
from memjax.bank.store import Bank, open_bank
from memjax.config import from_dict, to_dict
from memjax.errors import BankError, ConfigError
from memjax.memory.files import write_artefact
from memjax.models.base import Base
from memjax.models.weights import SITE_MODULES
from memjax.train.base import load
from memjax.write.compile import CompileConfig, compile_context, make_lesson
from memjax.write.distill import DistillConfig, replay_lesson
from memjax.write.prompts import PromptStyle
from memjax.write.reading import split_prompts
from memjax.write.tasks import general_tasks

Recipe = DistillConfig | CompileConfig
Progress = Callable[[int], None]
PROGRAM = ("-m", "memjax.evaluate.writers")
LOOKED = 0.5  # seconds between two looks at how far the bank is


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process is told: `texts` by name, to be written into each of `banks` by its recipe, as JSON.

    writer: whose recipes they are; cache: where JAX keeps compiled programs.
    """

    writer: Literal["distill", "compile"]
    base: str
    base_id: str
    style: PromptStyle
    recipes: tuple[dict[str, Any], ...]
    banks: tuple[str, ...]
    texts: dict[str, str]
    cache: str | None = None


def check_jobs(jobs: int) -> None:
    """ConfigError where no more than one process can write: an accelerator belongs to one."""
    if jobs > 1 and jax.default_backend() != "cpu":
        raise ConfigError(f"--jobs {jobs}: one process holds the {jax.default_backend()}; leave --jobs out")


def write_texts(
    base: Base,
    bank: Bank,
    texts: Mapping[str, str],
    style: PromptStyle,
    recipe: Recipe,
    jobs: int = 1,
    beside: Bank | None = None,
    progress: Progress = lambda done: None,
) -> None:
    """Writes the texts that the bank does not hold yet; `progress` is told how many it holds.

    recipe: of distilling, with probes and a gate set anew as `add_text` does, or of compiling, with neither; beside: whose
    buffers a compilation with distractors trains among, which one process alone does. What `jobs` processes write is what
    one writes. ConfigError where the bank holds another text by one of the names; BankError, after all have been stopped,
    where one of several fails; what they had added stays.
    """
    _check_texts(bank, texts)
    if jobs > 1 and beside is None:
        _side_by_side(base, [(bank, recipe)], texts, style, jobs, progress)
    elif isinstance(recipe, DistillConfig):
        _distil(base, bank, texts, style, recipe, progress)
    else:
        _compile(base, [(bank, recipe)], texts, style, beside, progress)


def compile_at_ratios(
    base: Base,
    banks: Sequence[tuple[Bank, CompileConfig]],
    texts: Mapping[str, str],
    style: PromptStyle,
    jobs: int = 1,
    progress: Progress = lambda done: None,
) -> None:
    """Compiles every text into every bank, as `write_texts` does for one, with one lesson for all ratios of a text.

    The recipes are alike but for their ratios, ConfigError where not. A buffer's `seconds` are those of compiling at its
    ratio alone: the lesson's, and its own training's. `progress` is told how many buffers there are.
    """
    for bank, _ in banks:
        _check_texts(bank, texts)
    if len({dataclasses.replace(recipe, ratio=1.0) for _, recipe in banks}) > 1:
        raise ConfigError("texts are compiled at several ratios by one recipe; these differ in more")
    if jobs > 1:
        _side_by_side(base, banks, texts, style, jobs, progress)
    else:
        _compile(base, banks, texts, style, None, progress)


def _check_texts(bank: Bank, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        if bank.find(name) is not None and bank.text(name) != text:
            raise ConfigError(f"{bank.path} holds a memory of another text called {name}; give another --out")


def _distil(
    base: Base, bank: Bank, texts: Mapping[str, str], style: PromptStyle, recipe: DistillConfig, progress: Progress
) -> None:
    missing = [name for name in texts if bank.find(name) is None]
    if not missing:
        return
    replay = replay_lesson(base, style, recipe) if recipe.keep and recipe.general else None
    for done, name in enumerate(missing, start=len(texts) - len(missing) + 1):
        add_text(base, bank, texts[name], name, style, recipe, replay=replay)
        progress(done)


def _compile(
    base: Base,
    banks: Sequence[tuple[Bank, CompileConfig]],
    texts: Mapping[str, str],
    style: PromptStyle,
    beside: Bank | None,
    progress: Progress,
) -> None:
    general, done = None, 0
    for name, text in texts.items():
        missing = [(bank, recipe) for bank, recipe in banks if bank.find(name) is None]
        done += len(banks) - len(missing)
        lesson = None
        if missing and general is None and missing[0][1].query_teacher == "none":
            general = general_tasks(base, split_prompts(base.tokenizer, style, text), missing[0][1])
        if len(missing) > 1:
            lesson = make_lesson(base, text, style, missing[0][1], general)
        for bank, recipe in missing:
            began = time.monotonic()
            others = [] if beside is None else other_buffers(base, beside, recipe, text)
            written = compile_context(base, text, style, recipe, general=general, lesson=lesson, others=others)
            taken = time.monotonic() - began + (lesson.seconds if lesson else 0.0)
            meta = text_meta(base, text, style, recipe)
            meta = dataclasses.replace(meta, metrics={**written.metrics, "seconds": taken})
            write = lambda folder, made=written.artefact, meta=meta: write_artefact(folder, made, SITE_MODULES, meta)
            bank.add(name, meta.key, write, text=text)
            done += 1
            progress(done)


def _side_by_side(
    base: Base,
    banks: Sequence[tuple[Bank, Recipe]],
    texts: Mapping[str, str],
    style: PromptStyle,
    jobs: int,
    progress: Progress,
) -> None:
    missing = [name for name in texts if any(bank.find(name) is None for bank, _ in banks)]
    cache = jax.config.jax_compilation_cache_dir
    writer: Literal["distill", "compile"] = "distill" if isinstance(banks[0][1], DistillConfig) else "compile"
    recipes, folders = tuple(to_dict(recipe) for _, recipe in banks), tuple(str(bank.path) for bank, _ in banks)
    given = (writer, base.name, base.id, style, recipes, folders)
    with contextlib.ExitStack() as stack:
        running = []
        for share in shares(missing, jobs):
            told = Share(*given, {name: texts[name] for name in share}, cache)
            running.append(stack.enter_context(_started(told)))
        while any(process.poll() is None for process, _ in running):
            if any(process.poll() not in (None, 0) for process, _ in running):
                break
            progress(sum(bank.find(name) is not None for name in texts for bank, _ in banks))
            time.sleep(LOOKED)
        failed = [_last_line(process, said) for process, said in running if process.poll() not in (None, 0)]
    if failed:
        raise BankError(f"a process that writes memories failed: {failed[0]}")
    progress(len(texts) * len(banks))


def shares(names: Sequence[str], jobs: int) -> list[list[str]]:
    """The names dealt out in turn, to as many as get any."""
    return [list(names[first::jobs]) for first in range(min(jobs, len(names)))]


def one_core() -> dict[str, str]:
    """The environment of a process whose products are not to be divided among cores that others use."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    return {**os.environ, "XLA_FLAGS": flags.strip()}


@contextlib.contextmanager
def _started(told: Share) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """(a process that writes a share, what it says on standard error); it is stopped where it has not ended by itself."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *PROGRAM], stdin=subprocess.PIPE, stderr=said, text=True, env=one_core()
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:  # one that is gone already says why below
                json.dump(to_dict(told), process.stdin)
            yield process, said
        finally:
            process.terminate()
            process.wait()


def _last_line(process: subprocess.Popen[str], said: IO[str]) -> str:
    said.seek(0)
    lines = [line for line in said.read().splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with status {process.returncode}"


def write_share(share: Share) -> None:
    """Writes a share, in the process that was started for it."""
    base = load(share.base)
    if base.id != share.base_id:
        raise ConfigError(f"base {share.base} is {base.id[:12]} here and {share.base_id[:12]} where it was asked for")
    with contextlib.ExitStack() as stack:
        banks = [stack.enter_context(open_bank(folder)) for folder in share.banks]
        if share.writer == "distill":
            for bank, told in zip(banks, share.recipes, strict=True):
                write_texts(base, bank, share.texts, share.style, from_dict(DistillConfig, told))
        else:
            recipes = [from_dict(CompileConfig, told) for told in share.recipes]
            compile_at_ratios(base, list(zip(banks, recipes, strict=True)), share.texts, share.style)


def main() -> None:
    """Reads a `Share` from standard input and writes it; the last line of standard error says why it could not."""
    share = from_dict(Share, json.load(sys.stdin))
    if share.cache:
        jax.config.update("jax_compilation_cache_dir", share.cache)
    write_share(share)


if __name__ == "__main__":
    main()
