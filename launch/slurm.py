"""Runs an experiment on a Slurm cluster: writes a batch script, submits it and follows its log.

python -m launch.slurm experiments.cifar_cnn --nodes=2 --gpus_per_node=8 --partition=gpu --time=12:00:00 [its flags]
python -m launch.slurm experiments.cifar_cnn --nodes=2 --dry_run        only prints the script

The script is `job.sh` in the workdir. All nodes must see the workdir, this folder and this Python. One process runs per
GPU, or per node without GPUs. Shortly before the time limit, and when the job is preempted, every process gets SIGTERM
and saves a checkpoint; the job is requeued and resumes from it.
"""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import job as job_lib
from launch.job import Job
from research.config import option
from research.errors import UserError
from research.record import storage

_POLL_SECONDS = 2.0
_FORGOTTEN = "Invalid job id"  # Slurm's error for a job that ended long ago


@dataclasses.dataclass
class SlurmOptions:
    """The flags of `launch.slurm`."""

    nodes: int = option(1, "number of nodes", minimum=1)
    gpus_per_node: int = option(0, "GPUs per node; 0: train on the CPU", minimum=0)
    cpus_per_process: int = option(0, "CPU cores per process; 0: the cluster's default", minimum=0)
    partition: str = option("", "partition; empty: the cluster's default")
    time: str = option("", "time limit, in sbatch's format (12:00:00); empty: the partition's")
    account: str = option("", "account to charge; empty: the user's default")
    seconds_to_stop: int = option(
        120, "how many seconds before the time limit to save a checkpoint and requeue", minimum=1
    )
    follow: bool = option(True, "show the log until the job ends")
    dry_run: bool = option(False, "print the script without submitting it")


def script(job: Job, folder: Path) -> str:
    """The batch script for a job.

    Args:
      job: a job whose options are `SlurmOptions`.
      folder: the working directory.
    """
    options, workdir = job.options, Path(job.workdir).absolute()
    directives = {
        "job-name": job.experiment.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus_per_node or 1,
        "gpus-per-node": options.gpus_per_node or "",
        "cpus-per-task": options.cpus_per_process or "",
        "partition": options.partition,
        "time": options.time,
        "account": options.account,
        "output": f"{str(workdir).replace('%', '%%')}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{options.seconds_to_stop}",
    }
    lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in directives.items() if value != ""]
    return f"""#!/bin/bash
{chr(10).join(lines)}
#SBATCH --requeue
set -uo pipefail
cd {shlex.quote(str(folder))}
# Process 0 runs on the first node, which is this one. The port depends on the job, since jobs may share a node.
export JAX_COORDINATOR_ADDRESS="$(hostname):$((61440 + SLURM_JOB_ID % 4096))"
srun --kill-on-bad-exit=1 {shlex.join(job.command)}
code=$?
# 143: stopped by SIGTERM, with a checkpoint. For a cancelled job, requeue fails.
if [ "$code" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def _submit(path: Path) -> str:
    """Submits a script; returns the job's id."""
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch rejected {path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _state(number: str) -> str:
    """A job's state: "PENDING", "RUNNING" and so on; "" after its end; "unknown (ERROR)" if squeue fails."""
    done = subprocess.run(["squeue", "-h", "-j", number, "-o", "%T"], capture_output=True, text=True)
    if done.returncode and _FORGOTTEN not in done.stderr:
        return f"unknown ({done.stderr.strip()})"
    return done.stdout.strip()


def _exit_code(number: str) -> int | None:
    """The exit code of a job that has ended: 143 if it was cancelled, 1 if Slurm has forgotten it.

    None if scontrol fails, which it may do on a busy cluster.
    """
    done = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True)
    if done.returncode:
        return 1 if _FORGOTTEN in done.stderr else None
    if "JobState=CANCELLED" in done.stdout:
        return 143
    code = re.search(r"ExitCode=(\d+):(\d+)", done.stdout)
    return int(code[1]) or (128 + int(code[2]) if int(code[2]) else 0) if code else 1


def _follow(number: str, log: Path) -> int:
    """Prints the log as it grows, until the job ends; returns its exit code."""
    position, state = 0, ""
    while True:
        now = _state(number)
        if now != state and now:
            print(f"job {number}: {now.lower()}", file=sys.stderr)
        state = now
        if log.exists():
            with log.open("rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        if not state and (code := _exit_code(number)) is not None:
            return code
        time.sleep(_POLL_SECONDS)


def run(argv: Sequence[str]) -> int:
    """Submits the job; returns its exit code, or 0 with --nofollow.

    Raises:
      UserError: bad input, found before anything is written; or sbatch rejected the script.
    """
    job = job_lib.parse("slurm", str(__doc__), SlurmOptions(), argv)
    job_lib.check_local(job.workdir)
    text = script(job, Path.cwd())
    if job.options.dry_run:
        print(text, end="")
        return 0
    if not shutil.which("sbatch"):
        raise UserError("sbatch is not installed on this machine: use a login node, or --dry_run")
    workdir = job_lib.make_folder(job.workdir).absolute()
    path = workdir / "job.sh"
    storage.replace(path, text.encode())
    number = _submit(path)
    log = workdir / f"slurm-{number}.log"
    print(f"job {number}: {path}, log {log}", file=sys.stderr)
    if not job.options.follow:
        return 0
    try:
        return _follow(number, log)
    except KeyboardInterrupt:
        print(f"job {number} keeps running; `scancel {number}` cancels it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    job_lib.main(run)
