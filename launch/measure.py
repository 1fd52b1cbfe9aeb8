"""One process of `launch.scaling`: trains an experiment without a record and prints its speed as JSON.

python -m launch.measure experiments.cifar_cnn --dispatches=6 [flags of the experiment]
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch import job as job_lib
from launch.job import Job
from research import app
from research.config import option
from research.process.exit import own_exit_code

# Names of collectives inserted by the partitioner, then of those in shard_map code.
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "psum", "all_gather")


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


@contextmanager
def _collective_seconds() -> Iterator[list[float]]:
    """A context that profiles this process; afterwards the list holds the seconds of each collective."""
    import jax
    from jax.profiler import ProfileData

    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield seconds
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                seconds += [e.duration_ns / 1e9 for e in line.events if e.name.startswith(_COLLECTIVES)]


def measure(job: Job) -> dict[str, Any]:
    """Seconds per step (median over dispatches), of these the seconds in collectives, and the batch size."""
    import jax

    run = training(job)
    count = job.options.dispatches
    with jax.set_mesh(run.mesh):
        run.compile(train=True)
        steps = run.steps_per_dispatch
        seconds = step_seconds(run, count)
        with _collective_seconds() as collectives:
            for _ in run.dispatches(steps * (count + 2)):
                pass
    return {
        "step_seconds": seconds,
        "collective_seconds": sum(collectives) / steps,
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
