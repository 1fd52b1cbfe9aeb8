"""What comes of several seeds: the flag `--seeds`, and a mean with its standard deviation."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

SEEDS = flags.DEFINE_integer("seeds", 5, "runs that give a mean and a standard deviation", lower_bound=2)


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation of the runs that did not diverge (None); None where too few are left."""
    whole = [value for value in values if value is not None]
    return {
        "mean": statistics.mean(whole) if whole else None,
        "standard_deviation": statistics.stdev(whole) if len(whole) > 1 else None,
    }


def shown(row: Mapping[str, Any]) -> str:
    """The `spread` in a row, as a table has it."""
    if row["standard_deviation"] is None:
        return "diverged"
    return f"{row['mean']:.4f} ± {row['standard_deviation']:.4f}"
