"""Sweep workers as processes on this machine, each with its own CPU cores and GPU."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from research.errors import UserError
from research.process import child

_GPUS = Path("/proc/driver/nvidia/gpus")
_POLL_SECONDS = 1.0


def run(count: int, argv: Sequence[str], show: Callable[[], None]) -> None:
    """Starts workers that join the study, and waits until all have ended.

    Args:
      count: the number of workers.
      argv: the arguments of `launch.sweep`.
      show: called every second, to update the display.

    Raises:
      UserError: all workers failed.
    """
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "launch.sweep", *argv, "--processes=0"]
    processes = []
    for index in range(count):
        inherited = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_PREALLOCATE"}
        environment = inherited | one_gpu(index, os.environ)
        process = child.start(command, environment, stdout=subprocess.DEVNULL, start_new_session=True)
        # Small networks cannot use several cores, so each worker is pinned to its share.
        os.sched_setaffinity(process.pid, set(cores[index % len(cores) :: count]) or set(cores))
        processes.append(process)
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(_POLL_SECONDS)
            show()
    except BaseException:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
        raise
    failed = [process.returncode for process in processes if process.returncode > 0]
    if len(failed) == count:
        raise UserError(f"all workers failed, the first with exit code {failed[0]}; their errors are above")


def gpu_of_worker(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that give a worker its GPU, to be set before jax is imported.

    The processes of a run get theirs from `jax.distributed.initialize` (`research.process.distributed`), which workers
    do not call.
    """
    index = environment.get("JAX_LOCAL_DEVICE_IDS")
    if index is None and "JAX_COORDINATOR_ADDRESS" in environment:  # launch.slurm starts one task for each GPU
        index = environment.get("SLURM_LOCALID")
    return one_gpu(int(index), environment) if index and index.isdecimal() else {}


def one_gpu(index: int, environment: Mapping[str, str]) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for GPU `index`, modulo the number of GPUs; {} if there is at most one GPU."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        gpus = [gpu for gpu in named.split(",") if gpu]
    else:
        gpus = [str(number) for number in range(len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0)]
    return {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if len(gpus) > 1 else {}
