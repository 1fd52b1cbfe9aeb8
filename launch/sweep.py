"""Sweeps hyperparameters: many trials in one program, on any number of machines.

python -m launch.sweep experiments.cifar_cnn --trials=64 --search='optimizer.learning_rate=log(1e-4,1)' \\
    --search='optimizer.name=[sgd,momentum,adagrad,adam]' --search='model.width=int(16,64,step=16)'

--search=FIELD=RANGE varies a field of the experiment's Config: log(low,high), float(low,high), int(low,high,step=n) or
[a,b,c]. A Python file with `def search(trial)` may choose them instead. Trials are ranked on a validation split. At the
end the best trial's command is printed and run, which evaluates the test split. The same command resumes a sweep that
was stopped. With --config.mesh, as in --config.mesh.fsdp=4, each trial trains over several devices. More workers, on
any machine that can reach the --storage, join with the same command and --processes=0, or by `python -m launch.slurm
launch.sweep experiments.cifar_cnn ...` (or another launcher). The record in --workdir: sweep.json, trials.csv,
sweep.html, journal.log, and the run of the best trial.
"""

import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import job as job_lib
from launch.job import Job
from launch.sweeps import options as sweep_options
from launch.sweeps.options import SweepOptions
from research.config import MeshConfig
from research.errors import RecordError, UserError, brief
from research.process.signals import Signals, StoppedError
from research.process.terminal import ignore_output_errors

if TYPE_CHECKING:
    from launch.sweeps.search_space import SearchSpace
    from launch.sweeps.trials import Study
    from launch.sweeps.worker import Sweep

_DEFAULT_TRIALS = 50
_VALIDATION_FRACTION = 0.1  # of the training set, if the data set has no validation split
_POLL_SECONDS = 1.0


def run(argv: Sequence[str]) -> int:
    """Runs the sweep that the command line describes; returns the exit code.

    Raises:
      UserError: bad input, found before the first trial; no trial completed; or ten in a row failed.
      StoppedError: a stop signal was received; the same command resumes.
      RecordError: the storage became unreachable, is full or was overwritten.
    """
    options = SweepOptions()
    job = job_lib.parse("sweep", str(__doc__), options, argv)
    for package in ("optuna", "plotly", "cmaes"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'sweeps need {package}: pip install -e ".[sweep]"')
    sweep_options.check_place(job.workdir, options)
    signals = Signals()
    from optuna.exceptions import StorageInternalError

    try:
        with ignore_output_errors(), signals.handled():
            return _run(job, argv, signals)
    except (OSError, StorageInternalError, json.JSONDecodeError) as error:
        why = brief(error.__cause__ or error)
        raise RecordError(
            f"the study or the record cannot be read or written: {why}; once that is fixed, the same command with "
            f"--workdir={job.workdir} resumes"
        ) from None


def _run(job: Job, argv: Sequence[str], signals: Signals) -> int:
    options, workdir = job.options, Path(job.workdir)
    from launch.sweeps import best
    from launch.sweeps.report import summary
    from launch.sweeps.trials import Study, open_storage
    from research.training.summary import devices_text

    sweep, points = _sweep(job)
    name, identity = options.study or job.experiment.name, _identity(job, sweep)
    command = [job.module, *job.args]
    if options.processes:
        best.check_folder(workdir, name, identity)
    direction = "maximize" if sweep.maximizes else "minimize"
    storage = open_storage(options.storage, workdir)
    study = Study(storage, name, direction, identity, options.sampler, options.pruner, job.config.seed)
    if study.complete(sweep.trials):
        print(f"the sweep in {workdir} is finished: give a larger --trials to continue it")
        if options.processes and not best.is_recorded(workdir, options.fit):
            job_lib.make_folder(job.workdir)
            best.finish(workdir, command, options.fit, sweep, study, signals)
        return 0
    if options.processes:
        job_lib.make_folder(job.workdir)
    study.plan(sweep.trials, points)
    devices = devices_text(len(sweep.devices), sweep.devices[0].platform)
    print(f"{name}: {sweep.trials} trials of {sweep.metric}, {_at_once(sweep)} on {devices}", flush=True)
    _train(job, argv, sweep, study, signals)
    if options.processes:
        best.finish(workdir, command, options.fit, sweep, study, signals)
    else:
        print(
            f"no trial is left: {summary(study, sweep)['num_trials']} ended; the record is written by the command "
            "without --processes=0"
        )
    return 0


def _train(job: Job, argv: Sequence[str], sweep: "Sweep", study: "Study", signals: Signals) -> None:
    """Trains until no trial is left, here and in other workers; shows the progress."""
    from launch.sweeps import processes, report

    count, workdir = job.options.processes, Path(job.workdir)
    with report.Display(study, sweep).shown() as display:
        try:
            if count > 1:
                processes.run(count, [*argv, f"--workdir={workdir}"], display.update)
            _work(sweep, study, signals, display)
            # The trials of another worker come back to this one if that worker is lost.
            while count and study.others_run():
                time.sleep(_POLL_SECONDS)
                display.update()
                _work(sweep, study, signals, display)
        except StoppedError as error:
            if count:
                raise StoppedError(f"{error} with --workdir={workdir}", error.exit_code - 128) from None
            raise
        except UserError:
            if count:
                report.write(workdir, study, sweep, {})
            raise


