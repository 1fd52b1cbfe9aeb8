"""Shared by the studies: small data sets, many runs of one config in one program, and runs of a command."""

import copy
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import command
from launch import job as job_lib
from launch import measure
from launch.plans.hlo import Program
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
    """Exits with one line and code 2, before anything is trained, if a data set is not available."""
    try:
        for dataset in datasets:
            sources.load(dataset)
    except UserError as error:
        exit_with(error)


def train(
    experiment: Experiment, config: Config, changes: Sequence[Mapping[str, Any]], *, test: bool = False
) -> list[dict[str, float]]:
    """Trains all runs and returns each one's metrics on held-out examples, {} if it diverged.

    Args:
      experiment: the experiment.
      config: the runs' common config, not resolved.
      changes: each run's changed fields, by path: inputs of the step (`training/hyperparams.py`) or the seed.
      test: whether to evaluate on the test split instead of validation.
    """
    reports = together(population(experiment, config, len(changes), test=test), changes)
    return [{n.removeprefix("validation_"): value for n, value in report.metrics.items()} for report in reports]


def population(experiment: Experiment, config: Config, size: int, *, test: bool = False) -> tuple[Config, Population]:
    """Returns the resolved config and a population of at least `size` slots, evenly over the devices; see `train`."""
    config, dataset, task = app.load(experiment, config)
    if test:
        dataset = dataclasses.replace(dataset, validation=dataset.test)
    return config, Population(config, task, dataset, jax.devices(), size)


def together(runs: tuple[Config, Population], changes: Sequence[Mapping[str, Any]]) -> list[Report]:
    """Trains the runs from start to end; may be called repeatedly."""
    config, members = runs
    for slot, fields in enumerate(changes):
        member = copy.deepcopy(config)
        for path, value in fields.items():
            config_lib.assign(member, path, value)
        members.start(slot, member)
    for _ in range(config.num_epochs):
        reports = members.train_epoch()
    return [reports[slot] for slot in range(len(changes))]


def flops(experiment: str, args: Sequence[str]) -> float:
    """Returns the FLOPs of a compiled train step of a command, every iteration of its loops counted."""
    run = measure.training(job_lib.parse("measure", "", measure.MeasureOptions(), [experiment, *args]))
    with jax.set_mesh(run.mesh):
        run.compile(train=True)
        return Program(run.train_program.as_text()).cost()["flops"]


def summary(experiment: str, args: Sequence[str]) -> dict[str, Any]:
    """Trains in a subprocess and returns its summary.json."""
    with tempfile.TemporaryDirectory() as folder:
        command.run(experiment, ["-m", experiment, *args, f"--workdir={folder}/run"])
        return json.loads(Path(folder, "run/summary.json").read_bytes())


def best(figures: Sequence[Mapping[str, float]]) -> int:
    """Returns the index of the run with the highest accuracy, or the lowest loss if it has no accuracy."""
    values = [run.get("accuracy", -run["loss"]) if run else -math.inf for run in figures]
    return values.index(max(values))
