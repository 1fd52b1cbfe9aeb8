"""Runs per minute: `experiments.cifar_speedrun` with many seeds in one program (`research.training.population`).

python -m benchmarks.seeds [--config=airbench94] [--seeds=20]

All runs train together twice, from different seeds; only the second time, which compiles nothing, is measured. It
includes initialization and an evaluation after every epoch.
"""

import statistics
import time

import jax
from absl import flags

from benchmarks import command, output, trials
from benchmarks.several_seeds import SEEDS
from experiments import cifar_speedrun

CONFIG = flags.DEFINE_enum("config", "airbench94", list(cifar_speedrun.EXPERIMENT.presets), "preset of the speedrun")
DATASET = flags.DEFINE_string("dataset", "cifar10", "data set of images")
flags.set_default(SEEDS, 20)


def main() -> None:
    out, runs = output.folder(), SEEDS.value
    config = cifar_speedrun.EXPERIMENT.presets[CONFIG.value]()
    config.dataset.name = DATASET.value
    members = trials.population(cifar_speedrun.EXPERIMENT, config, runs, test=True)
    for first in (0, runs):
        start = time.monotonic()
        reports = trials.together(members, [{"seed": first + number} for number in range(runs)])
        seconds = time.monotonic() - start
    accuracies = [report.metrics["validation_accuracy"] for report in reports]
    record = {
        "config": CONFIG.value,
        "device": jax.devices()[0].device_kind,
        "runs": runs,
        "accuracy_mean": statistics.mean(accuracies),
        "seconds": seconds,
        "runs_per_minute": 60 * runs / seconds,
    }
    output.write(out, "seeds", record)
    print(" ".join(f"{name}={value}" for name, value in record.items()))


if __name__ == "__main__":
    command.start(main)