def _work(sweep: "Sweep", study: "Study", signals: Signals, display: Any) -> None:
    from launch.sweeps.worker import Worker

    with study.alive():
        Worker(sweep, study, signals, display.update).run()
    display.update()


def _at_once(sweep: "Sweep") -> str:
    if sweep.devices_per_run == 1:
        return f"{sweep.size} runs at a time"
    count = len(sweep.devices) // sweep.devices_per_run
    return f"{count} run{'s' if count > 1 else ''} at a time, each over {sweep.devices_per_run} devices,"


def _sweep(job: Job) -> tuple["Sweep", list[dict[str, Any]]]:
    """Builds and checks the sweep; returns it and the points of its grid ([] without one).

    Raises:
      UserError: the options contradict each other, the config or the data set.
    """
    options = job.options
    space, points = _space(job)
    split = _set_devices(options, job.config.mesh)
    from launch.sweeps.worker import Sweep, load

    place = _place(options, job.config.mesh, split)
    dataset = job.experiment.load_data(job.config.dataset)
    fraction = job.config.dataset.validation_fraction if dataset.validation else _VALIDATION_FRACTION
    found = dataclasses.replace(job.config.dataset, name=dataset.name, validation_fraction=fraction)
    config = dataclasses.replace(job.config, dataset=found)
    dataset = job.experiment.prepare(config, load(job.experiment, config.dataset))
    resolved = job.experiment.resolve(config, dataset)
    trials = len(points) or options.trials or _DEFAULT_TRIALS
    sweep = Sweep(job.experiment, config, space, "", trials, options.seeds, **place)
    population = sweep.population(resolved, job.experiment.build_task(resolved, dataset), dataset, 1)
    metric = _metric(options.metric, population.metric_names(), job.experiment.name)
    return dataclasses.replace(sweep, metric=metric), points


def _place(options: Any, mesh: MeshConfig, split: bool) -> dict[str, Any]:
    """Returns the fields of `Sweep` that say where its runs train, and how many at a time.

    Args:
      options: the sweep's.
      mesh: of each run.
      split: whether each CPU core is a device.

    Raises:
      UserError: the mesh does not divide the devices, or does not fit on them as often as `options.population`.
    """
    import jax

    from research.training.population_devices import default_size, devices_per_member

    devices = jax.local_devices()  # not jax.devices(): it includes those of other hosts
    count = devices_per_member(mesh, len(devices))
    if count == 1:
        devices = devices[: options.population or None]
        one_device = mesh != MeshConfig() or (split and devices[0].platform == "cpu")
        size, single_run_devices = max(default_size(devices), options.seeds), devices[:1] if one_device else None
        size = options.population or size
    else:
        most = len(devices) // count
        if options.population > most:
            raise UserError(
                f"--population={options.population}: the {len(devices)} devices here suffice for {most} at a time, "
                f"each over {count}; give at most --population={most}"
            )
        devices = devices[: (options.population or most) * count]
        size, single_run_devices = max(len(devices) // count, options.seeds), devices[:count]
    return {
        "size": size,
        "devices": devices,
        "single_run_devices": single_run_devices,
        "devices_per_run": count,
    }


def _space(job: Job) -> tuple["SearchSpace", list[dict[str, Any]]]:
    """Returns the search space, and the points of its grid ([] without one)."""
    options = job.options
    space = sweep_options.check_search(job.experiment, options, job.config)
    if options.fit and not space.function:
        from launch.sweeps import fit

        fit.check(options.fit, space.distributions, options.seeds)
    grid = options.sampler == "grid" or not options.search
    points = space.grid() if grid else []
    if grid and options.trials not in (0, len(points)):
        raise UserError(f"--trials={options.trials}: the grid has {len(points)} points; leave --trials out")
    return space, points


def _set_devices(options: Any, mesh: MeshConfig) -> bool:
    """Sets which devices JAX sees, before it starts; returns whether each CPU core is a device.

    For a sweep over a mesh, they are those of a single run.
    """
    from launch.sweeps import processes

    os.environ.update(processes.gpu_of_worker(os.environ))
    if options.processes > 1:  # leaves the accelerators' memory to the workers
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    from research.process import backend, compilation_cache, jax_settings
    from research.training.population_devices import split_cpu

    compilation_cache.enable()
    split = mesh == MeshConfig() and split_cpu(options.population)
    backend.check()
    jax_settings.pin()
    return split


def _metric(given: str, names: list[str], experiment: str) -> str:
    metric = given or ("validation_accuracy" if "validation_accuracy" in names else "validation_loss")
    if metric not in names:
        raise UserError(f"--metric={metric}: {experiment} only has {', '.join(names)}; use validation_loss")
    return metric


def _identity(job: Job, sweep: "Sweep") -> dict[str, Any]:
    """The settings that all workers of a study must share, as JSON values; all others may differ between them."""
    config = dataclasses.asdict(sweep.config)
    del config["dataset"]["data_dir"], config["distributed"]
    identity = {
        "experiment": job.module,
        "config": config,
        "search": list(sweep.space.text),
        "metric": sweep.metric,
        "seeds": sweep.seeds,
        "grid": job.options.sampler == "grid",
    }
    return json.loads(json.dumps(identity))


if __name__ == "__main__":
    job_lib.main(run)
