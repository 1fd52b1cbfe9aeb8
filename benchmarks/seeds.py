"""Runs a minute: `experiments.cifar_speedrun` from many seeds in one program (`research.population`).

python -m benchmarks.seeds [--config=airbench94] [--runs=20]

All runs train together twice, from other seeds, and the second time is timed: it compiles nothing. They are evaluated
after every epoch, not at their end alone.
"""

import copy
import dataclasses
import statistics
import time

import jax
from absl import app, flags

from benchmarks import output
from experiments import cifar_speedrun
from research import app as app_lib
from research import optimizers
from research.population import Population

CONFIG = flags.DEFINE_enum("config", "airbench94", list(cifar_speedrun.EXPERIMENT.presets), "what is run")
DATASET = flags.DEFINE_string("dataset", "cifar10", "the images")
RUNS = flags.DEFINE_integer("runs", 20, "seeds", lower_bound=2)


def main(_: list[str]) -> None:
    out = output.folder()
    config = cifar_speedrun.EXPERIMENT.presets[CONFIG.value]()
    config.dataset.name = DATASET.value
    optimizers.resolve(config.optimizer)
    dataset, task = app_lib.load(cifar_speedrun.EXPERIMENT, config)
    dataset = dataclasses.replace(dataset, validation=dataset.test)
    population = Population(config, task, dataset, jax.devices(), RUNS.value)
    for first in (0, RUNS.value):
        for slot in range(RUNS.value):
            member = copy.deepcopy(config)
            member.seed = first + slot
            population.start(slot, member)
        began = time.monotonic()
        reports = [population.train_epoch() for _ in range(config.num_epochs)][-1]
        seconds = time.monotonic() - began
    accuracies = [report.figures["validation_accuracy"] for report in reports.values()]
    record = {
        "config": CONFIG.value,
        "device": jax.devices()[0].device_kind,
        "runs": RUNS.value,
        "accuracy_mean": statistics.mean(accuracies),
        "seconds": seconds,
        "runs_per_minute": 60 * RUNS.value / seconds,
    }
    output.write(out, "seeds", record)
    print(" ".join(f"{name}={value}" for name, value in record.items()))


if __name__ == "__main__":
    app.run(main)
