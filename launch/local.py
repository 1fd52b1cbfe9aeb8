"""Several processes on this machine as one run, through `jax.distributed`.

python -m launch.local experiments.cifar_cnn --processes=2 [--max_restarts=3] [flags of the experiment]

Each process is given one GPU where there are GPUs, else the CPU. Output is prefixed by the process's number. The first
process that fails ends all of them, and its exit code is the launcher's; with restarts, all begin again at the newest
checkpoint. Ctrl-C, SIGTERM and a terminal that is closed ask for a checkpoint at one agreed step, and then end all.
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

_SECONDS_TO_END = 60.0  # from a wish to stop until a process that has not is killed
_SECONDS_AFTER_A_FAILURE = 5.0


@dataclasses.dataclass
class LocalOptions:
    """What `launch.local` can be told."""

    processes: int = option(2, "processes", minimum=1)
    max_restarts: int = option(0, "times that all are started again where one was lost", minimum=0)
    dry_run: bool = option(False, "print the commands and start nothing")


class _Processes:
    """The processes of one try, and their output.

    Args:
      job: what each runs.
      environments: what each has in its environment beside this one's.
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
        """Sends a signal to those that still run."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def failed(self) -> tuple[int, int] | None:
        """(number, exit code) of a process that failed; one that a signal ended took the others with it."""
        return first_failed([process.poll() for process in self._processes])

    def running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def end(self, seconds: float) -> list[int]:
        """Waits for all, and kills those that are still there after some seconds; returns their numbers."""
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
    """(index, exit code) of the process that failed and took others with it, of those that have failed by now.

    jax ends by SIGABRT what has lost another process.
    """
    failed = [(code == -signal.SIGABRT, code, index) for index, code in enumerate(codes) if code]
    if not failed:
        return None
    _, code, index = min(failed)
    return index, code


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    # In a session of their own, so that a terminal's Ctrl-C reaches the launcher alone.
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
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
    """What tells each process its place (`research.process.distributed`), and its GPU."""
    address = f"127.0.0.1:{port}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
            "JAX_LOCAL_DEVICE_IDS": str(index),  # of the GPUs; the CPU is not counted by it
        }
        for index in range(count)
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run_once(job: Job, asked: list[int]) -> int:
    """Runs all processes to their end; returns the exit code, negative for a signal. `asked` are signals that came."""
    processes = _Processes(job, environments(job.options.processes, free_port()))
    try:
        while not (failed := processes.failed()) and processes.running() and not asked:
            time.sleep(0.1)
        if asked:
            processes.signal(signal.SIGTERM)
            processes.end(_SECONDS_TO_END)
            return 128 + asked[0]
        failed = failed or processes.failed()  # one may have ended between the two questions
        if not failed:
            return 0
        late = processes.end(_SECONDS_AFTER_A_FAILURE)
        number, code = failed
        what = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGABRT and late:  # how jax ends a process when another is silent
            number, what = late[0], "gave no sign of life (stopped, or cut off from the others) and was ended"
        again = "; --max_restarts=1 would start all again at the newest checkpoint"
        cure = "" if job.options.max_restarts or code in job_lib.NON_RETRYABLE_EXIT_CODES else again
        print(f"error: process {number} {what}, and the others with it{cure}", file=sys.stderr)
        return code
    finally:
        processes.end(0)


def run(argv: Sequence[str]) -> int:
    """Runs what the command line says; returns the exit code.

    Raises:
      UserError: bad input, found before a process is started.
    """
    job = job_lib.parse("local", str(__doc__), LocalOptions(), argv)
    options = job.options
    if options.dry_run:
        for environment in environments(options.processes, free_port()):
            print(" ".join(f"{name}={value}" for name, value in environment.items()), shlex.join(job.command))
        return 0
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked.append(received))
    for restart in range(options.max_restarts + 1):
        code = _run_once(job, asked)
        if code == 0 or asked or code in job_lib.NON_RETRYABLE_EXIT_CODES or restart == options.max_restarts:
            break
        print(f"restart {restart + 1} of {options.max_restarts}, from the newest checkpoint", file=sys.stderr)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    job_lib.main(run)
