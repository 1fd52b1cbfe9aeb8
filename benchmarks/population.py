"""Trials per minute on the digits: a sweep that trains trials together, against one process per trial.

python -m benchmarks.population --trials=256 [--alone=4] [further flags of benchmarks.sweep]

Both start with an empty compilation cache; the second and later single trials find what the first one compiled. The
sweep's time includes its report and the final run of the best trial. Of the single trials, only the first few are run,
one after another.
"""

import csv
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import command, output, sweep

ALONE = flags.DEFINE_integer("alone", 4, "number of trials run in separate processes", lower_bound=2)


def seconds(args: list[str], cache: str) -> float:
    """Runs `python ARGS` and returns its wall time."""
    start = time.monotonic()
    command.run(" ".join(args), args, {"MESHWORK_CACHE_DIR": cache})
    return time.monotonic() - start


def row(work: dict[str, Any]) -> dict[str, Any]:
    """Measures one network: trials per minute of the sweep and of single processes.

    Raises:
      SystemExit: their accuracies differ, so they did not do the same work.
    """
    rates = work["rates"]
    with tempfile.TemporaryDirectory() as name:
        together = seconds(sweep.arguments(sweep.OURS, work, Path(name)), f"{name}/cache")
        with Path(name, "sweep/trials.csv").open(encoding="utf-8") as file:
            values = [float(trial["value"]) for trial in csv.DictReader(file)]
    common = ["-m", *sweep.training(work), "--config.dataset.validation_fraction=0.1"]
    alone = []
    with tempfile.TemporaryDirectory() as name:
        for rate, value in zip(rates[: ALONE.value], values):
            workdir = Path(name, str(rate))
            args = [*common, f"--config.optimizer.learning_rate={rate}", f"--workdir={workdir}"]
            alone.append(seconds(args, f"{name}/cache"))
            found = json.loads((workdir / "summary.json").read_bytes())["validation_accuracy"]
            if abs(found - value) > sweep.NEAR:
                raise SystemExit(f"error: {work['network']}, rate {rate}: {found:.3f} alone, {value:.3f} in the sweep")
    per_minute = 60 * len(rates) / together, 60 / float(np.median(alone))
    return {
        "work": work["network"],
        "trials": len(rates),
        "epochs": work["epochs"],
        "batch_size": work["batch_size"],
        "trials_per_minute": round(per_minute[0], 1),
        "alone_trials_per_minute": round(per_minute[1], 2),
        "ratio": round(per_minute[0] / per_minute[1], 1),
    }


def main() -> None:
    out, rows = output.folder(), []
    for work in sweep.works():
        rows.append(row(work))
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    output.write(out, "population", {"device": jax.devices()[0].device_kind, "rows": rows})


if __name__ == "__main__":
    command.start(main)
