"""Renders a JobSet for GKE's TPU slices as YAML, for `kubectl apply -f`.

One replicated job per slice, one pod per host; a restarted set trains on from its newest checkpoint. What a program can
not be saved from (memjax's exit status 2: a wrong argument, a wrong file) is not tried again. Fields as in
jobset.sigs.k8s.io and cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

from launch import common, tpus

CONTAINER = "memjax"
BUCKET = "/bucket"
PORT = 8476
WRONG_USE_OF_MEMJAX = 2
_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.\-]*")
_YAML_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n", "."})


@dataclasses.dataclass(frozen=True)
class Job:
    """image: a container image with memjax[tpu] in it; secret: a Kubernetes secret whose entries become variables;
    bucket: a Cloud Storage bucket, mounted at /bucket; retries: restarts after a lost or failed slice."""

    name: str
    image: str
    tpu: tpus.Slice
    command: tuple[str, ...]
    namespace: str = ""
    slices: int = 1
    spot: bool = False
    retries: int = 0
    bucket: str = ""
    service_account: str = ""
    secret: str = ""
    env: tuple[tuple[str, str], ...] = ()


def manifest(job: Job) -> dict[str, Any]:
    """The JobSet as a tree of dicts and lists."""
    command = common.resumed(job.command) if job.retries else job.command
    env = {"JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1", **dict(job.env)}
    start, together = _together(job)
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": job.image,
        "command": [*start, *map(common.for_kubernetes, command)],
        "env": [{"name": name, "value": common.for_kubernetes(value)} for name, value in env.items()] + together,
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": job.tpu.chips_per_host}},
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.tpu.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": job.tpu.topology,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": selector,
        "containers": [container],
    }
    template: dict[str, Any] = {"spec": pod}
    if job.secret:
        container["envFrom"] = [{"secretRef": {"name": job.secret}}]
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if job.bucket:
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        container["volumeMounts"] = [{"name": "bucket", "mountPath": BUCKET}]
        attributes = {"bucketName": job.bucket, "mountOptions": "implicit-dirs"}
        pod["volumes"] = [
            {"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
        ]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            **({"namespace": job.namespace} if job.namespace else {}),
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.retries,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": job.slices,
                    "template": {
                        "spec": {
                            "parallelism": job.tpu.hosts,
                            "completions": job.tpu.hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "FailJob",
                                        "onExitCodes": {
                                            "containerName": CONTAINER,
                                            "operator": "In",
                                            "values": [WRONG_USE_OF_MEMJAX],
                                        },
                                    }
                                ]
                            },
                            "template": template,
                        }
                    },
                }
            ],
        },
    }


def _together(job: Job) -> tuple[list[str], list[dict[str, Any]]]:
    """(how the command begins, variables) by which several hosts find each other, see memjax/distributed.py."""
    hosts = job.tpu.hosts * job.slices
    if hosts == 1:
        return ["memjax"], []
    # JobSet gives pods names in the DNS: <set>-<replicated job>-<job>-<pod>.<set>
    known = {"MEMJAX_COORDINATOR": f"{job.name}-slice-0-0.{job.name}:{PORT}", "MEMJAX_PROCESSES": str(hosts)}
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in known.items()]
    own = "SLICE" if job.slices > 1 else "MEMJAX_PROCESS"
    index = "jobset.sigs.k8s.io/job-index" if job.slices > 1 else "batch.kubernetes.io/job-completion-index"
    variables.append({"name": own, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{index}']"}}})
    if job.slices == 1:
        return ["memjax"], variables
    process = common.for_kubernetes(f"$((SLICE * {job.tpu.hosts} + JOB_COMPLETION_INDEX))")
    return ["bash", "-c", f'MEMJAX_PROCESS={process} exec memjax "{common.for_kubernetes("$@")}"', "memjax"], variables


def to_yaml(value: Any, indent: int = 0) -> str:
    """YAML of dicts, lists, strings, whole numbers and booleans, a block style that `kubectl` and people read."""
    pad = "  " * indent
    if isinstance(value, dict) and value:
        return "".join(f"{pad}{_scalar(key)}:{_nested(item, indent)}" for key, item in value.items())
    if isinstance(value, list) and value:
        # The first line of an item stands behind its dash, which is as wide as one level of indentation.
        items = ((item, to_yaml(item, indent + 1)) for item in value)
        return "".join(
            f"{pad}- {text[len(pad) + 2 :]}" if isinstance(item, dict | list) and item else f"{pad}- {_scalar(item)}\n"
            for item, text in items
        )
    return f"{pad}{_scalar(value)}\n"


def _nested(item: Any, indent: int) -> str:
    if isinstance(item, dict | list) and item:
        return "\n" + to_yaml(item, indent + 1)
    return f" {_scalar(item)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict | list):
        return "{}" if isinstance(value, dict) else "[]"
    if _PLAIN.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    return '"' + "".join(_escaped(c) for c in value) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\U{ord(char):08X}"


def _parser():
    made = common.parser(
        "jobset",
        "Print a JobSet for a GKE cluster with TPU node pools, for kubectl. Runs nothing, with or without --dry-run.",
        "python -m launch.jobset --name tiny --image REGION-docker.pkg.dev/P/R/memjax:1 --tpu v5e-16 --bucket my-bucket "
        "\\\n    -- train base configs/tiny_base.yaml --out /bucket/tiny > tiny.yaml && kubectl apply -f tiny.yaml",
    )
    made.add_argument("--name", required=True, help="the JobSet's name")
    made.add_argument("--image", required=True, help="a container image in which memjax[tpu] is installed")
    made.add_argument(
        "--tpu", required=True, help="the slice: v5e-16, v6e-8, v5p-64, v4-32, tpu7x-8, or a shape: v5p-4x4x12"
    )
    made.add_argument("--namespace", default="", help="kubectl's own by default")
    made.add_argument("--slices", type=int, default=1, help="slices of that size")
    made.add_argument("--spot", action="store_true", help="nodes that may be taken away at any time")
    made.add_argument(
        "--retries", type=int, default=0, help="restarts of the whole set; training goes on where it was saved"
    )
    made.add_argument("--bucket", default="", help=f"a Cloud Storage bucket, mounted at {BUCKET}")
    made.add_argument("--service-account", default="", help="the Kubernetes service account that may read and write it")
    made.add_argument("--secret", default="", help="a Kubernetes secret whose entries become environment variables")
    made.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable; no secrets")
    return made


def launch(argv: Sequence[str]) -> int:
    """Prints the manifest; nothing is applied."""
    own, command = common.split_command(argv)
    options = _parser().parse_args(own)
    common.require_command(command)
    if options.retries and not options.bucket:
        common.say("--retries without --bucket: a restarted set finds no checkpoint and begins anew")
    job = Job(
        common.check_name(options.name),
        options.image,
        tpus.parse(options.tpu),
        command,
        namespace=options.namespace,
        slices=options.slices,
        spot=options.spot,
        retries=options.retries,
        bucket=options.bucket,
        service_account=options.service_account,
        secret=options.secret,
        env=tuple(common.variables(options.env).items()),
    )
    print(to_yaml(manifest(job)), end="")
    return common.DONE


if __name__ == "__main__":
    sys.exit(common.finish(launch))
