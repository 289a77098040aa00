"""What a Cloud TPU worker is handed: a tarball with the checkout's tracked files (code/) and the job (job.sh).

The tarball holds all that needs quoting and all that is secret, so that the commands sent by ssh are short and constant:
worker_setup.sh and worker_run.sh beside this file, which the tarball holds as well.
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.common import LaunchError

ROOT = Path(__file__).resolve().parent.parent


def code_files(root: Path = ROOT) -> tuple[list[Path], int]:
    """(tracked files as they are now, relative to the root; how many others git does not ignore and so are left out)."""
    try:
        tracked = _git(root, "ls-files", "-z")
        others = _git(root, "ls-files", "-z", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        raise LaunchError(
            f"{root} is no git checkout; the launcher ships the files that git tracks: clone memjax"
        ) from None
    return [path for path in tracked if (root / path).is_file()], len(others)


def _git(root: Path, *arguments: str) -> list[Path]:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)
    return [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]


def job_script(command: Sequence[str], env: Mapping[str, str]) -> str:
    """job.sh: the memjax command in the environment that worker_setup.sh made, with these variables."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
    start = ['cd "$(dirname "$0")/code" || exit 2', ". ../venv/bin/activate", ". launch/worker_hosts.sh"]
    return "\n".join([*start, *exports, shlex.join(["memjax", *command])]) + "\n"


def write_tarball(target: Path, job: str, root: Path = ROOT) -> None:
    """Writes the tarball, readable by its owner only: job.sh may hold secrets, and scp keeps the mode."""
    files, _ = code_files(root)
    with (
        open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out,
        tarfile.open(fileobj=out, mode="w:gz") as tar,
    ):
        for path in files:
            tar.add(root / path, f"code/{path}", recursive=False)
        entry = tarfile.TarInfo("job.sh")
        entry.mode, entry.size = 0o600, len(job.encode())
        tar.addfile(entry, io.BytesIO(job.encode()))
