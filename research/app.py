"""The command of an experiment: flags -> mesh, data, task -> `train_and_evaluate` -> a summary on the terminal."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from research import optimizers, sharding
from research.config import Config, DatasetConfig
from research.data import sources
from research.data.pipeline import epoch_ends
from research.errors import UserError
from research.experiment import Experiment
from research.flags import Command, parse
from research.process import backend, compilation_cache, distributed, jax_settings
from research.process.exit import exit_with, own_exit_code
from research.process.signals import Signals
from research.process.terminal import ignore_output_errors
from research.record import config_json, data_json, trackers
from research.record.workdir import Workdir, read_json
from research.tasks.task import Task
from research.training import describe, early_stopping, evaluation, initialization, loop, profile, summary, weights
from research.training.run import Training

__all__ = ["Experiment", "execute", "load", "load_for", "main", "parse", "restored", "run", "start"]


def run(
    experiment: Experiment, argv: Sequence[str], signals: Signals | None = None, devices: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Runs an experiment's command on `devices` (default: all).

    Returns:
      The contents of summary.json; with --mode=eval, the results; with --describe, {}.

    Raises:
      UserError: invalid input, found before training starts; no folder is left behind.
    """
    return execute(experiment, parse(experiment, argv), signals, devices)[1]


def execute(
    experiment: Experiment, command: Command, signals: Signals | None = None, devices: Sequence[Any] | None = None
) -> tuple[Training, dict[str, Any]]:
    """Like `run`, for a parsed command; also returns the trained or restored run."""
    config, workdir = command.config, command.workdir
    trackers.check(command.trackers, workdir)
    mesh = start(config, devices)
    if signals:
        signals.is_distributed = jax.process_count() > 1
    if jax.process_count() > 1 and "workdir" not in command.given:
        raise UserError("several processes write one record: give all of them the same --workdir")
    if command.mode == "eval":
        return _evaluate(experiment, command, mesh)
    if command.mode == "sample":
        return _sample(experiment, command, mesh)
    if command.earlier is None and (found := _remains(workdir)):
        raise UserError(f"--workdir={workdir} holds {found}, but no config.json: give another --workdir")
    if command.earlier is None and config.init.path:
        weights.check(config.init.path)  # before the data is loaded
    if command.describe:
        return _describe(experiment, command, mesh)
    return _train(experiment, command, mesh, signals)


def _train(
    experiment: Experiment, command: Command, mesh: Any, signals: Signals | None
) -> tuple[Training, dict[str, Any]]:
    """Trains, or evaluates a run that is finished, and prints the summary."""
    workdir = command.workdir
    with Workdir(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        distributed.wait("the first process has claimed the workdir")
        config, dataset, task = load_for(experiment, command)
        _say(_first_line(experiment, dataset, mesh))
        finished = read_json(workdir / "summary.json")
        if finished and not isinstance(finished.get("num_train_steps"), int):
            raise UserError(f"{workdir}/summary.json is not a run's: delete it, or give another --workdir")
        last_step = epoch_ends(dataset.num_examples, config)[-1]
        profiles = [profile.make(command.profile, last_step, workdir)] if command.profile else []
        if finished and (ended := early_stopping.finished(finished, config, last_step)):
            _say(f"the run in {workdir} {ended}" + ("; nothing is profiled" if profiles else ""))
            if jax.process_index() == 0:
                trackers.replay(command.trackers, workdir, experiment.name)
            return _evaluate(experiment, command, mesh)
        if command.reproduces:
            conditions = summary.conditions(dataset) | _hardware(mesh)
            _say(_differences(command.reproduces, conditions))
        arguments = (experiment.name, config, task, dataset, mesh, workdir)
        callbacks = [*(experiment.callbacks(config) if experiment.callbacks else ()), *profiles]
        options = {"signals": signals, "callbacks": callbacks, "trackers": command.trackers}
        training, found = loop.train_and_evaluate(*arguments, **options)
    _say(summary.last_lines(found, workdir))
    if command.reproduces:
        results = {n: v for n, v in found.items() if n.startswith(("train_", "test_")) and n != "train_seconds"}
        _say(_differences(command.reproduces, results))
    return training, found


def _remains(workdir: Path) -> str:
    """Returns the names of a record's files in `workdir`, which are unusable without config.json; empty if none."""
    found = [name for name in ("metrics.jsonl", "summary.json") if (workdir / name).exists()]
    checkpoints = workdir / "checkpoints"
    if checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir()):
        found.append("checkpoints")
    return ", ".join(found)


