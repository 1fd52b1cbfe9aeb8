"""What the studies share: their small data, and many runs of one config in one program."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from research import app
from research import config as config_lib
from research.config import Config, DatasetConfig
from research.data import sources
from research.errors import UserError
from research.experiment import Experiment
from research.process.exit import exit_with
from research.training.population import Population, Report

DIGITS = DatasetConfig(name="digits", validation_fraction=0.1)
TEXT = DatasetConfig(name="pydoc", train_fraction=0.25)


def check_data(datasets: Iterable[DatasetConfig]) -> None:
    """Ends the process with one line, and exit code 2, where one of them cannot be had: before anything is trained."""
    try:
        for dataset in datasets:
            sources.load(dataset)
    except UserError as error:
        exit_with(error)


def train(
    experiment: Experiment, config: Config, changes: Sequence[Mapping[str, Any]], *, test: bool = False
) -> list[dict[str, float]]:
    """Trains every run to its end; returns the figures of each on held-out examples, {} where it diverged.

    Args:
      experiment: what is run.
      config: what the runs have in common; not resolved.
      changes: the fields of each run that differ, by path; inputs of the step (`training/hyperparams.py`) or the seed.
      test: whether figures are those of the test split, not of validation.
    """
    reports = together(population(experiment, config, len(changes), test=test), changes)
    return [{n.removeprefix("validation_"): value for n, value in report.figures.items()} for report in reports]


def population(experiment: Experiment, config: Config, size: int, *, test: bool = False) -> tuple[Config, Population]:
    """Slots for so many runs or more, evenly over the devices; with the config resolved. Arguments as of `train`."""
    config, dataset, task = app.load(experiment, config)
    if test:
        dataset = dataclasses.replace(dataset, validation=dataset.test)
    return config, Population(config, task, dataset, jax.devices(), size)


def together(of: tuple[Config, Population], changes: Sequence[Mapping[str, Any]]) -> list[Report]:
    """Trains the runs from their start to their end; may be called again."""
    config, members = of
    for slot, fields in enumerate(changes):
        member = copy.deepcopy(config)
        for path, value in fields.items():
            config_lib.assign(member, path, value)
        members.start(slot, member)
    for _ in range(config.num_epochs):
        reports = members.train_epoch()
    return [reports[slot] for slot in range(len(changes))]


def best(figures: Sequence[Mapping[str, float]]) -> int:
    """The number of the run with the highest accuracy, or else the least loss."""
    values = [run.get("accuracy", -run["loss"]) if run else -math.inf for run in figures]
    return values.index(max(values))
