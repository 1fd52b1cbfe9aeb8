"""One process of `launch.scaling`: trains an experiment without a record and prints its speed as JSON.

python -m launch.measure experiments.cifar_cnn --dispatches=6 [flags of the experiment]
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import job as job_lib
from launch.job import Job
from research import app, trace
from research.config import option
from research.process.exit import own_exit_code


@dataclasses.dataclass
class MeasureOptions:
    """The flags of `launch.measure`."""

    dispatches: int = option(
        6, "how many calls of the compiled program to time, after one that is not timed", minimum=1
    )


def training(job: Job) -> Any:
    """Joins the other processes and builds the experiment's training, without starting it."""
    import jax

    from research.training.run import Training

    mesh = app.start(job.config)
    config, dataset, task = app.load(job.experiment, job.config)
    with jax.set_mesh(mesh):
        return Training(config, task, dataset, mesh)


def step_seconds(run: Any, count: int) -> float:
    """Trains for 1 + `count` dispatches; returns the median seconds per step, without the first."""
    seconds, last = [], time.monotonic()
    steps = run.steps_per_dispatch
    for _ in run.dispatches(steps * (count + 1)):
        seconds.append(time.monotonic() - last)
        last = time.monotonic()
    return statistics.median(seconds[1:]) / steps


def collective_seconds(run: Any) -> float:
    """Trains for a dispatch; returns the seconds per step that this process spends in collectives."""
    import jax

    steps = run.steps_per_dispatch
    with tempfile.TemporaryDirectory() as folder:
        trace.start(Path(folder))
        try:
            for _ in run.dispatches(run.progress.step + steps):
                pass
        finally:
            jax.profiler.stop_trace()
        events = trace.read(Path(folder))
    return trace.collective_seconds(events, run.train_program.as_text()) / steps


def measure(job: Job) -> dict[str, Any]:
    """Seconds per step (median over dispatches), of these the seconds in collectives, and the batch size."""
    import jax

    run, count = training(job), job.options.dispatches
    with jax.set_mesh(run.mesh):
        run.compile(train=True)
        return {
            "step_seconds": step_seconds(run, count),
            "collective_seconds": collective_seconds(run),
            "batch_size": run.config.batch_size,
        }


def run(argv: Sequence[str]) -> int:
    """Measures the experiment and prints the result.

    Raises:
      UserError: bad input, or out of memory.
    """
    job = job_lib.parse("measure", str(__doc__), MeasureOptions(), argv)
    with own_exit_code():
        print(json.dumps(measure(job)), flush=True)
    return 0


if __name__ == "__main__":
    job_lib.main(run)
