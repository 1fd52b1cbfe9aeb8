"""A run on Cloud TPU VMs, by gcloud: v4, v5e, v5p and v6e, of one host or many.

python -m launch.tpu up experiments.cifar_cnn --name=NAME --zone=ZONE --accelerator=v6e-8 --spot --workdir=gs://B/DIR
python -m launch.tpu create|setup|run|status|logs|stop|delete --name=NAME --zone=ZONE ...

`up` is create, setup and run, again from the newest checkpoint where the TPU is preempted, and delete at the end.
`setup` copies this repository, as git sees it, to every host and installs it; `run` shows what the hosts print, and
keeps it in `runs/tpu/<what>/<date-time>/log.txt`. The workdir must be one that all hosts see: gs://.
"""

import dataclasses
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch import job as job_lib
from launch.job import Job
from research.config import option
from research.errors import UserError

_SECONDS_BETWEEN_LOOKS = 10.0
_NO_RESTART = (0, *job_lib.LASTING, 129, 130, 143)  # done, or an end that another TPU would not change
_THERE = ("READY", "ACTIVE")  # states of a TPU VM, of a queued resource

_RUNTIMES = {  # https://cloud.google.com/tpu/docs/runtimes
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_INSTALL = (  # the hosts' own Python is older than 3.11
    "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python=3.12 meshwork/.venv && "
    "~/.local/bin/uv pip install --quiet --python=meshwork/.venv/bin/python -e 'meshwork[tpu,gcs]'"
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

    def state(self) -> list[str]:
        key = "state.state" if self._options.queued else "state"
        return self._gcloud(self._kind, "describe", self._options.name, f"--format=value({key})")

    def copy(self, path: Path) -> list[str]:
        return self._gcloud("tpu-vm", "scp", str(path), f"{self._options.name}:{path.name}", "--worker=all")

    def ssh(self, command: str, worker: str = "all") -> list[str]:
        return self._gcloud("tpu-vm", "ssh", self._options.name, f"--worker={worker}", f"--command={command}")

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


def _call(command: list[str]) -> None:
    """Runs a command whose failure ends the launch; what it prints is shown."""
    done = subprocess.run(command)
    if done.returncode:
        raise UserError(f"{shlex.join(command[:6])} failed with exit code {done.returncode}: what it said stands above")


def _state(tpu: Tpu) -> str:
    return subprocess.run(tpu.state(), capture_output=True, text=True).stdout.strip()


def _wait(tpu: Tpu) -> None:
    """Returns when the TPU is there."""
    state = ""
    while (now := _state(tpu)) not in _THERE:
        if now in ("FAILED", "SUSPENDED"):
            raise UserError(f"the TPU is {now.lower()}: look at gcloud compute tpus queued-resources describe")
        if now != state:
            print(f"TPU: {(now or 'not there yet').lower()}", file=sys.stderr)
        state = now
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def archive(folder: Path, to: Path) -> None:
    """Packs the files of a git checkout, the changed and new ones too, without what git ignores.

    Raises:
      UserError: the folder is no checkout.
    """
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{folder} is no git checkout, by which `setup` knows what to copy: {done.stderr.strip()}")
    with tarfile.open(to, "w:gz") as tar:
        for name in filter(None, done.stdout.split("\0")):
            if (folder / name).exists():
                tar.add(folder / name, f"meshwork/{name}", recursive=False)


def _setup_commands(tpu: Tpu, options: TpuOptions, path: Path) -> list[list[str]]:
    unpack = f"rm -rf meshwork && tar -xzf {path.name} && {options.install}"
    return [tpu.copy(path), tpu.ssh(unpack)]


def _setup(tpu: Tpu, options: TpuOptions) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "meshwork.tar.gz"
        archive(Path.cwd(), path)
        for command in _setup_commands(tpu, options, path):
            _call(command)


def _run_command(tpu: Tpu, job: Job) -> list[str]:
    args = shlex.join([job.module, *job.args, "--config.distributed.start=always"])
    return tpu.ssh(f"cd meshwork && set -o pipefail && .venv/bin/python -m {args} 2>&1 | tee -a ~/meshwork.log")


def _run(tpu: Tpu, job: Job) -> int:
    """Shows and keeps what all hosts print; returns the exit code."""
    log = Path(f"runs/tpu/{job.experiment.name}/{time.strftime('%Y-%m-%d-%H%M%S')}/log.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(_run_command(tpu, job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout
        for line in process.stdout:
            file.write(line)
            file.flush()
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()
        code = process.wait()
    print(f"log: {log}", file=sys.stderr)
    return code


def _up(tpu: Tpu, job: Job) -> int:
    options = job.options
    code = 1
    try:
        for restart in range(options.max_restarts + 1):
            _call(tpu.create())
            _wait(tpu)
            _setup(tpu, options)
            code = _run(tpu, job)
            if code in _NO_RESTART or _state(tpu) in _THERE:
                break
            print(f"the TPU was preempted: restart {restart + 1} of {options.max_restarts}", file=sys.stderr)
            _call(tpu.delete())
    finally:
        if not options.keep:
            subprocess.run(tpu.delete())
    return code


_EXPERIMENT_VERBS = ("up", "run")
_VERBS = (*_EXPERIMENT_VERBS, "create", "setup", "status", "logs", "stop", "delete")


def _commands(verb: str, tpu: Tpu, options: TpuOptions, job: Job | None) -> list[list[str]]:
    """The gcloud commands of a verb, in order."""
    path = Path("meshwork.tar.gz")
    match verb:
        case "create":
            return [tpu.create()]
        case "setup":
            return _setup_commands(tpu, options, path)
        case "status":
            return [tpu.state()]
        case "logs":
            return [tpu.ssh("tail -n 1000 -f meshwork.log", "0")]
        case "stop":
            return [tpu.ssh("pkill -TERM -f 'python -m experiments[.]'")]
        case "delete":
            return [tpu.delete()]
    assert job
    run = _run_command(tpu, job)
    return [run] if verb == "run" else [tpu.create(), *_setup_commands(tpu, options, path), run, tpu.delete()]


def run(argv: Sequence[str]) -> int:
    """Does what the command line says; returns the exit code.

    Raises:
      UserError: bad input, found before anything is created; or gcloud failed.
    """
    options, job = TpuOptions(), None
    verb = argv[0] if argv else "--help"
    if verb in _EXPERIMENT_VERBS:
        job = job_lib.parse("tpu", str(__doc__), options, argv[1:])
        job_lib.check_remote(job)
    else:
        _, rest = job_lib.parse_options("tpu", str(__doc__), options, argv[verb in _VERBS :])
        if verb not in _VERBS or rest:
            raise UserError(f"unexpected {(rest or argv)[0]!r}: the first argument is one of {', '.join(_VERBS)}")
    check(options)
    tpu = Tpu(options)
    if options.dry_run:
        for command in _commands(verb, tpu, options, job):
            print(shlex.join(command))
        return 0
    if job:
        return _up(tpu, job) if verb == "up" else _run(tpu, job)
    if verb == "setup":
        _setup(tpu, options)
        return 0
    return subprocess.run(_commands(verb, tpu, options, job)[0]).returncode


if __name__ == "__main__":
    job_lib.main(run)