def start(config: Config, devices: Sequence[Any] | None = None) -> Any:
    """Sets up the process before the data is loaded: compilation cache, other processes, JAX settings, mesh.

    Args:
      config: checked, not yet resolved.
      devices: of the mesh; None: all.

    Returns:
      The mesh.

    Raises:
      UserError: the config contradicts itself or the devices, or a process is missing.
    """
    compilation_cache.enable()
    optimizers.check(config.optimizer)
    initialization.check(config.init)
    distributed.join(config.distributed)
    backend.check()
    jax_settings.pin()
    return sharding.make_mesh(config, devices)


def _say(text: str, file: TextIO | None = None) -> None:
    """Prints the text in the first process."""
    if jax.process_index() == 0:
        print(text, file=file, flush=True)


def load(experiment: Experiment, config: Any) -> tuple[Any, sources.Dataset, Task]:
    """Loads the data and builds the task; returns (resolved config, prepared data set, task).

    Raises:
      UserError: the data set is not available, or does not suit the config or the experiment.
    """
    dataset = experiment.prepare(config, experiment.load_data(config.dataset))
    config = experiment.resolve(config, dataset)
    return config, dataset, experiment.build_task(config, dataset)


@distributed.first_process_first("the data set is on disk")
def load_for(experiment: Experiment, command: Command) -> tuple[Any, sources.Dataset, Task]:
    """Like `load`; if the workdir holds a run, checks config and data against its record and uses its statistics."""
    recorded = data_json.read(command.workdir) if command.earlier else None
    given = data_json.recorded_tokenizer(command.config.dataset, recorded, command.workdir)
    dataset = experiment.prepare(command.config, _load_data(experiment, given, recorded))
    config = experiment.resolve(command.config, dataset)
    if command.earlier:
        _check_config(config, dataset, command)
    if recorded:
        _check_data(dataset, recorded, command)
        dataset.statistics.update(recorded.statistics)
    return config, dataset, experiment.build_task(config, dataset)


def _load_data(experiment: Experiment, config: DatasetConfig, recorded: sources.Dataset | None) -> sources.Dataset:
    """Loads the data set, in the version that the run's record names if that is available."""
    if recorded is None or not _is_recorded(config, recorded):
        return experiment.load_data(config)
    name = recorded.name
    if recorded.version and ":" not in name:
        name = f"{name}:{recorded.version}|{name}"
    return dataclasses.replace(experiment.load_data(dataclasses.replace(config, name=name)), name=recorded.name)


def _is_recorded(config: DatasetConfig, recorded: sources.Dataset) -> bool:
    """Returns whether the config names the run's data set, perhaps among others."""
    return recorded.name in (name.strip() for name in config.name.split("|"))


def _check_config(config: Config, dataset: sources.Dataset, command: Command) -> None:
    assert command.earlier is not None, "`parse` checks this"
    arguments = config, command.earlier, str(command.workdir)
    if command.mode == "train":
        config_json.check_resumes(*arguments, lambda config: epoch_ends(dataset.num_examples, config)[-1])
    else:
        config_json.check_evaluates(*arguments)


def _check_data(dataset: sources.Dataset, recorded: sources.Dataset, command: Command) -> None:
    data_json.check_compatible(dataset, recorded, command.workdir)
    found = data_json.differences(dataset, recorded)
    if found and command.mode == "train":
        raise UserError(
            f"--workdir={command.workdir} holds a run trained on another version of {dataset.name} (fingerprints: "
            f"{found}): set --config.dataset.data_dir to the folder of its data set, or give another --workdir"
        )
    if found:
        _say(
            f"WARNING: this is another version of {dataset.name} than the run in {command.workdir} was trained on "
            f"(fingerprints: {found}): the results are for this version",
            sys.stderr,
        )


