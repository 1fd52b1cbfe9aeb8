"""`python -m benchmarks.peers.process PEER FOLDER EPOCHS BEGAN`: runs one peer and prints its report as JSON."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.peers.clock import Clock
from benchmarks.peers.works import Work


def _device() -> str:
    """Returns JAX's device; for CPUs with the vector length, which libraries use to different degrees."""
    import jax  # only in this project's process

    kind, cpu = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    return "cpu with AVX-512" if kind == "cpu" and cpu.exists() and b"avx512f" in cpu.read_bytes() else kind


def main(peer: str, folder: str, epochs: str, began: str) -> None:
    name, _, variant = peer.partition("+")
    work = Work(**json.loads((Path(folder) / "work.json").read_bytes()))
    clock = Clock(float(began))
    module = importlib.import_module(f"benchmarks.peers.{name}_peer")
    run = getattr(module, work.does, module.train)
    with np.load(Path(folder) / "arrays.npz") as arrays:
        run(work, dict(arrays), variant, int(epochs), clock)
    if name == "meshwork":
        clock.device = _device()
    print(json.dumps(clock.report()))


if __name__ == "__main__":
    main(*sys.argv[1:])
