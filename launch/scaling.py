"""How far an experiment scales on this machine: step time and efficiency against the number of devices.

python -m launch.scaling experiments.cifar_cnn --devices=1,2 [--mode=weak|strong] [flags of the experiment]

Each device has a process of its own, joined by `jax.distributed`; on a CPU each is pinned to a core. Beside n that
communicate, n run at the same time without, so that what they share (memory, heat) is not taken for the price of
communication: the efficiency is the speed of those over the speed of these. In the mode weak, `batch_size` and
`microbatch_size` are a device's; in the mode strong, those of all together. The two alternate for some rounds; figures
are medians. `scaling.json`, a table and `scaling.png` go to the workdir.
"""

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from launch import job as job_lib
from launch import local
from launch.job import Job
from research import storage
from research.config import option
from research.errors import UserError
from research.plots import scaling as scaling_plot
from research.signals import Signals


@dataclasses.dataclass
class ScalingOptions:
    """What `launch.scaling` can be told."""

    devices: str = option("1,2", "numbers of devices, separated by commas")
    mode: str = option("weak", "what stays the same: a device's share, or the whole batch", choices=("weak", "strong"))
    rounds: int = option(3, "how many times each is run", minimum=1)
    steps_per_dispatch: int = option(8, "train steps per call of the compiled program", minimum=1)
    dry_run: bool = option(False, "print the commands and start nothing")


def counts(text: str) -> list[int]:
    """The numbers of devices that `--devices` lists.

    Raises:
      UserError: it is no list of numbers of 1 or more.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--devices={text}: give numbers of 1 or more, as in 1,2,4")
    return sorted({int(part) for part in parts})


def _command(job: Job, devices: int, *, communicate: bool) -> list[str]:
    """What each of some processes runs."""
    config = job.config
    # What a process of its own has is a device's share.
    factor = devices if job.options.mode == "weak" else 1
    if not communicate:
        factor = factor / devices
    sizes = {"batch_size": config.batch_size, "microbatch_size": config.microbatch_size}
    for name, size in sizes.items():
        if size * factor % 1:
            raise UserError(
                f"--config.{name}={size} cannot be shared by {devices} devices: use a multiple of {devices}"
            )
    changed = [f"--config.{name}={int(size * factor)}" for name, size in sizes.items()]
    dispatch = f"--config.steps_per_dispatch={job.options.steps_per_dispatch}"
    return [sys.executable, "-m", "launch.measure", job.module, *job.args, *changed, dispatch]


def _measured(command: list[str], devices: int, *, communicate: bool) -> list[dict[str, Any]]:
    """What each of some processes that run a command at the same time reports; the first that fails ends them all."""
    processes = _started(command, devices, communicate=communicate)
    with ThreadPoolExecutor(devices) as pool:
        ended = {pool.submit(process.communicate): index for index, process in enumerate(processes)}
        try:
            # As they end: in their order, one that failed would be noticed only when those before it gave up waiting.
            for future in as_completed(ended):
                if processes[ended[future]].returncode:
                    last = (future.result()[1].strip().splitlines() or ["in silence"])[-1]
                    raise UserError(f"process {ended[future]} of {devices} failed: {last}")
        finally:
            for process in processes:
                process.kill()
    return [json.loads(future.result()[0].splitlines()[-1]) for future in ended]


def _started(command: list[str], devices: int, *, communicate: bool) -> list[subprocess.Popen[str]]:
    """Processes that run a command, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    processes = []
    for index, place in enumerate(local.environments(devices, local.free_port())):
        if not communicate:
            place = {"JAX_LOCAL_DEVICE_IDS": str(index)}
        process = subprocess.Popen(
            command,
            env=os.environ | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.sched_setaffinity(process.pid, {cores[index % len(cores)]})
        processes.append(process)
    return processes


def row(together: list[list[dict[str, Any]]], apart: list[list[dict[str, Any]]], mode: str) -> dict[str, Any]:
    """One number of devices: medians over rounds of the reports of those that communicate, and of those that do not."""
    rates = [reports[0]["batch_size"] / max(r["step_seconds"] for r in reports) for reports in together]
    alone = [sum(r["batch_size"] / r["step_seconds"] for r in reports) for reports in apart]
    ratios = [a / b for a, b in zip(rates, alone)]
    slowest = [max(r["step_seconds"] for r in reports) for reports in together]
    collectives = [statistics.mean(r["collective_seconds"] for r in reports) for reports in together]
    return {
        "devices": len(together[0]),
        "mode": mode,
        "batch_size": together[0][0]["batch_size"],
        "step_seconds": statistics.median(slowest),
        "collective_seconds": statistics.median(collectives),
        "examples_per_second": statistics.median(rates),
        "examples_per_second_apart": statistics.median(alone),
        "efficiency": statistics.median(ratios),
        "efficiency_min": min(ratios),
        "efficiency_max": max(ratios),
        "rounds": len(ratios),
    }


def line(found: dict[str, Any]) -> str:
    """One row as Markdown."""
    spread = f"{found['efficiency_min']:.3f} to {found['efficiency_max']:.3f}"
    return (
        f"| {found['devices']} | {found['batch_size']} | {found['step_seconds'] * 1e3:.1f} | "
        f"{found['collective_seconds'] * 1e3:.1f} | {found['examples_per_second']:,.0f} | "
        f"{found['examples_per_second_apart']:,.0f} | {found['efficiency']:.3f} ({spread}) |"
    )


def run(argv: Sequence[str]) -> int:
    """Measures what the command line says.

    Raises:
      UserError: bad input, found before anything is started; a process failed; or a signal ended them all.
    """
    job = job_lib.parse("scaling", str(__doc__), ScalingOptions(), argv)
    job_lib.check_local(job.workdir)
    options, devices = job.options, counts(job.options.devices)
    commands = {
        count: [_command(job, count, communicate=communicate) for communicate in (True, False)] for count in devices
    }
    if options.dry_run:
        print("\n".join(shlex.join(command) for pair in commands.values() for command in pair))
        return 0
    workdir = job_lib.make_folder(job.workdir)
    rows = []
    print("| devices | batch | ms a step | ms in collectives | examples/s | the same apart | efficiency |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with Signals().handled():  # or the processes would outlive this one
        for count, (communicating, concurrent) in commands.items():
            together, apart = [], []
            for _ in range(options.rounds):
                together.append(_measured(communicating, count, communicate=True))
                apart.append(_measured(concurrent, count, communicate=False) if count > 1 else together[-1])
            rows.append(row(together, apart, options.mode))
            print(line(rows[-1]), flush=True)
    storage.replace(workdir / "scaling.json", (json.dumps(rows, indent=2) + "\n").encode())
    scaling_plot(rows).savefig(workdir / "scaling.png", dpi=120)
    print(f"record: {workdir}")
    return 0


if __name__ == "__main__":
    job_lib.main(run)
