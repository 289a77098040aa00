"""Runs memjax on this machine, with the environment that the wanted device needs."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import common
from launch.common import LaunchError

PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
_DEVICES = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Local:
    """platform: cpu, gpu or tpu, "" for whatever JAX finds; devices: simulated ones, on the CPU only; env: variables."""

    command: tuple[str, ...]
    platform: str = ""
    devices: int = 0
    env: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.devices and self.platform != "cpu":
            raise LaunchError(f"--devices {self.devices} simulates devices on the CPU; add --platform cpu")


def environment(config: Local, before: Mapping[str, str]) -> dict[str, str]:
    """The variables to set or change beside those that there are: JAX's platform and, simulated, its devices."""
    made = dict(config.env)
    if config.platform:
        # Named first, the device must be there: without it JAX stops instead of falling back to the CPU in silence.
        made["JAX_PLATFORMS"] = PLATFORMS[config.platform]
    if config.devices:
        others = [flag for flag in before.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES)]
        made["XLA_FLAGS"] = " ".join([*others, f"{_DEVICES}={config.devices}"])
    return made


def program() -> str:
    """The `memjax` command of this Python's environment, else the one on PATH; LaunchError without one."""
    beside = Path(sys.executable).parent / "memjax"
    found = str(beside) if beside.exists() else shutil.which("memjax")
    if found is None:
        raise LaunchError("memjax is not installed in this environment; run: pip install -e .")
    return found


def _parser():
    made = common.parser(
        "local",
        "Run memjax on this machine.",
        "python -m launch.local --platform cpu --devices 8 -- train base configs/tiny_base.yaml --out runs/tiny",
    )
    made.add_argument("--platform", choices=list(PLATFORMS), default="", help="the device, which then must be there")
    made.add_argument("--devices", type=int, default=0, metavar="N", help="simulate N devices on the CPU")
    made.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable; no secrets")
    made.add_argument("--env-file", metavar="FILE", help="variables, secrets too: NAME=VALUE lines")
    return made


def launch(argv: Sequence[str]) -> int:
    """The memjax command's own exit code; it takes the launcher's place, signals included."""
    own, command = common.split_command(argv)
    options = _parser().parse_args(own)
    common.require_command(command)
    shown = common.variables(options.env)
    secret = common.read_env_file(options.env_file) if options.env_file else {}
    config = Local(command, options.platform, options.devices, tuple(shown.items()))
    changed = environment(config, os.environ)
    if options.dry_run:
        hidden = [f"{name}=(from {options.env_file})" for name in secret]
        common.show([["env", *hidden, *(f"{name}={value}" for name, value in changed.items()), "memjax", *command]])
        return common.DONE
    path = program()
    os.execve(path, [path, *command], {**os.environ, **secret, **changed})


if __name__ == "__main__":
    sys.exit(common.finish(launch))
