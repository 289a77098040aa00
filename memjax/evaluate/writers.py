"""The memories of an experiment, written by several processes side by side into one bank, each a share of the texts.

A step of a small base on short answers leaves most of a second core idle; two documents do not. Run as a program
(`python -m memjax.evaluate.writers`) this is one of these processes: it reads what to write as JSON from its input.
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
from typing import IO, TYPE_CHECKING, Any, Literal

import jax

from memjax.bank.store import Bank
from memjax.config import from_dict, to_dict
from memjax.errors import BankError, ConfigError
from memjax.models.base import Base
from memjax.write.prompts import PromptStyle

if TYPE_CHECKING:
    from memjax.write.compile import CompileConfig
    from memjax.write.distill import DistillConfig

PROGRAM = ("-m", "memjax.evaluate.writers")
LOOKED = 0.5  # seconds between two looks at how far the bank is


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process is told: `texts` by name, to be written into `bank` by a recipe, as JSON.

    experiment: whose own way of writing, `bank`'s or `compile`'s; cache: where JAX keeps compiled programs.
    """

    experiment: Literal["bank", "compile"]
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


def write_side_by_side(
    experiment: Literal["bank", "compile"],
    base: Base,
    style: PromptStyle,
    recipe: DistillConfig | CompileConfig,
    bank: Bank,
    texts: Mapping[str, str],
    jobs: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes the texts that the bank does not hold yet with `jobs` processes; `progress` is told how many it holds.

    What is written is what one process writes. BankError, after all have been stopped, where one of them fails; whatever
    they had added stays.
    """
    missing = [name for name in texts if bank.find(name) is None]
    cache = jax.config.jax_compilation_cache_dir
    given = (base.name, base.id, style, to_dict(recipe), str(bank.path))
    with contextlib.ExitStack() as stack:
        running = []
        for share in shares(missing, jobs):
            told = Share(experiment, *given, {name: texts[name] for name in share}, cache)
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
            with process.stdin:
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
    from memjax.bank.store import open_bank
    from memjax.evaluate import bank, compile
    from memjax.train.base import load

    base = load(share.base)
    if base.id != share.base_id:
        raise ConfigError(f"base {share.base} is {base.id[:12]} here and {share.base_id[:12]} where it was asked for")
    with open_bank(share.bank) as opened:
        if share.experiment == "bank":
            distilling = from_dict(bank.DistillConfig, share.recipe)
            bank.write_texts(base, opened, share.texts, share.style, distilling)
        else:
            compiling = from_dict(compile.CompileConfig, share.recipe)
            compile.compile_texts(base, opened, share.texts, share.style, compiling)


def main() -> None:
    """Reads a `Share` from standard input and writes it; the last line of standard error says why it could not."""
    share = from_dict(Share, json.load(sys.stdin))
    if share.cache:
        jax.config.update("jax_compilation_cache_dir", share.cache)
    write_share(share)


if __name__ == "__main__":
    main()
