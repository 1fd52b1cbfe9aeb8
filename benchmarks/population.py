"""Trials a minute on the digits: a sweep that trains them together beside one process a trial.

python -m benchmarks.population --trials=256 [--alone=4] [further flags of benchmarks.sweep]

Both start from nothing compiled, and a process a trial finds after the first one what that one has compiled. The sweep
is timed from its start to its end, its report and final run of the best trial included; of the trials alone the first
few are run, one after another.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from benchmarks import output
from benchmarks.sweep import BATCH, EPOCHS, MODULES, OURS, TRIALS, WORK, command

ALONE = flags.DEFINE_integer("alone", 4, "trials in processes of their own", lower_bound=2)


def seconds(args: list[str], cache: str) -> float:
    """Of a process of its own.

    Raises:
      SystemExit: it failed.
    """
    start = time.monotonic()
    environment = os.environ | {"MESHWORK_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(args)} failed: {done.stderr.strip().splitlines()[-1]}")
    return time.monotonic() - start


def row(network: str, rates: list[float]) -> dict[str, float | str]:
    """One network: trials a minute of the sweep, and of processes one after another."""
    work = {"network": network, "rates": rates, "epochs": EPOCHS.value, "batch_size": BATCH}
    with tempfile.TemporaryDirectory() as name:
        together = seconds(command(OURS, work, Path(name)), f"{name}/cache")
    flags_ = ["--config.dataset.name=digits", "--config.dataset.validation_fraction=0.1"]
    flags_ += [f"--config.num_epochs={EPOCHS.value}", f"--config.batch_size={BATCH}"]
    with tempfile.TemporaryDirectory() as name:
        alone = [
            seconds(
                ["-m", *MODULES[network], *flags_, f"--config.optimizer.learning_rate={rate}", f"--workdir={name}/{i}"],
                f"{name}/cache",
            )
            for i, rate in enumerate(rates[: ALONE.value])
        ]
    per_minute = 60 * len(rates) / together, 60 / float(np.median(alone))
    return {
        "work": network,
        "trials": len(rates),
        "epochs": EPOCHS.value,
        "batch_size": BATCH,
        "trials_per_minute": round(per_minute[0], 1),
        "alone_trials_per_minute": round(per_minute[1], 2),
        "ratio": round(per_minute[0] / per_minute[1], 1),
    }


def main(_: list[str]) -> None:
    out, rows = output.folder(), []
    rates = np.geomspace(1e-4, 1e-2, TRIALS.value).round(7).tolist()
    for network in WORK.value:
        rows.append(row(network, rates))
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    output.write(out, "population", {"device": jax.devices()[0].device_kind, "rows": rows})


if __name__ == "__main__":
    app.run(main)
