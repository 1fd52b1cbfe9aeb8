"""The gcloud commands with which `launch.tpu` creates, uses and deletes a TPU VM, and their results."""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

from launch import mounts
from launch.job import Job
from research.config import option
from research.errors import UserError

# States of a TPU VM or a queued resource: https://cloud.google.com/tpu/docs/reference/rest (v2).
READY_STATES = ("READY", "ACTIVE")
DELETABLE_STATES = ("PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED")  # not STOPPED: its owner may start it again
LOST_STATES = ("PREEMPTED", "TERMINATED", "SUSPENDED", "STOPPED")
FAILED = "FAILED"
NOT_FOUND = "NOT_FOUND"  # gcloud's error, returned in place of a state
_ALREADY_EXISTS = "ALREADY_EXISTS"

_RUNTIMES = {  # https://cloud.google.com/tpu/docs/runtimes
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_PYTHON = "meshwork/.venv/bin/python"  # in the home directory on each host
_INSTALL = (  # with uv, since the hosts' Python is older than 3.11
    "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python=3.12 meshwork/.venv && "
    f"~/.local/bin/uv pip install --quiet --python={_PYTHON} -e 'meshwork[tpu,gcs,sweep,postgres]'"
)


@dataclasses.dataclass
class TpuOptions:
    """The flags of `launch.tpu`."""

    workdir: str = option(
        "", "required for `up` and `run`: folder for the record that all hosts can access, gs://BUCKET/FOLDER"
    )
    name: str = option("meshwork", "name of the TPU")
    zone: str = option("", "zone, as in us-central1-a; empty: gcloud's default")
    project: str = option("", "project; empty: gcloud's default")
    accelerator: str = option("v6e-8", "accelerator type, as in v4-8, v5litepod-16, v5p-8, v6e-256")
    runtime: str = option("", "runtime version; empty: the one for the accelerator")
    queued: bool = option(False, "create a queued resource, which waits until a TPU is available")
    spot: bool = option(False, "use a spot TPU: cheaper, but may be preempted")
    reserved: bool = option(False, "use the project's reservation")
    install: str = option(_INSTALL, "shell command that creates meshwork/.venv on each host")
    mount: tuple[str, ...] = option((), f"for `up` and `run`, {mounts.HELP}")
    max_restarts: int = option(10, "how many times `up` may replace a preempted TPU", minimum=0)
    keep: bool = option(False, "do not delete the TPU when `up` ends")
    dry_run: bool = option(False, "print the commands without running them")


class Tpu:
    """The gcloud commands for one TPU, each as a list of arguments."""

    def __init__(self, options: TpuOptions):
        self._options = options
        self._kind = "queued-resources" if options.queued else "tpu-vm"

    def _gcloud(self, kind: str, verb: str, *args: str) -> list[str]:
        where = [f"--{name}={value}" for name in ("zone", "project") if (value := getattr(self._options, name))]
        return ["gcloud", "compute", "tpus", kind, verb, *args, *where]

    def create(self) -> list[str]:
        o = self._options
        family = o.accelerator.partition("-")[0]
        runtime = o.runtime or _RUNTIMES[family]
        rest = [f"--accelerator-type={o.accelerator}", *(f"--{n}" for n in ("spot", "reserved") if getattr(o, n))]
        first = [f"--node-id={o.name}", f"--runtime-version={runtime}"] if o.queued else [f"--version={runtime}"]
        return self._gcloud(self._kind, "create", o.name, *first, *rest)

    def describe(self) -> list[str]:
        return self._gcloud(self._kind, "describe", self._options.name)

    def state(self) -> list[str]:
        return [*self.describe(), f"--format=value({'state.state' if self._options.queued else 'state'})"]

    def setup(self, path: Path) -> list[list[str]]:
        """Copies an archive to all hosts, unpacks and installs it."""
        copy = self._gcloud("tpu-vm", "scp", str(path), f"{self._options.name}:{path.name}", "--worker=all")
        return [copy, self.ssh(f"rm -rf meshwork && tar -xzf {path.name} && {self._options.install}")]

    def mount(self) -> list[list[str]]:
        """Mounts the buckets of `--mount` on all hosts; no commands without it."""
        mounted = mounts.parse(self._options.mount)
        return [self.ssh(mounts.shell_command(mounted))] if mounted else []

    def ssh(self, command: str, worker: str = "all") -> list[str]:
        return self._gcloud("tpu-vm", "ssh", self._options.name, f"--worker={worker}", f"--command={command}")

    def run(self, job: Job) -> list[str]:
        """Runs the job on all hosts; its exit code is that of a host that failed."""
        args = shlex.join([*job.module_command, "--config.distributed.start=always"])
        return self.ssh(f"cd meshwork && set -o pipefail && ~/{_PYTHON} -m {args} 2>&1 | tee -a ~/meshwork.log")

    def stop(self) -> list[str]:
        # Only Python: `run` would return as soon as the shells end, while Python still saves its checkpoint.
        return self.ssh(f'pkill -TERM -f "^$HOME/{_PYTHON} -m " || ! echo "no process to stop on $(hostname)" >&2')

    def delete(self) -> list[str]:
        force = ["--force"] if self._options.queued else []
        return self._gcloud(self._kind, "delete", self._options.name, *force, "--quiet")


def check(options: TpuOptions) -> None:
    """Raises `UserError` for an accelerator whose runtime version is unknown, or an invalid `--mount`."""
    mounts.parse(options.mount)
    family = options.accelerator.partition("-")[0]
    if family.startswith("tpu7") or family == "v7x":
        raise UserError(f"--accelerator={options.accelerator}: not available as a TPU VM; use launch.gke")
    if not options.runtime and family not in _RUNTIMES:
        known = ", ".join(f"{name}-N" for name in _RUNTIMES)
        raise UserError(f"--accelerator={options.accelerator} is not one of {known}; for another one give --runtime")


class GcloudError(UserError):
    """A gcloud command failed; its output has been shown."""


class NameTakenError(GcloudError):
    """A TPU with this name exists already; this program did not create it."""


def call(*commands: list[str]) -> None:
    """Runs commands in order, with their output shown.

    Raises:
      GcloudError: one failed; the rest are not run.
    """
    for command in commands:
        if code := subprocess.run(command).returncode:
            raise GcloudError(_failure(command, code))


def _failure(command: list[str], code: int) -> str:
    return f"{shlex.join(command[:6])} failed with exit code {code}: see its output above"


def create(tpu: Tpu) -> None:
    """Creates the TPU, with gcloud's output shown.

    Raises:
      NameTakenError: a TPU with this name exists.
      GcloudError: it failed for another reason.
    """
    command = tpu.create()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr
    errors, code = "", 0
    try:
        while character := process.stderr.read(1):  # by character: gcloud's progress has no line ends
            errors += character
            sys.stderr.write(character)
            sys.stderr.flush()
        code = process.wait()
    finally:
        process.kill()  # if a signal interrupted the wait
    if code:
        raise (NameTakenError if _ALREADY_EXISTS in errors else GcloudError)(_failure(command, code))


def state(tpu: Tpu) -> str:
    """The TPU's state as gcloud reports it; "" if gcloud fails."""
    done = subprocess.run(tpu.state(), capture_output=True, text=True)
    return NOT_FOUND if done.returncode and NOT_FOUND in done.stderr else done.stdout.strip()
