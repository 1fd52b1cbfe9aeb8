"""Results over several seeds: the flag `--seeds`, the runs, mean and standard deviation."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks import trials

SEEDS = flags.DEFINE_integer("seeds", 5, "number of runs, each with another seed", lower_bound=2)


def measure(experiment: str, args: Sequence[str], metric: str, seeds: int) -> dict[str, Any]:
    """Runs a command with the seeds 1, 2, ...; `args` has neither seed nor workdir.

    Returns:
      "parameters"; "flops" of a training and "seconds" (median) of it; the runs' values of `metric` in summary.json, by
      its name; and their `spread`.
    """
    runs = [trials.summary(experiment, [*args, f"--config.seed={seed}"]) for seed in range(1, seeds + 1)]
    values = [run[metric] for run in runs]
    return {
        "parameters": runs[0]["num_params"],
        "flops": trials.flops(experiment, args) * runs[0]["num_train_steps"],
        "seconds": statistics.median(run["train_seconds"] for run in runs),
        metric: values,
        **spread(values),
    }


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Returns mean and standard deviation of the runs that did not diverge (None), or None if too few are left."""
    finite = [value for value in values if value is not None]
    return {
        "mean": statistics.mean(finite) if finite else None,
        "standard_deviation": statistics.stdev(finite) if len(finite) > 1 else None,
    }


def shown(row: Mapping[str, Any]) -> str:
    """Formats the `spread` of a row for a table."""
    if row["standard_deviation"] is None:
        return "diverged"
    return f"{row['mean']:.4f} ± {row['standard_deviation']:.4f}"
