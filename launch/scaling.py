"""Measures how an experiment scales on this machine: step time and efficiency against the number of devices.

python -m launch.scaling experiments.cifar_cnn --devices=1,2 [--mode=weak|strong] [flags of the experiment]

Each device gets one process, connected by `jax.distributed`; on a CPU each process is pinned to one core. The baseline
is n independent processes that run at the same time: they share memory bandwidth and heat as well, so the efficiency
(speed of n connected processes over speed of n independent ones) shows the cost of communication alone. With
--mode=weak, `batch_size` and `microbatch_size` are per device; with --mode=strong they are global. Both kinds alternate
for several rounds, and the results are medians. The workdir gets `scaling.json` and `scaling.png`.
"""

import dataclasses
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from launch import job as job_lib
from launch import local
from launch.job import Job
from research import plots
from research.config import option
from research.errors import UserError
from research.process import child
from research.process.signals import Signals
from research.record import drawing, storage

_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
_STEPS_PER_DISPATCH = 8  # if the config does not set it


@dataclasses.dataclass
class ScalingOptions:
    """The flags of `launch.scaling`."""

    devices: str = option("1,2", "numbers of devices to measure, separated by commas")
    mode: str = option(
        "weak",
        "what stays constant: the batch per device (weak) or the global batch (strong)",
        choices=("weak", "strong"),
    )
    rounds: int = option(3, "how often to repeat each measurement", minimum=1)
    dry_run: bool = option(False, "print the commands without running them")


def counts(text: str) -> list[int]:
    """Parses `--devices`.

    Raises:
      UserError: it is not a list of positive integers.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--devices={text}: give positive numbers, as in 1,2,4")
    return sorted({int(part) for part in parts})


def _command(job: Job, devices: int, *, communicate: bool) -> list[str]:
    """The command of each of `devices` processes."""
    config = job.config
    # An independent process trains on the share of one device.
    factor = devices if job.options.mode == "weak" else 1
    if not communicate:
        factor = factor / devices
    sizes = {"batch_size": config.batch_size, "microbatch_size": config.microbatch_size}
    for name, size in sizes.items():
        if size * factor % 1:
            raise UserError(
                f"--config.{name}={size} cannot be split over {devices} devices: use a multiple of {devices}"
            )
    changed = [f"--config.{name}={int(size * factor)}" for name, size in sizes.items()]
    changed.append(f"--config.steps_per_dispatch={config.steps_per_dispatch or _STEPS_PER_DISPATCH}")
    if devices == 1 or not communicate:  # a process alone has a mesh of one device
        changed += ["--config.mesh.data=-1", *(f"--config.mesh.{name}=1" for name in ("fsdp", "sequence", "model"))]
    return [sys.executable, "-m", "launch.measure", job.module, *job.args, *changed]


class _ProcessError(UserError):
    """A process failed; this program exits with its code."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.exit_code = code if code > 0 else 128 - code


def _failure(name: str, code: int, stderr: str) -> _ProcessError:
    lines = stderr.strip().splitlines() or ["it printed nothing"]
    errors = [line for line in lines if line.startswith("error: ")]
    if not errors:  # then it is a traceback
        sys.stderr.write(stderr)
    how = "failed" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    return _ProcessError(f"process {name} {how}: {(errors or lines)[-1]}", code)


def _measured(command: list[str], devices: int, *, communicate: bool) -> list[dict[str, Any]]:
    """Runs a command in several processes at once; returns their reports. If one fails, all are killed."""
    processes = _started(command, devices, communicate=communicate)
    with ThreadPoolExecutor(devices) as pool:
        ended = [pool.submit(process.communicate) for process in processes]
        try:
            # In the order in which they end: otherwise a failure would be noticed only after the processes with lower
            # indices had timed out.
            for _ in as_completed(ended):
                if failed := local.first_failed([process.poll() for process in processes]):
                    index, code = failed
                    raise _failure(f"{index} of {devices}", code, ended[index].result()[1])
        finally:
            for process in processes:
                process.kill()
    return [json.loads(future.result()[0].splitlines()[-1]) for future in ended]


def _placements(devices: int, *, communicate: bool) -> list[tuple[dict[str, str], int]]:
    """(additional environment variables, CPU core) of each process."""
    if communicate and devices > 1:
        environments = local.environments(devices, local.free_port())
    else:  # `jax.distributed.initialize`, which would pick the GPU, is not called
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        environments = [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(devices)]
    # Every process must have one device, whatever this one was told.
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if not flag.startswith(_DEVICE_COUNT_FLAG)]
    if kept != flags:
        environments = [{**environment, "XLA_FLAGS": " ".join(kept)} for environment in environments]
    cores = sorted(os.sched_getaffinity(0))
    return [(environment, cores[index % len(cores)]) for index, environment in enumerate(environments)]


