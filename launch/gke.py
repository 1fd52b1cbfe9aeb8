"""Runs an experiment on Google Kubernetes Engine: creates a JobSet on TPU or GPU node pools with kubectl.

python -m launch.gke experiments.cifar_cnn --image=IMAGE --tpu=v6e:4x4 --workdir=gs://BUCKET/DIR
python -m launch.gke experiments.cifar_cnn --image=IMAGE --tpu=tpu7x:2x2x2 --slices=2 --workdir=gs://... --dry_run
python -m launch.gke experiments.cifar_cnn --image=IMAGE --gpu=nvidia-h100-80gb --nodes=2 --workdir=gs://...

`--dry_run` prints the JobSet. The `Dockerfile` of this repository builds the image. The cluster needs JobSet 0.6 or
newer (`kubectl api-resources | grep jobset`). After a failed or preempted node all nodes restart from the newest
checkpoint. Errors that a restart cannot fix (bad input, non-finite loss, full disk, out of memory) end the JobSet.
"""

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from launch import job as job_lib
from launch import mounts
from launch.job import Job
from launch.plans.topologies import LARGEST_SLICE
from research.chips import CHIPS
from research.config import option
from research.errors import UserError

# Node labels, from https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
_TPUS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
_CHIPS_PER_NODE = 4  # in a slice of more than one node
_CONTAINER = "meshwork"
_PORT = 8476  # of process 0


@dataclasses.dataclass
class GkeOptions:
    """The flags of `launch.gke`."""

    workdir: str = option("", "required: folder for the record that all machines can access, gs://BUCKET/FOLDER")
    image: str = option("", "required: container image with this repository")
    name: str = option("meshwork", "name of the JobSet")
    namespace: str = option("default", "Kubernetes namespace")
    tpu: str = option("", "TPU type and topology: v4:2x2x4, v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x2")
    slices: int = option(1, "number of TPU slices", minimum=1)
    gpu: str = option("", "GPU type, by its GKE label, as in nvidia-h100-80gb")
    nodes: int = option(1, "number of GPU nodes", minimum=1)
    gpus_per_node: int = option(8, "GPUs per node", minimum=1)
    spot: bool = option(False, "use spot nodes")
    service_account: str = option(
        "default", "Kubernetes service account with write access to the workdir and read access to mounted buckets"
    )
    mount: tuple[str, ...] = option((), mounts.HELP)
    max_restarts: int = option(10, "how many times to restart all nodes after one was lost", minimum=0)
    dry_run: bool = option(False, "print the JobSet without creating it")


def _check(options: GkeOptions) -> None:
    if not options.image:
        raise UserError("give --image=IMAGE, the container image (the Dockerfile builds one)")
    if bool(options.tpu) == bool(options.gpu):
        raise UserError("give either --tpu=TYPE:TOPOLOGY or --gpu=TYPE")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise UserError(f"--name={options.name}: use at most 40 characters of a-z, 0-9 and -, starting with a letter")
    if options.tpu:
        _check_topology(options.tpu)
    _check_ignored(options)
    mounts.parse(options.mount)


def _check_ignored(options: GkeOptions) -> None:
    kind, names, instead = "--tpu", ("nodes", "gpus_per_node"), "the topology and --slices give the number of chips"
    if options.gpu:
        kind, names, instead = "--gpu", ("slices",), "--nodes and --gpus_per_node give the number of GPUs"
    for name in names:
        if (value := getattr(options, name)) != getattr(GkeOptions(), name):
            raise UserError(f"--{name}={value} does not apply to {kind}, where {instead}: leave it out")


