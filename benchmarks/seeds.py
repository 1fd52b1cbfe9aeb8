"""Runs a minute: `experiments.cifar_speedrun` from many seeds in one program (`research.training.population`).

python -m benchmarks.seeds [--config=airbench94] [--seeds=20]

All runs train together twice, from other seeds, and the second time is timed: it compiles nothing. Initialising is
within, and they are evaluated after every epoch, not at their end alone.
"""

import statistics
import time

import jax
from absl import flags

from benchmarks import command, output, trials
from benchmarks.several_seeds import SEEDS
from experiments import cifar_speedrun

CONFIG = flags.DEFINE_enum("config", "airbench94", list(cifar_speedrun.EXPERIMENT.presets), "what is run")
DATASET = flags.DEFINE_string("dataset", "cifar10", "the images")
flags.set_default(SEEDS, 20)


def main() -> None:
    out, runs = output.folder(), SEEDS.value
    config = cifar_speedrun.EXPERIMENT.presets[CONFIG.value]()
    config.dataset.name = DATASET.value
    members = trials.population(cifar_speedrun.EXPERIMENT, config, runs, test=True)
    for first in (0, runs):
        began = time.monotonic()
        reports = trials.together(members, [{"seed": first + number} for number in range(runs)])
        seconds = time.monotonic() - began
    accuracies = [report.figures["validation_accuracy"] for report in reports]
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
