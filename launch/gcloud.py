"""The commands of gcloud by which `launch.tpu` makes, uses and deletes a TPU, and what they say."""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

from launch.job import Job
from research.config import option
from research.errors import UserError

# States of a TPU VM, of a queued resource: https://cloud.google.com/tpu/docs/reference/rest (v2).
THERE = ("READY", "ACTIVE")
GONE = ("PREEMPTED", "TERMINATED", "SUSPENDED")
LOST = (*GONE, "STOPPED")  # which its owner may want to start again
FAILED = "FAILED"
NOT_FOUND = "NOT_FOUND"  # gcloud's error, in the place of a state
_ALREADY_EXISTS = "ALREADY_EXISTS"

_RUNTIMES = {  # https://cloud.google.com/tpu/docs/runtimes
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_PYTHON = "meshwork/.venv/bin/python"  # in the home folder of each host
_INSTALL = (  # the hosts' own Python is older than 3.11
    "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python=3.12 meshwork/.venv && "
    f"~/.local/bin/uv pip install --quiet --python={_PYTHON} -e 'meshwork[tpu,gcs,sweep,postgres]'"
)


@dataclasses.dataclass
class TpuOptions:
    """What `launch.tpu` can be told."""

    workdir: str = option("", "folder of the record that all hosts see, gs://BUCKET/FOLDER; `up` and `run` need it")
    name: str = option("meshwork", "of the TPU")
    zone: str = option("", "zone, as in us-central1-a; empty: gcloud's default")
    project: str = option("", "project; empty: gcloud's default")
    accelerator: str = option("v6e-8", "accelerator type, as in v4-8, v5litepod-16, v5p-8, v6e-256")
    runtime: str = option("", "runtime version; empty: the one for the accelerator")
    queued: bool = option(False, "ask by a queued resource, which waits until there is one")
    spot: bool = option(False, "cheaper, and may be preempted")
    reserved: bool = option(False, "from the project's reservation")
    install: str = option(_INSTALL, "shell command that makes meshwork/.venv on each host")
    max_restarts: int = option(10, "TPUs that `up` creates anew where one was preempted", minimum=0)
    keep: bool = option(False, "`up` leaves the TPU there at its end")
    dry_run: bool = option(False, "print the commands and run none")


class Tpu:
    """The gcloud commands for one TPU; each method is one of them, as a list of arguments."""

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
        """Copies an archive to the hosts, and installs what is in it."""
        copy = self._gcloud("tpu-vm", "scp", str(path), f"{self._options.name}:{path.name}", "--worker=all")
        return [copy, self.ssh(f"rm -rf meshwork && tar -xzf {path.name} && {self._options.install}")]

    def ssh(self, command: str, worker: str = "all") -> list[str]:
        return self._gcloud("tpu-vm", "ssh", self._options.name, f"--worker={worker}", f"--command={command}")

    def run(self, job: Job) -> list[str]:
        """Ends with the exit code of a host that failed."""
        args = shlex.join([*job.module_command, "--config.distributed.start=always"])
        return self.ssh(f"cd meshwork && set -o pipefail && ~/{_PYTHON} -m {args} 2>&1 | tee -a ~/meshwork.log")

    def stop(self) -> list[str]:
        # Not the shells, whose end would be taken for the run's while it still saves its checkpoint.
        return self.ssh(f'pkill -TERM -f "^$HOME/{_PYTHON} -m " || ! echo "nothing runs on $(hostname)" >&2')

    def delete(self) -> list[str]:
        force = ["--force"] if self._options.queued else []
        return self._gcloud(self._kind, "delete", self._options.name, *force, "--quiet")


def check(options: TpuOptions) -> None:
    """Raises `UserError` for an accelerator without a known runtime."""
    family = options.accelerator.partition("-")[0]
    if family.startswith("tpu7") or family == "v7x":
        raise UserError(f"--accelerator={options.accelerator}: the Cloud TPU API does not serve it; use launch.gke")
    if not options.runtime and family not in _RUNTIMES:
        known = ", ".join(f"{name}-N" for name in _RUNTIMES)
        raise UserError(f"--accelerator={options.accelerator} is none of {known}; another needs --runtime")


class GcloudError(UserError):
    """A command failed; what it said has been shown."""


class TakenError(GcloudError):
    """There is a TPU of this name, which this program has not created."""


def call(command: list[str]) -> None:
    """Runs a command whose failure ends the launch; what it prints is shown."""
    if code := subprocess.run(command).returncode:
        raise GcloudError(_failure(command, code))


def _failure(command: list[str], code: int) -> str:
    return f"{shlex.join(command[:6])} failed with exit code {code}: what it said stands above"


def create(tpu: Tpu) -> None:
    """Creates the TPU; what gcloud prints is shown.

    Raises:
      TakenError: there is one of this name.
      GcloudError: it failed otherwise.
    """
    command = tpu.create()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr
    said, code = "", 0
    try:
        while character := process.stderr.read(1):  # what goes on has no end of line yet
            said += character
            sys.stderr.write(character)
            sys.stderr.flush()
        code = process.wait()
    finally:
        process.kill()  # where a signal came
    if code:
        raise (TakenError if _ALREADY_EXISTS in said else GcloudError)(_failure(command, code))


def state(tpu: Tpu) -> str:
    """As gcloud has it; empty where gcloud cannot say."""
    done = subprocess.run(tpu.state(), capture_output=True, text=True)
    return NOT_FOUND if done.returncode and NOT_FOUND in done.stderr else done.stdout.strip()