def _check_topology(tpu: str) -> None:
    if not re.fullmatch(rf"({'|'.join(_TPUS)}):\d+(x\d+){{1,2}}", tpu):
        raise UserError(f"--tpu={tpu}: give one of {', '.join(_TPUS)} and a topology, as in v6e:4x4")
    kind, _, topology = tpu.partition(":")
    sizes = [int(size) for size in topology.split("x")]
    chips, dimensions = math.prod(sizes), CHIPS[kind].dimensions
    if len(sizes) != dimensions or (chips != 1 and chips % _CHIPS_PER_NODE) or not 0 < chips <= LARGEST_SLICE[kind]:
        raise UserError(
            f"--tpu={tpu}: a slice of {kind} has {dimensions} dimensions, and one chip or a multiple of "
            f"{_CHIPS_PER_NODE}, at most {LARGEST_SLICE[kind]:,}"
        )


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The nodes that a run needs: their labels, the number per slice, and the number of chips (`resource`) per node."""

    labels: dict[str, str]
    nodes: int
    resource: str
    count: int


def _pool(options: GkeOptions) -> _Pool:
    if options.gpu:
        labels = {"cloud.google.com/gke-accelerator": options.gpu}
        return _Pool(labels, options.nodes, "nvidia.com/gpu", options.gpus_per_node)
    kind, _, topology = options.tpu.partition(":")
    chips = math.prod(map(int, topology.split("x")))
    count = min(chips, _CHIPS_PER_NODE)
    labels = {"cloud.google.com/gke-tpu-accelerator": _TPUS[kind], "cloud.google.com/gke-tpu-topology": topology}
    return _Pool(labels, chips // count, "google.com/tpu", count)


def _container(job: Job, pool: _Pool) -> dict[str, Any]:
    options, args, environment = job.options, job.module_command, []
    if options.gpu:
        # Process ids come from JOB_COMPLETION_INDEX, which Kubernetes sets. On TPUs, JAX detects everything on GKE.
        address = f"{options.name}-workers-0-0.{options.name}:{_PORT}"
        environment = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": address},
            {"name": "JAX_NUM_PROCESSES", "value": str(pool.nodes)},
        ]
    else:
        args.append("--config.distributed.start=always")
    return {
        "name": _CONTAINER,
        "image": options.image,
        "command": ["python", "-m", *args],
        "env": environment,
        "ports": [{"containerPort": _PORT}],
        "resources": {"limits": {pool.resource: pool.count}},
        "volumeMounts": mounts.volume_mounts(mounts.parse(options.mount)),
    }


def _job(job: Job, pool: _Pool) -> dict[str, Any]:
    """The Kubernetes Job for one slice, or for all GPU nodes."""
    options, mounted = job.options, mounts.parse(job.options.mount)
    spot = {"cloud.google.com/gke-spot": "true"} if options.spot else {}
    pod = {
        "restartPolicy": "Never",  # a lost node fails the Job, so that the JobSet restarts all pods together
        "serviceAccountName": options.service_account,
        "terminationGracePeriodSeconds": 120,  # time to save a checkpoint after SIGTERM
        "nodeSelector": pool.labels | spot,
        "containers": [_container(job, pool)],
        "volumes": mounts.volumes(mounted),
    }
    non_retryable = {"containerName": _CONTAINER, "operator": "In", "values": list(job_lib.NON_RETRYABLE_EXIT_CODES)}
    return {
        "parallelism": pool.nodes,
        "completions": pool.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": non_retryable}]},
        "template": {"metadata": {"annotations": mounts.annotations(mounted)}, "spec": pod},
    }


def jobset(job: Job) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2) for a job whose options are `GkeOptions`."""
    options, pool = job.options, _pool(job.options)
    slices = {
        "name": "workers",
        "replicas": options.slices,
        "template": {"spec": _job(job, pool)},
    }
    # On GKE each TPU slice is one node pool.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    no_restart = {"name": "nonRetryable", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "namespace": options.namespace,
            "annotations": exclusive if options.tpu else {},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": options.name},
            "failurePolicy": {"maxRestarts": options.max_restarts, "rules": [no_restart]},
            "replicatedJobs": [slices],
        },
    }


def run(argv: Sequence[str]) -> int:
    """Creates the JobSet, or prints it; returns kubectl's exit code.

    Raises:
      UserError: bad input, found before anything is created.
    """
    job = job_lib.parse("gke", str(__doc__), GkeOptions(), argv)
    _check(job.options)
    job_lib.check_remote(job)
    text = yaml.safe_dump(jobset(job), sort_keys=False, width=120)
    if job.options.dry_run:
        print(text, end="")
        return 0
    try:
        # Not `apply`: for a JobSet that has ended it reports "unchanged" and starts nothing.
        code = subprocess.run(["kubectl", "create", "-f", "-"], input=text, text=True).returncode
    except FileNotFoundError:
        raise UserError("kubectl is not installed on this machine: install it, or use --dry_run") from None
    if code:
        name, namespace = job.options.name, job.options.namespace
        print(
            f"if a JobSet {name} already exists (running or ended): give another --name, or delete it with "
            f"`kubectl delete jobset {name} --namespace={namespace}`",
            file=sys.stderr,
        )
    return code


if __name__ == "__main__":
    job_lib.main(run)
