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
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from launch import job as job_lib
from launch import local
from launch.job import Job
from research.config import option
from research.errors import UserError
from research.plots import scaling as scaling_plot
from research.process.signals import Signals
from research.record import storage

_MORE_DEVICES = "--xla_force_host_platform_device_count"
_STEPS_PER_DISPATCH = 8  # where the config leaves it open


@dataclasses.dataclass
class ScalingOptions:
    """What `launch.scaling` can be told."""

    devices: str = option("1,2", "numbers of devices, separated by commas")
    mode: str = option("weak", "what stays the same: a device's share, or the whole batch", choices=("weak", "strong"))
    rounds: int = option(3, "how many times each is run", minimum=1)
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
    changed.append(f"--config.steps_per_dispatch={config.steps_per_dispatch or _STEPS_PER_DISPATCH}")
    if devices == 1 or not communicate:  # each has one device, however the mesh of all is split
        changed += ["--config.mesh.data=-1", *(f"--config.mesh.{name}=1" for name in ("fsdp", "sequence", "model"))]
    return [sys.executable, "-m", "launch.measure", job.module, *job.args, *changed]


class _ProcessError(UserError):
    """A process failed; the exit code is its own."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.exit_code = code if code > 0 else 128 - code


def _failure(name: str, code: int, errors: str) -> _ProcessError:
    lines = errors.strip().splitlines() or ["in silence"]
    said = [line for line in lines if line.startswith("error: ")]
    if not said:  # a traceback, then
        sys.stderr.write(errors)
    what = "failed" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    return _ProcessError(f"process {name} {what}: {(said or lines)[-1]}", code)


def _measured(command: list[str], devices: int, *, communicate: bool) -> list[dict[str, Any]]:
    """What each of some processes that run a command at the same time reports; the first that fails ends them all."""
    processes = _started(command, devices, communicate=communicate)
    with ThreadPoolExecutor(devices) as pool:
        ended = [pool.submit(process.communicate) for process in processes]
        try:
            # As they end: in their order, one that failed would be noticed only when those before it gave up waiting.
            for _ in as_completed(ended):
                if failed := local.first_failed([process.poll() for process in processes]):
                    index, code = failed
                    raise _failure(f"{index} of {devices}", code, ended[index].result()[1])
        finally:
            for process in processes:
                process.kill()
    return [json.loads(future.result()[0].splitlines()[-1]) for future in ended]


def _places(devices: int, *, communicate: bool) -> list[tuple[dict[str, str], int]]:
    """What each process has in its environment beside this one's, and its core."""
    if communicate and devices > 1:
        environments = local.environments(devices, local.free_port())
    else:  # none calls `jax.distributed.initialize`, which would choose the GPU
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        environments = [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(devices)]
    flags = os.environ.get("XLA_FLAGS", "").split()
    of_one = [flag for flag in flags if not flag.startswith(_MORE_DEVICES)]
    if of_one != flags:
        environments = [{**environment, "XLA_FLAGS": " ".join(of_one)} for environment in environments]
    cores = sorted(os.sched_getaffinity(0))
    return [(environment, cores[index % len(cores)]) for index, environment in enumerate(environments)]


def _started(command: list[str], devices: int, *, communicate: bool) -> list[subprocess.Popen[str]]:
    """Processes that run a command, each on a core of its own."""
    processes = []
    for environment, core in _places(devices, communicate=communicate):
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        os.sched_setaffinity(process.pid, {core})
        processes.append(process)
    return processes


def _shell(command: list[str], devices: int, *, communicate: bool) -> Iterator[str]:
    """What `_started` starts, a line each."""
    for environment, core in _places(devices, communicate=communicate):
        named = [f"{name}={value}" for name, value in environment.items()]
        yield shlex.join(["env", *named, "taskset", "--cpu-list", str(core), *command])


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
    if job.config.distributed.start == "never":
        raise UserError("--config.distributed.start=never: the processes are to communicate; leave it out")
    commands = {
        # One has nobody to communicate with.
        count: {both: _command(job, count, communicate=both) for both in ((True, False) if count > 1 else (True,))}
        for count in devices
    }
    if options.dry_run:
        for count, kinds in commands.items():
            for communicate, command in kinds.items():
                how = "together" if communicate else "apart"
                print(f"# {options.rounds} times, {count} at once, {how}:")
                print(*_shell(command, count, communicate=communicate), sep="\n")
        return 0
    workdir = job_lib.make_folder(job.workdir)
    rows = []
    print("| devices | batch | ms a step | ms in collectives | examples/s | the same apart | efficiency |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with Signals().handled():  # or the processes would outlive this one
        for count, kinds in commands.items():
            reports = {communicate: [] for communicate in kinds}
            for _ in range(options.rounds):
                for communicate, command in kinds.items():
                    reports[communicate].append(_measured(command, count, communicate=communicate))
            together, apart = reports[True], reports.get(False, reports[True])
            rows.append(row(together, apart, options.mode))
            print(line(rows[-1]), flush=True)
            storage.replace(workdir / "scaling.json", (json.dumps(rows, indent=2) + "\n").encode())
    scaling_plot(rows).savefig(workdir / "scaling.png", dpi=120)
    print(f"record: {workdir}")
    return 0


if __name__ == "__main__":
    job_lib.main(run)
