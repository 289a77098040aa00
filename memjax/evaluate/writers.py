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
from memjax.write.compile import CompileConfig, compile_context
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
    """What one process is told: `texts` by name, to be written into `bank` by a recipe, as JSON.

    writer: whose recipe it is; cache: where JAX keeps compiled programs.
    """

    writer: Literal["distill", "compile"]
    base: str
    base_id: str
    style: PromptStyle
    recipe: dict[str, Any]
    bank: str
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
    for name, text in texts.items():
        if bank.find(name) is not None and bank.text(name) != text:
            raise ConfigError(f"{bank.path} holds a memory of another text called {name}; give another --out")
    if jobs > 1 and beside is None:
        _side_by_side(base, bank, texts, style, recipe, jobs, progress)
    elif isinstance(recipe, DistillConfig):
        _distil(base, bank, texts, style, recipe, progress)
    else:
        _compile(base, bank, texts, style, recipe, beside, progress)


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
    bank: Bank,
    texts: Mapping[str, str],
    style: PromptStyle,
    recipe: CompileConfig,
    beside: Bank | None,
    progress: Progress,
) -> None:
    general = None
    for done, (name, text) in enumerate(texts.items(), start=1):
        if bank.find(name) is None:
            if general is None and recipe.query_teacher == "none":
                general = general_tasks(base, split_prompts(base.tokenizer, style, text), recipe)
            began = time.monotonic()
            others = [] if beside is None else other_buffers(base, beside, recipe, text)
            written = compile_context(base, text, style, recipe, general=general, others=others)
            metrics = {**written.metrics, "seconds": time.monotonic() - began}
            meta = dataclasses.replace(text_meta(base, text, style, recipe), metrics=metrics)
            write = lambda folder, made=written.artefact, meta=meta: write_artefact(folder, made, SITE_MODULES, meta)
            bank.add(name, meta.key, write, text=text)
        progress(done)


def _side_by_side(
    base: Base, bank: Bank, texts: Mapping[str, str], style: PromptStyle, recipe: Recipe, jobs: int, progress: Progress
) -> None:
    missing = [name for name in texts if bank.find(name) is None]
    cache = jax.config.jax_compilation_cache_dir
    writer: Literal["distill", "compile"] = "distill" if isinstance(recipe, DistillConfig) else "compile"
    given = (writer, base.name, base.id, style, to_dict(recipe), str(bank.path))
    with contextlib.ExitStack() as stack:
        running = []
        for share in shares(missing, jobs):
            told = Share(*given, {name: texts[name] for name in share}, cache)
            running.append(stack.enter_context(_started(told)))
        while any(process.poll() is None for process, _ in running):
            if any(process.poll() not in (None, 0) for process, _ in running):
                break
            progress(sum(bank.find(name) is not None for name in texts))
            time.sleep(LOOKED)
        failed = [_last_line(process, said) for process, said in running if process.poll() not in (None, 0)]
    if failed:
        raise BankError(f"a process that writes memories failed: {failed[0]}")
    progress(len(texts))


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
    recipe: Recipe
    if share.writer == "distill":
        recipe = from_dict(DistillConfig, share.recipe)
    else:
        recipe = from_dict(CompileConfig, share.recipe)
    with open_bank(share.bank) as bank:
        write_texts(base, bank, share.texts, share.style, recipe)


def main() -> None:
    """Reads a `Share` from standard input and writes it; the last line of standard error says why it could not."""
    share = from_dict(Share, json.load(sys.stdin))
    if share.cache:
        jax.config.update("jax_compilation_cache_dir", share.cache)
    write_share(share)


if __name__ == "__main__":
    main()
