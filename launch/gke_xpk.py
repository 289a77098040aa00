"""Runs memjax on a GKE cluster through xpk: creates, lists and deletes workloads.

xpk (github.com/AI-Hypercomputer/xpk) puts the files of --script-dir into a container image and the command into a JobSet.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import common, tpus
from launch.common import LaunchError

BASE_IMAGE = "python:3.12"
# Several hosts need to know of each other: an image that is to run on them holds the checkout as its working folder.
HOSTS = "{ [ ! -f launch/worker_hosts.sh ] || . launch/worker_hosts.sh; }"
INSTALL = "pip install -q '.[tpu]'"


@dataclasses.dataclass(frozen=True)
class Workload:
    """image: one with memjax[tpu] in it; without it, the checkout is built onto `base_image` and installed at each start.
    capacity: "", spot, on-demand or a reservation's name, for clusters that provision nodes by themselves."""

    name: str
    cluster: str
    tpu: tpus.Slice
    command: tuple[str, ...]
    slices: int = 1
    retries: int = 0
    image: str = ""
    base_image: str = BASE_IMAGE
    capacity: str = ""
    env_file: str = ""
    project: str = ""
    zone: str = ""

    def __post_init__(self) -> None:
        # xpk pastes the command into indented YAML as it is.
        if any("\n" in word or "\r" in word for word in self.command):
            raise LaunchError("xpk takes no line breaks in a command; put the text into a config file and name that")


def create(work: Workload) -> list[str]:
    """`xpk workload create` for it."""
    command = common.resumed(work.command) if work.retries else work.command
    memjax = f"{HOSTS} && {common.for_kubernetes(shlex.join(['memjax', *command]))}"
    made = [
        "xpk", "workload", "create", f"--workload={work.name}", f"--cluster={work.cluster}",
        f"--tpu-type={work.tpu.accelerator_type}", f"--num-slices={work.slices}", f"--max-restarts={work.retries}",
    ]  # fmt: skip
    if work.image:
        made += [f"--docker-image={work.image}", f"--command={memjax}"]
    else:
        made += [f"--base-docker-image={work.base_image}", "--script-dir=.", f"--command={INSTALL} && {memjax}"]
    if work.retries:  # without it xpk restarts for its own reasons only, and not where memjax misses a host
        made.append("--restart-on-user-code-failure")
    if work.capacity:
        made.append(f"--{work.capacity}" if work.capacity in ("spot", "on-demand") else f"--reservation={work.capacity}")
    if work.env_file:
        made.append(f"--env-file={work.env_file}")
    return made + _place(work.project, work.zone)


def listing(cluster: str, project: str = "", zone: str = "", name: str = "") -> list[str]:
    """`xpk workload list` of a cluster, or of one workload in it."""
    return ["xpk", "workload", "list", f"--cluster={cluster}", *([f"--filter-by-job={name}"] if name else []),
            *_place(project, zone)]  # fmt: skip


def delete(cluster: str, name: str, project: str = "", zone: str = "") -> list[str]:
    """`xpk workload delete` of one workload; without a name xpk would delete all of them."""
    return ["xpk", "workload", "delete", f"--workload={name}", f"--cluster={cluster}", "--force", *_place(project, zone)]


def _place(project: str, zone: str) -> list[str]:
    return [*([f"--project={project}"] if project else []), *([f"--zone={zone}"] if zone else [])]


def _parser() -> argparse.ArgumentParser:
    made = common.parser(
        "gke_xpk",
        "Run memjax on a GKE cluster through xpk; list and delete what runs there.",
        "python -m launch.gke_xpk create --name tiny --cluster my-cluster --tpu v5e-16 --retries 3 \\\n"
        "    -- train base configs/tiny_base.yaml --out /bucket/tiny\n"
        "  python -m launch.gke_xpk delete --name tiny --cluster my-cluster",
    )
    made.add_argument("verb", choices=["create", "list", "delete"])
    made.add_argument("--cluster", required=True, help="the GKE cluster")
    made.add_argument("--name", default="", help="the workload's name")
    made.add_argument("--project", default="", help="gcloud's own by default")
    made.add_argument("--zone", default="", help="gcloud's own by default")
    made.add_argument("--tpu", default="", help="the slice: v5e-16, v6e-8, v5p-64, v4-32, tpu7x-8, or a shape: v5p-4x4x12")
    made.add_argument("--slices", type=int, default=1, help="slices of that size")
    made.add_argument(
        "--retries", type=int, default=0, help="restarts of a lost workload; training goes on where it was saved"
    )
    made.add_argument(
        "--image", default="", help="an image with memjax[tpu] in it; else the checkout is built onto --base-image"
    )
    made.add_argument("--base-image", default=BASE_IMAGE, help=f"{BASE_IMAGE} by default")
    made.add_argument("--capacity", default="", metavar="KIND", help="spot, on-demand, or a reservation's name")
    made.add_argument(
        "--env-file", default="", metavar="FILE", help="variables, secrets too; xpk reads it, its values are not shown"
    )
    return made


def launch(argv: Sequence[str]) -> int:
    """xpk's exit code, 0 or 1; xpk itself waits for nothing, `list` tells how a workload fares."""
    own, command = common.split_command(argv)
    options = _parser().parse_args(own)
    place = (options.project, options.zone)
    if options.verb == "list":
        wanted = listing(options.cluster, *place, options.name)
    elif not options.name:
        raise LaunchError(f"{options.verb} needs --name; python -m launch.gke_xpk list shows what there is")
    elif options.verb == "delete":
        wanted = delete(options.cluster, options.name, *place)
    else:
        common.require_command(command)
        if options.env_file and not Path(options.env_file).is_file():
            raise LaunchError(f"--env-file {options.env_file}: no such file")
        wanted = create(
            Workload(
                common.check_name(options.name),
                options.cluster,
                tpus.parse(options.tpu),
                command,
                slices=options.slices,
                retries=options.retries,
                image=options.image,
                base_image=options.base_image,
                capacity=options.capacity,
                env_file=options.env_file,
                project=options.project,
                zone=options.zone,
            )
        )
    if options.dry_run:
        common.show([wanted])
        return common.DONE
    return common.DONE if common.run(wanted) == 0 else common.COMMAND_FAILED


if __name__ == "__main__":
    sys.exit(common.finish(launch))
