"""Multi-process (multi-host) runs: rendezvous, barriers, a broadcast, and stopping together.

A launcher describes the process by environment variables: JAX_COORDINATOR_ADDRESS (host:port of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID. Within Slurm and Open MPI the last two default to those of the job. Without
JAX_COORDINATOR_ADDRESS this is the only process, unless `--config.distributed.start=always`: then `jax.distributed`
detects the cluster, such as Cloud TPU or GKE.
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
_SHUTDOWN_SECONDS = 10  # how long a process that ends waits for the others to end
_HEARTBEAT_SECONDS = 100  # a process without a heartbeat for this long counts as dead

_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_INDICES = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")


def place(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Returns (coordinator address, number of processes, process index), or None without JAX_COORDINATOR_ADDRESS.

    Raises:
      UserError: a variable is missing or malformed, or the index is out of range.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        return None
    found = [next((environment[n] for n in names if n in environment), "") for names in (_COUNTS, _INDICES)]
    if not all(text.isdecimal() for text in found) or not 0 <= int(found[1]) < int(found[0]):
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address} also needs JAX_NUM_PROCESSES and a JAX_PROCESS_ID below it; they are "
            f"{found[0]!r} and {found[1]!r}"
        )
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: must be host:port")
    return address, int(found[0]), int(found[1])


def join(config: DistributedConfig) -> None:
    """Initializes `jax.distributed`, unless this is the only process. Call it before JAX initializes its devices.

    Raises:
      UserError: a process did not connect within `config.timeout` seconds; the text names those that are missing.
    """
    options: dict[str, Any] = {
        "initialization_timeout": config.timeout,
        "heartbeat_timeout_seconds": min(config.timeout, _HEARTBEAT_SECONDS),
        "shutdown_timeout_seconds": _SHUTDOWN_SECONDS,
    }
    if config.start == "never" or jax.distributed.is_initialized():
        return
    if placement := place(os.environ):
        address, count, index = placement
        if count > 1:
            _rendezvous(address, count, index, config.timeout)
            with _without_proxies():
                jax.distributed.initialize(address, count, index, **options)
    elif config.start == "always":
        try:
            with _without_proxies():
                jax.distributed.initialize(**options)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"--config.distributed.start=always: the other processes were not found ({error}): set "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from None


@contextmanager
def _without_proxies() -> Iterator[None]:
    """Hides the environment's proxies from gRPC, which decides within the block how to reach the coordinator."""
    # Not NO_PROXY=host: the host is not known here if `jax.distributed` detects the cluster.
    names = ("grpc_proxy", "https_proxy", "http_proxy")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def force_exit_code(code: int) -> None:
    """Makes a process that an error ends exit with `code`."""
    # At exit JAX waits for the other processes, and aborts this one (SIGABRT) at the shutdown timeout if some are still
    # running. A daemon thread exits a second before that.
    if jax.distributed.is_initialized():
        timer = threading.Timer(_SHUTDOWN_SECONDS - 1, os._exit, [code])
        timer.daemon = True
        timer.start()


def _rendezvous(address: str, count: int, index: int, timeout: float) -> None:
    """Waits until all processes have started.

    Raises:
      UserError: a process did not connect within `timeout` seconds, or the coordinator's port is taken.
    """
    # `jax.distributed.initialize` does not say which process is missing, so process 0 first counts them itself, on the
    # coordinator's port, which JAX's own service binds afterwards.
    host, _, port = address.rpartition(":")
    deadline = _Deadline(timeout)
    if index:
        while not _check_in(host.strip("[]"), int(port), index, deadline):
            deadline.check(f"process 0 at {address}")
            time.sleep(0.2)
        return
    connections: dict[int, socket.socket] = {}
    with closing(_listen(int(port))) as server:
        while missing := [str(i) for i in range(1, count) if i not in connections]:
            deadline.check(f"process{'es' if len(missing) > 1 else ''} {', '.join(missing)} of {count}")
            try:
                connection = server.accept()[0]
                connection.settimeout(5)
                sender = int(connection.recv(16))
            except (OSError, ValueError):  # nobody connected, or it was not one of our processes
                continue
            connections[sender] = connection
        for connection in connections.values():
            with connection:
                connection.sendall(b"go")


def _listen(port: int) -> socket.socket:
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        text = f"JAX_COORDINATOR_ADDRESS: port {port} is not available ({error.strerror}): choose another"
        raise UserError(text) from None
    server.settimeout(0.5)
    return server


def _check_in(host: str, port: int, index: int, deadline: "_Deadline") -> bool:
    """Sends this process's index to process 0; returns whether process 0 answered that all processes are there."""
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(f"{index}".encode())
            connection.settimeout(deadline.seconds_left())
            return connection.recv(2) == b"go"
    except OSError:
        return False


class _Deadline:
    """A timeout that prints from time to time what the process is waiting for."""

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._start = self._last = time.monotonic()

    def seconds_left(self) -> float:
        return max(self._timeout - (time.monotonic() - self._start), 0.1)

    def check(self, missing: str) -> None:
        """Raises `UserError` once the time is up."""
        now = time.monotonic()
        if now - self._start > self._timeout:
            raise UserError(
                f"{missing} did not connect within {self._timeout:g} s: look in its log, or raise "
                "--config.distributed.timeout"
            )
        if now - self._last > _SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"waiting for {missing}: {now - self._start:.0f} s", file=sys.stderr, flush=True)


def wait(name: str) -> None:
    """A barrier for all processes; `name` must be the same in each."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost  # slow to import

        multihost.sync_global_processes(name)


@contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Runs the block in process 0 first, then in the others, which find on disk what process 0 prepared."""
    if jax.process_index():
        wait(name)
    yield
    if jax.process_index() == 0:
        wait(name)


def from_first(value: float) -> float:
    """Broadcasts process 0's value, as float32, to all processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def in_any_process(value: bool) -> bool:
    """Returns whether `value` is true in any process; all processes call this at the same places."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(value)).any())


def asked_to_stop(call: int) -> bool:
    """Returns whether all processes must stop at this call, because one of them received SIGTERM.

    Args:
      call: 1, 2, 3, ...; all processes call this at the same places. JAX makes them agree on a call that none of them
        has reached yet.
    """
    if jax.process_count() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(call)
