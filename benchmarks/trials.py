"""Many runs of one config in one program, for the studies."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from research import app, optimizers
from research import config as config_lib
from research.command import Experiment
from research.config import Config
from research.population import Population

SEEDS = flags.DEFINE_integer("seeds", 5, "runs that give a mean and a standard deviation", lower_bound=2)


def train(
    experiment: Experiment, config: Config, changes: Sequence[Mapping[str, Any]], *, test: bool = False
) -> list[dict[str, float]]:
    """Trains every run to its end; returns the figures of each on held-out examples, {} where it diverged.

    Args:
      experiment: what is run.
      config: what the runs have in common; not resolved.
      changes: the fields of each run that differ, by path; inputs of the step (`research.hyperparams`) or the seed.
      test: whether figures are those of the test split, not of validation.
    """
    config = copy.deepcopy(config)
    optimizers.resolve(config.optimizer)
    dataset, task = app.load(experiment, config)
    if test:
        dataset = dataclasses.replace(dataset, validation=dataset.test)
    size = -(-len(changes) // jax.device_count()) * jax.device_count()
    population = Population(config, task, dataset, jax.devices(), size)
    for slot, fields in enumerate(changes):
        member = copy.deepcopy(config)
        for path, value in fields.items():
            config_lib.assign(member, path, value)
        population.start(slot, member)
    for _ in range(config.num_epochs):
        reports = population.train_epoch()
    found = [reports[slot].figures for slot in range(len(changes))]
    return [{name.removeprefix("validation_"): value for name, value in figures.items()} for figures in found]


def best(figures: Sequence[Mapping[str, float]]) -> int:
    """The number of the run with the highest accuracy, or else the least loss."""
    values = [run.get("accuracy", -run["loss"]) if run else -math.inf for run in figures]
    return values.index(max(values))