def _started(command: list[str], devices: int, *, communicate: bool) -> list[subprocess.Popen[str]]:
    """Starts the processes, each pinned to one core."""
    processes = []
    for environment, core in _placements(devices, communicate=communicate):
        process = child.start(
            command,
            os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        os.sched_setaffinity(process.pid, {core})
        processes.append(process)
    return processes


def _shell(command: list[str], devices: int, *, communicate: bool) -> Iterator[str]:
    """The shell commands for what `_started` runs, one line per process."""
    for environment, core in _placements(devices, communicate=communicate):
        named = [f"{name}={value}" for name, value in environment.items()]
        yield shlex.join(["env", *named, "taskset", "--cpu-list", str(core), *command])


def row(together: list[list[dict[str, Any]]], apart: list[list[dict[str, Any]]], mode: str) -> dict[str, Any]:
    """The result for one number of devices: medians over the rounds of connected and of independent processes."""
    rates = [reports[0]["batch_size"] / max(r["step_seconds"] for r in reports) for reports in together]
    rates_apart = [sum(r["batch_size"] / r["step_seconds"] for r in reports) for reports in apart]
    ratios = [a / b for a, b in zip(rates, rates_apart)]
    slowest = [max(r["step_seconds"] for r in reports) for reports in together]
    collectives = [statistics.mean(r["collective_seconds"] for r in reports) for reports in together]
    return {
        "devices": len(together[0]),
        "mode": mode,
        "batch_size": together[0][0]["batch_size"],
        "step_seconds": statistics.median(slowest),
        "collective_seconds": statistics.median(collectives),
        "examples_per_second": statistics.median(rates),
        "examples_per_second_apart": statistics.median(rates_apart),
        "efficiency": statistics.median(ratios),
        "efficiency_min": min(ratios),
        "efficiency_max": max(ratios),
        "rounds": len(ratios),
    }


def line(row: dict[str, Any]) -> str:
    """One row as Markdown."""
    spread = f"{row['efficiency_min']:.3f} to {row['efficiency_max']:.3f}"
    return (
        f"| {row['devices']} | {row['batch_size']} | {row['step_seconds'] * 1e3:.1f} | "
        f"{row['collective_seconds'] * 1e3:.1f} | {row['examples_per_second']:,.0f} | "
        f"{row['examples_per_second_apart']:,.0f} | {row['efficiency']:.3f} ({spread}) |"
    )


def _print_commands(rounds: int, commands: Mapping[int, Mapping[bool, list[str]]]) -> None:
    for count, kinds in commands.items():
        for communicate, command in kinds.items():
            how = "connected" if communicate else "independent"
            print(f"# {rounds} times, {count} processes at once, {how}:")
            print(*_shell(command, count, communicate=communicate), sep="\n")


def run(argv: Sequence[str]) -> int:
    """Measures all numbers of devices; returns the exit code.

    Raises:
      UserError: bad input, found before anything is started; or a process failed.
      StoppedError: a stop signal was received.
    """
    job = job_lib.parse("scaling", str(__doc__), ScalingOptions(), argv)
    job_lib.check_local(job.workdir)
    options, devices = job.options, counts(job.options.devices)
    if job.config.distributed.start == "never":
        raise UserError("--config.distributed.start=never: the processes must communicate; leave it out")
    commands = {
        # A single process has no one to communicate with: it is its own baseline.
        count: {both: _command(job, count, communicate=both) for both in ((True, False) if count > 1 else (True,))}
        for count in devices
    }
    if options.dry_run:
        _print_commands(options.rounds, commands)
        return 0
    workdir = job_lib.make_folder(job.workdir)
    rows = []
    print("| devices | batch | ms per step | ms in collectives | examples/s | examples/s, independent | efficiency |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with Signals().handled():  # so that a signal kills the processes too
        for count, kinds in commands.items():
            reports = {communicate: [] for communicate in kinds}
            for _ in range(options.rounds):
                for communicate, command in kinds.items():
                    reports[communicate].append(_measured(command, count, communicate=communicate))
            together, apart = reports[True], reports.get(False, reports[True])
            rows.append(row(together, apart, options.mode))
            print(line(rows[-1]), flush=True)
            storage.replace(workdir / "scaling.json", (json.dumps(rows, indent=2) + "\n").encode())
    drawing.save(workdir / "scaling.png", lambda: plots.scaling(rows))
    print(f"record: {workdir}")
    return 0


if __name__ == "__main__":
    job_lib.main(run)
