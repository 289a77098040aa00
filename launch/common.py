"""What all launchers share: exit codes, the one-line error, the command after `--`, environment variables, dry runs."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

DONE = 0
COMMAND_FAILED = 1
WRONG_USE = 2
NOT_GRANTED = 3
LOST = 4
NOT_DELETED = 5
EXIT_CODES = """exit codes:
  0  the command ended well everywhere
  1  the command (or setting up for it) failed
  2  wrong arguments, or a tool is missing; nothing was started
  3  the hardware was not granted: quota, capacity, permission
  4  the hardware was lost more often than --retries allows
  5  something could not be deleted and may still cost money; the message says how to delete it
  130, 143  stopped by Ctrl-C or SIGTERM, after deleting what was created"""

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API)?KEY)(_|$)", re.IGNORECASE)
# `memjax train` commands that keep no checkpoints of their own and know no --resume.
_NOT_RESUMABLE = frozenset({"router"})


class LaunchError(Exception):
    """What a person can mend: one line that names the thing and the way out, and the exit code."""

    def __init__(self, message: str, exit_code: int = WRONG_USE) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def say(line: str) -> None:
    """One line for the person who waits, on stderr: stdout carries the run's own output."""
    print(f"memjax-launch: {line}", file=sys.stderr, flush=True)


def parser(module: str, what: str, example: str) -> argparse.ArgumentParser:
    """An argument parser with what all launchers have: an example, the exit codes, --dry-run."""
    made = argparse.ArgumentParser(
        prog=f"python -m launch.{module}",
        description=what,
        epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--dry-run", action="store_true", help="print the commands and run none of them")
    return made


def split_command(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """(the launcher's own arguments, memjax's) of `... -- train base ...`; a leading `memjax` after `--` is dropped."""
    argv = list(argv)
    own, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    if command[:1] == ["memjax"]:
        command = command[1:]
    if any("\0" in word for word in command):
        raise LaunchError("the memjax command holds a NUL character; no program can be handed one")
    return own, tuple(command)


def require_command(command: Sequence[str]) -> None:
    """LaunchError where there is no memjax command."""
    if not command:
        raise LaunchError("no memjax command; add it after --, as in: -- train base configs/tiny_base.yaml --out runs/tiny")


def resumed(command: Sequence[str]) -> tuple[str, ...]:
    """The command to go on with after an interruption: training continues from its newest complete checkpoint."""
    command = tuple(command)
    if command[:1] == ("train",) and command[1:2] and command[1] not in _NOT_RESUMABLE and "--resume" not in command:
        return (*command, "--resume")
    return command


def check_name(name: str) -> str:
    """The name; LaunchError where Google Cloud and Kubernetes would not take it."""
    if not NAME.fullmatch(name):
        raise LaunchError(f"--name {name!r}: use at most 40 lowercase letters, digits and hyphens, with a letter first")
    return name


def variables(pairs: Iterable[str]) -> dict[str, str]:
    """The variables of --env NAME=VALUE; LaunchError where one is no variable or looks like a secret."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not VARIABLE.fullmatch(name):
            raise LaunchError(f"--env {name!r}: write NAME=VALUE")
        if _SECRET.search(name):
            raise LaunchError(
                f"--env {name}: a secret on a command line is seen by others; put it into a file for --env-file"
            )
        found[name] = value
    return found


def read_env_file(path: str | Path) -> dict[str, str]:
    """The variables of a file with one NAME=VALUE a line, # for comments; values are never printed."""
    path = Path(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise LaunchError(f"--env-file {path}: {error.strerror}; give a readable file") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not VARIABLE.fullmatch(name.strip()):
            raise LaunchError(f"--env-file {path}, line {number}: write NAME=VALUE")
        found[name.strip()] = value
    return found


def for_kubernetes(text: str) -> str:
    """The text as Kubernetes leaves it alone: in commands and variables it replaces $(NAME), and $$ by $."""
    return text.replace("$", "$$")


def show(commands: Iterable[Sequence[str]]) -> None:
    """Prints commands as a shell would take them."""
    for command in commands:
        print(shlex.join(command))


def run(command: Sequence[str]) -> int:
    """Runs a command in the foreground; its exit code. LaunchError where there is no such program."""
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise missing_tool(command[0]) from None


def missing_tool(name: str) -> LaunchError:
    """The error for a program that is not installed."""
    where = {
        "gcloud": "install the Google Cloud CLI, then: gcloud auth login",
        "xpk": "pip install xpk, in an environment of its own",
        "kubectl": "gcloud components install kubectl",
    }
    return LaunchError(f"{name} is not installed; {where.get(name, 'install it')}")


def finish(launch: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """The exit code of a launcher's main, its LaunchError told in one line."""
    try:
        return launch(sys.argv[1:] if argv is None else argv)
    except LaunchError as error:
        if isinstance(error.__context__, LaunchError):  # what went wrong before the cleaning up did
            say(str(error.__context__))
        say(str(error))
        return error.exit_code
