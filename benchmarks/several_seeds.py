"""Results over several seeds: the flag `--seeds`, mean and standard deviation."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

SEEDS = flags.DEFINE_integer("seeds", 5, "number of runs, each with another seed", lower_bound=2)


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
