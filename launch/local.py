"""Runs an experiment as several processes on this machine, connected by `jax.distributed`.

python -m launch.local experiments.cifar_cnn --processes=2 [--max_restarts=3] [flags of the experiment]

Each process uses one GPU if the machine has GPUs, else the CPU. Output lines are prefixed with the process's index. If
a process fails, all are stopped, and the launcher exits with its code or, with --max_restarts, restarts all of them
from the newest checkpoint. After Ctrl-C, SIGTERM or SIGHUP, and if the launcher is killed, all processes save a
checkpoint at the same step and exit.
"""

import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from launch import job as job_lib
from launch.job import Job
from research.config import option
from research.process import child

_SECONDS_TO_STOP = 60.0  # after a stop signal, until the remaining processes are killed
_SECONDS_AFTER_FAILURE = 5.0  # likewise, after one process has failed


@dataclasses.dataclass
class LocalOptions:
    """The flags of `launch.local`."""

    processes: int = option(2, "number of processes", minimum=1)
    max_restarts: int = option(0, "how many times to restart all processes after one was lost", minimum=0)
    dry_run: bool = option(False, "print the commands without running them")


class _Processes:
    """The processes of one attempt, whose output is copied to this process's.

    Args:
      job: the job that every process runs.
      environments: the environment variables that each process has in addition to this one's.
    """

    def __init__(self, job: Job, environments: Sequence[dict[str, str]]):
        self._processes = [_start(job.command, environment) for environment in environments]
        self._readers = [
            threading.Thread(target=_copy, args=(stream, target, f"[{number}] "), daemon=True)
            for number, process in enumerate(self._processes)
            for stream, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def signal(self, number: int) -> None:
        """Sends a signal to the processes that still run."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def failed(self) -> tuple[int, int] | None:
        """(index, exit code) of the process that failed first, if any has."""
        return first_failed([process.poll() for process in self._processes])

    def running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def end(self, seconds: float) -> list[int]:
        """Waits for all processes, and kills those that still run after some seconds; returns their indices."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.1)
        late = [number for number, process in enumerate(self._processes) if process.poll() is None]
        self.signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        for reader in self._readers:
            reader.join(timeout=5)
        return late


def first_failed(codes: Sequence[int | None]) -> tuple[int, int] | None:
    """(index, exit code) of the process that caused the failure of the others; None if none has failed.

    `jax.distributed` aborts (SIGABRT) the processes that have lost another one, so these are blamed last.
    """
    failed = [(code == -signal.SIGABRT, code, index) for index, code in enumerate(codes) if code]
    if not failed:
        return None
    _, code, index = min(failed)
    return index, code


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    # A new session, so that Ctrl-C reaches only the launcher, which then signals every process once.
    return child.start(
        command,
        os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _copy(stream: IO[bytes], target: IO[str], prefix: str) -> None:
    for line in stream:
        target.write(prefix + line.decode(errors="replace"))
        target.flush()


def environments(count: int, port: int) -> list[dict[str, str]]:
    """The variables that tell each process its index (`research.process.distributed`) and its GPU."""
    address = f"127.0.0.1:{port}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
            "JAX_LOCAL_DEVICE_IDS": str(index),  # of the GPUs; ignored on the CPU
        }
        for index in range(count)
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run_once(job: Job, received: list[int]) -> int:
    """Runs all processes until they end; returns the exit code, negative for a signal.

    Args:
      job: the job.
      received: the stop signals received so far, to which signal handlers append.
    """
    processes = _Processes(job, environments(job.options.processes, free_port()))
    try:
        while not (failed := processes.failed()) and processes.running() and not received:
            time.sleep(0.1)
        if received:
            processes.signal(signal.SIGTERM)
            processes.end(_SECONDS_TO_STOP)
            return 128 + received[0]
        failed = failed or processes.failed()  # it may have failed between the two checks above
        if not failed:
            return 0
        late = processes.end(_SECONDS_AFTER_FAILURE)
        number, code = failed
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGABRT and late:  # jax aborts the others when one stops responding
            number, how = late[0], "gave no sign of life (stopped, or cut off from the others) and was ended"
        could_restart = not job.options.max_restarts and code not in job_lib.NON_RETRYABLE_EXIT_CODES
        advice = "; --max_restarts=1 would restart all from the newest checkpoint" if could_restart else ""
        print(f"error: process {number} {how}, and the others with it{advice}", file=sys.stderr)
        return code
    finally:
        processes.end(0)


def run(argv: Sequence[str]) -> int:
    """Runs the processes; returns the exit code.

    Raises:
      UserError: bad input, found before a process is started.
    """
    job = job_lib.parse("local", str(__doc__), LocalOptions(), argv)
    options = job.options
    if options.dry_run:
        for environment in environments(options.processes, free_port()):
            print(" ".join(f"{name}={value}" for name, value in environment.items()), shlex.join(job.command))
        return 0
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: received.append(number))
    for restart in range(options.max_restarts + 1):
        code = _run_once(job, received)
        if code == 0 or received or code in job_lib.NON_RETRYABLE_EXIT_CODES or restart == options.max_restarts:
            break
        print(f"restart {restart + 1} of {options.max_restarts}, from the newest checkpoint", file=sys.stderr)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    job_lib.main(run)
