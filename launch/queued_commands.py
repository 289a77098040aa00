"""The gcloud commands of a run on a Cloud TPU queued resource, as lists of arguments.

Options as in cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources.
"""

from __future__ import annotations

import dataclasses
import re

from launch import common, tpus
from launch.common import LaunchError

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_REMOTE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*")
# So that a worker that is gone is noticed within two minutes.
_ALIVE = ["--ssh-flag=-o ServerAliveInterval=30", "--ssh-flag=-o ServerAliveCountMax=4"]


@dataclasses.dataclass(frozen=True)
class Queued:
    """A run on a queued resource. The resource, its nodes and its folder on each worker are named after `name`.

    wait: how long the request may stay in the queue, as gcloud writes it (6h); bucket: mounted as code/bucket on each
    worker; collect: paths within the code folder that are copied from the first worker to `into` when the run has
    ended; retries: how often a lost resource is created anew; poll: seconds between two looks at its state; create_args:
    handed on to `gcloud ... create` as they are.
    """

    name: str
    zone: str
    tpu: tpus.Slice
    command: tuple[str, ...]
    project: str = ""
    slices: int = 1
    runtime: str = ""
    spot: bool = False
    reserved: bool = False
    wait: str = ""
    bucket: str = ""
    collect: tuple[str, ...] = ()
    into: str = ""
    retries: int = 0
    poll: float = 20.0
    internal_ip: bool = False
    create_args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not (self.runtime or self.tpu.runtime):
            raise LaunchError(f"{self.tpu.accelerator_type} has no queued resources; run it on GKE: launch.gke_xpk")
        if self.spot and self.reserved:
            raise LaunchError("--spot and --reserved exclude each other; choose one")
        if self.slices < 1 or self.retries < 0 or self.poll < 0:
            raise LaunchError("--slices must be at least 1, --retries and --poll at least 0")
        if self.bucket and not _BUCKET.fullmatch(self.bucket):
            raise LaunchError(f"--bucket {self.bucket!r}: give a bucket's name alone, without gs:// and without folders")
        for path in self.collect:
            if not _REMOTE_PATH.fullmatch(path) or ".." in path.split("/"):
                raise LaunchError(f"--collect {path!r}: give a path in the checkout, of letters, digits and _ . / + -")

    @property
    def folder(self) -> str:
        """The run's folder in the home of each worker."""
        return f"memjax-{self.name}"

    @property
    def tarball(self) -> str:
        """The tarball's name, here and there."""
        return f"{self.folder}.tar.gz"


def create(run: Queued) -> list[str]:
    """Asks for the resource and returns at once."""
    nodes = [f"--node-id={run.name}"]
    if run.slices > 1:
        nodes = [f"--node-count={run.slices}", f"--node-prefix={run.name}"]
    made = _gcloud(run, "create", run.name, *nodes)
    made += [f"--accelerator-type={run.tpu.accelerator_type}", f"--runtime-version={run.runtime or run.tpu.runtime}"]
    made += ["--spot"] if run.spot else []
    made += ["--reserved"] if run.reserved else []
    made += ["--internal-ips"] if run.internal_ip else []
    made += [f"--valid-until-duration={run.wait}"] if run.wait else []
    return [*made, *run.create_args, "--async"]


def describe(run: Queued) -> list[str]:
    """Its state, as JSON."""
    return _gcloud(run, "describe", run.name, "--format=json")


def delete(run: Queued) -> list[str]:
    """Deletes it with its nodes and waits until it is gone."""
    return _gcloud(run, "delete", run.name, "--force")


def copy(run: Queued, tarball: str) -> list[str]:
    """Copies the tarball to all workers."""
    return _gcloud(run, "scp", tarball, f"{run.name}:{run.tarball}", *_everywhere(run))


def unpack(run: Queued) -> list[str]:
    """Unpacks it and makes the environment, on all workers."""
    setup = f"bash {run.folder}/code/launch/worker_setup.sh {run.bucket}".rstrip()
    return _ssh(run, f"mkdir -p {run.folder} && tar -xzf {run.tarball} -C {run.folder} && {setup}")


def follow(run: Queued) -> list[str]:
    """Starts the job on all workers, or finds it started, and shows the logs until it ends."""
    return _ssh(run, f"bash {run.folder}/code/launch/worker_run.sh")


def collect(run: Queued, path: str) -> list[str]:
    """Copies a file or folder of the first worker's code folder to `into`."""
    where = [f"{run.name}:{run.folder}/code/{path}", run.into]
    return _gcloud(run, "scp", "--recurse", *where, "--worker=0", "--node=0", *_inside(run))


def _ssh(run: Queued, command: str) -> list[str]:
    return _gcloud(run, "ssh", run.name, *_everywhere(run), *_ALIVE, f"--command={command}")


def _everywhere(run: Queued) -> list[str]:
    return ["--worker=all", "--node=all", *_inside(run)]


def _inside(run: Queued) -> list[str]:
    return ["--internal-ip"] if run.internal_ip else []


def _gcloud(run: Queued, *words: str) -> list[str]:
    verb, *rest = words
    project = [f"--project={run.project}"] if run.project else []
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *rest, f"--zone={run.zone}", *project, "--quiet"]


def job_env(run: Queued, secret: dict[str, str]) -> dict[str, str]:
    """The variables of job.sh. With the TPU named first, JAX stops where there is none instead of using the CPU."""
    return {"JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1", **secret, **dict(run.env)}


def again(run: Queued) -> Queued:
    """The run after its resource was lost: on a new one, from its newest checkpoint."""
    return dataclasses.replace(run, command=common.resumed(run.command))
