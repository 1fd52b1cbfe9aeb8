"""Several processes as one run: they find each other, go at one pace, and stop together.

A launcher names a process's place by its environment: JAX_COORDINATOR_ADDRESS (host:port of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID; within Slurm and Open MPI the last two are taken from there. Where there is no
such name, or `--config.distributed.start=always`, it is left to `jax.distributed`, which knows Cloud TPU and GKE.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import jax
import numpy as np

from research.config import DistributedConfig
from research.errors import UserError

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_TO_LEAVE = 10  # how long a process that ends waits for the others to end too
_MOST_SECONDS_SILENT = 100  # after which a process is taken for dead

_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_INDICES = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")


def place(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(coordinator address, number of processes, this one's index), or None where the environment names none.

    Raises:
      UserError: it names a part of them, or an impossible index.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        return None
    found = [next((environment[n] for n in names if n in environment), "") for names in (_COUNTS, _INDICES)]
    if not all(text.isdecimal() for text in found) or not 0 <= int(found[1]) < int(found[0]):
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address} needs JAX_NUM_PROCESSES and, below it, JAX_PROCESS_ID; they are "
            f"{found[0]!r} and {found[1]!r}"
        )
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: give host:port")
    return address, int(found[0]), int(found[1])


def join(config: DistributedConfig) -> None:
    """Joins the run's other processes; returns at once where this is the only one. Called before jax has devices.

    Raises:
      UserError: not all came within `config.timeout` seconds; the text names those that are missing.
    """
    options: dict[str, Any] = {
        "initialization_timeout": config.timeout,
        "heartbeat_timeout_seconds": min(config.timeout, _MOST_SECONDS_SILENT),
        "shutdown_timeout_seconds": _SECONDS_TO_LEAVE,
    }
    if config.start == "never" or jax.distributed.is_initialized():
        return
    if named := place(os.environ):
        address, count, index = named
        if count > 1:
            _meet(address, count, index, config.timeout)
            jax.distributed.initialize(address, count, index, **options)
    elif config.start == "always":
        try:
            jax.distributed.initialize(**options)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"--config.distributed.start=always: the other processes were not found ({error}); name them by "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from None


def insist(code: int) -> None:
    """Sees to it that this process, which an error ends, has its exit code: jax aborts one that the others outlast."""
    if jax.distributed.is_initialized():
        last = threading.Timer(_SECONDS_TO_LEAVE - 1, os._exit, [code])
        last.daemon = True
        last.start()


def _meet(address: str, count: int, index: int, timeout: float) -> None:
    """Returns when all processes are there, so that while one is missing the others can say which.

    They meet at the coordinator's own port, before jax's service has it.
    """
    host, _, port = address.rpartition(":")
    waiting = _Waiting(timeout)
    if index:
        while not _came(host.strip("[]"), int(port), index, waiting):
            waiting.tell(f"process 0 at {address}")
            time.sleep(0.2)
        return
    present: dict[int, socket.socket] = {}
    with closing(_listen(int(port))) as server:
        while missing := [str(i) for i in range(1, count) if i not in present]:
            waiting.tell(f"process{'es' if len(missing) > 1 else ''} {', '.join(missing)} of {count}")
            try:
                visitor = server.accept()[0]
                visitor.settimeout(5)
                number = int(visitor.recv(16))
            except (OSError, ValueError):  # nobody came, or somebody else did
                continue
            present[number] = visitor
        for visitor in present.values():
            with visitor:
                visitor.sendall(b"go")


def _listen(port: int) -> socket.socket:
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        text = f"JAX_COORDINATOR_ADDRESS: port {port} cannot be had ({error.strerror}): take another"
        raise UserError(text) from None
    server.settimeout(0.5)
    return server


def _came(host: str, port: int, index: int, waiting: "_Waiting") -> bool:
    """Tells process 0 that this one is there; whether all were, before process 0 or its machine went away."""
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(f"{index}".encode())
            connection.settimeout(waiting.seconds_left())
            return connection.recv(2) == b"go"
    except OSError:
        return False


class _Waiting:
    """Says now and then what is being waited for, and not for ever."""

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._start = self._last = time.monotonic()

    def seconds_left(self) -> float:
        return max(self._timeout - (time.monotonic() - self._start), 0.1)

    def tell(self, what: str) -> None:
        now = time.monotonic()
        if now - self._start > self._timeout:
            raise UserError(
                f"{what} did not come within {self._timeout:g} s: look why, or give a longer "
                "--config.distributed.timeout"
            )
        if now - self._last > _SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"waiting for {what}: {now - self._start:.0f} s", file=sys.stderr, flush=True)


def wait(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost  # slow to import

        multihost.sync_global_processes(name)


@contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """The others enter when process 0 has left: what it prepared on disk is there for them."""
    if jax.process_index():
        wait(name)
    yield
    if jax.process_index() == 0:
        wait(name)


def from_first(value: float) -> float:
    """Process 0's value, in all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def asked_to_stop(call: int) -> bool:
    """Whether all processes stop here, one of them having got SIGTERM.

    Each calls it with 1, 2, 3, ... at the same places. jax spreads the notice, and agrees on a call that none of the
    processes has reached yet.
    """
    if jax.process_count() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(call)