def restored(experiment: Experiment, command: Command, mesh: Any, *, with_examples: bool = True) -> Training:
    """Restores the run in the workdir from the checkpoint that the command names.

    Args:
      experiment: of the run.
      command: its mode is "eval" or "sample".
      mesh: the devices.
      with_examples: whether to load the data set; if False, the run's data.json replaces it where possible.

    Raises:
      UserError: the command's config is not that of the run, its data set is not available, or there is no such
        checkpoint.
    """
    recorded = None if with_examples else data_json.read(command.workdir)
    given = command.config.dataset
    if recorded and _is_recorded(given, recorded):
        given = dataclasses.replace(given, name=recorded.name)
    # The data set is also loaded if there is no data.json (earlier versions), or if flags change the data set.
    if recorded is None or command.earlier is None or given != command.earlier.dataset:
        config, dataset, task = load_for(experiment, command)
    else:
        dataset, config = recorded, experiment.resolve(command.config, recorded)
        _check_config(config, dataset, command)
        task = experiment.build_task(config, dataset)
    training = evaluation.restore(config, task, dataset, mesh, command.workdir, command.checkpoint)
    if training.stale_statistics:  # batch statistics of averaged parameters, which need examples
        del training  # or the devices would hold two states
        return restored(experiment, command, mesh)
    return training


def _evaluate(experiment: Experiment, command: Command, mesh: Any) -> tuple[Training, dict[str, Any]]:
    training = restored(experiment, command, mesh)
    step, results = training.progress.step, evaluation.evaluate(training)
    _say(f"{experiment.name} on {training.dataset.name}, step {step:,}: {summary.results_text(results)}")
    return training, {"step": step, **results}


def _sample(experiment: Experiment, command: Command, mesh: Any) -> tuple[Training, dict[str, Any]]:
    if jax.process_count() > 1:
        raise UserError("--mode=sample is for one process: start it without a launcher")
    training = restored(experiment, command, mesh, with_examples=False)
    assert experiment.sample is not None
    experiment.sample(training.predictor(), training.config, training.dataset, command.options, command.workdir)
    return training, {"step": training.progress.step}


def _describe(experiment: Experiment, command: Command, mesh: Any) -> tuple[Training, dict[str, Any]]:
    """Describes the training that this command would start or resume; writes nothing."""
    config, dataset, task = load_for(experiment, command)
    early_stopping.check(config, dataset)
    with jax.set_mesh(mesh):
        training = Training(config, task, dataset, mesh, abstract=True)  # it may not fit
        lines = describe.lines(training)
    _say("\n".join([_first_line(experiment, dataset, mesh), *lines]))
    return training, {}


def _hardware(mesh: Any) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    return {"platform": device.platform, "device_kind": device.device_kind, "device_count": mesh.size}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    parts = [
        f"{name} {before.get(name)} there, {value} here" for name, value in now.items() if before.get(name) != value
    ]
    return "reproduced: " + ("; ".join(parts) if parts else f"the same {', '.join(now)}")


def _first_line(experiment: Experiment, dataset: sources.Dataset, mesh: Any) -> str:
    counts = ", ".join(f"{len(next(iter(split.values()))):,} {name}" for name, split in dataset.splits.items())
    devices = summary.devices_text(mesh.size, mesh.devices.flat[0].platform)
    return f"{experiment.name}: {dataset.name} ({counts}), {devices}"


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> None:
    """The entry point: runs the experiment, and exits with one of the codes in `research.errors`.

    If stdout is closed, it keeps training: the record is complete without it.
    """
    signals = Signals()
    try:
        with own_exit_code(), ignore_output_errors(), signals.handled():
            (experiment.run or run)(experiment, sys.argv[1:] if argv is None else argv, signals)
    except UserError as error:
        exit_with(error)
