"""Sweeps hyperparameters: many trials in one program, on any number of machines.

python -m launch.sweep experiments.cifar_cnn --trials=64 --search='optimizer.learning_rate=log(1e-4,1)' \\
    --search='optimizer.name=[sgd,momentum,adagrad,adam]' --search='model.width=int(16,64,step=16)'

Any field of the experiment's Config is varied by --search=FIELD=log(low,high), float(low,high), int(low,high,step=n) or
[a,b,c], or by a Python file with `def search(trial)`. Trials are judged on a validation split; the best one's command
is printed, and run, which gives its test figures. The same command again goes on with a sweep that was stopped; more
workers, on any machine that reaches the --storage, join it by the same command with --processes=0, or by
`python -m launch.slurm launch.sweep experiments.cifar_cnn ...` (or another launcher). The record in --workdir:
sweep.json, trials.csv, sweep.html, journal.log, and the run of the best trial.
"""

import copy
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
from research.command import Experiment
from research.config import Config, MeshConfig, option
from research.errors import RecordError, UserError
from research.signals import Signals, StoppedError
from research.storage import check_no_password
from research.terminal import lasting_output

if TYPE_CHECKING:
    from launch.search_space import SearchSpace
    from launch.study import Study
    from launch.worker import Sweep

_TRIALS = 50
_VALIDATION = 0.1  # of a training set that has no validation split of its own
_POLL_SECONDS = 1.0


@dataclasses.dataclass
class SweepOptions:
    """What `launch.sweep` can be told."""

    search: tuple[str, ...] = option((), "a field and its range, once for each field; or a Python file")
    trials: int = option(0, "trials of the whole study; 0: 50, or the whole grid", minimum=0)
    metric: str = option(
        "",
        "what decides; empty: the accuracy where there is one, else the loss",
        choices=("", "validation_accuracy", "validation_loss"),
    )
    seeds: int = option(1, "runs of each trial, from the config's seed on; their mean counts", minimum=1)
    sampler: str = option("tpe", "how values are chosen", choices=("tpe", "random", "grid", "halton", "cmaes"))
    pruner: str = option("none", "which trials end early, judged after each epoch", choices=("asha", "median", "none"))
    population: int = option(
        0,
        "runs that train together in one program; 0: 8 on a CPU, or 2 on each core, which trains one at a time; 32 on "
        "each accelerator",
        minimum=0,
    )
    processes: int = option(1, "workers here; 0: one that joins the study, and leaves the record to others", minimum=0)
    storage: str = option("", "a storage URL of Optuna's, or a journal file; empty: journal.log in the workdir")
    fit: str = option(
        "",
        "a power law through the metric of several sizes; by what they are measured",
        choices=("", "parameters", "flops", "examples"),
    )
    study: str = option("", "the study's name in the storage; empty: the experiment's")


def run(argv: Sequence[str]) -> int:
    """Sweeps as the command line says; returns the exit code.

    Raises:
      UserError: bad input, found before the first trial; no trial was trained to its end, or ten in a row failed.
      StoppedError: a signal came; the same command goes on.
      RecordError: the storage went out of reach, is full, or was written over.
    """
    options = SweepOptions()
    job = job_lib.parse("sweep", str(__doc__), options, argv)
    for package in ("optuna", "plotly", "cmaes"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'sweeps need {package}: pip install -e ".[sweep]"')
    check_place(job.workdir, options)
    if job.config.mesh != MeshConfig():
        raise UserError("--config.mesh: in a sweep each trial has one device, and trials are spread over all devices")
    signals = Signals()
    from optuna.exceptions import StorageInternalError

    try:
        with lasting_output(), signals.handled():
            return _run(job, argv, signals)
    except (OSError, StorageInternalError, json.JSONDecodeError) as error:
        why = " ".join(str(error.__cause__ or error).split())[:200]
        raise RecordError(
            f"the study or the record cannot be read or written: {why}; when it can the same command goes on with "
            f"--workdir={job.workdir}"
        ) from None


def check_place(workdir: str, options: SweepOptions) -> None:
    """Raises `UserError` where the record or the study would be in a workdir that is not on a local disk.

    And where the storage's URL holds a password, which would stand in scripts, manifests and lists of processes.
    """
    check_no_password(options.storage)
    if "://" in workdir and (options.processes or not options.storage):
        raise UserError(
            f"--workdir={workdir}: a sweep's record is on a local disk; workers elsewhere (--processes=0) need "
            "nothing but the --storage: give it a URL that they reach, as in --storage=postgresql://HOST/NAME"
        )


def _run(job: Job, argv: Sequence[str], signals: Signals) -> int:
    options, workdir = job.options, Path(job.workdir)
    from launch import sweep_best, sweep_processes, sweep_report
    from launch.study import Study, open_storage
    from launch.sweep_report import Display, summary

    sweep, points = _sweep(job)
    name, identity = options.study or job.experiment.name, _identity(job, sweep)
    if options.processes:
        sweep_best.check_folder(workdir, name, identity)
    direction = "maximize" if sweep.maximizes else "minimize"
    storage = open_storage(options.storage, workdir)
    study = Study(storage, name, direction, identity, options.sampler, options.pruner, job.config.seed)
    if study.complete(sweep.trials):
        print(f"the sweep in {workdir} is finished: a larger --trials goes on with it")
        if options.processes and not sweep_best.is_recorded(workdir, options.fit):
            job_lib.make_folder(job.workdir)
            sweep_best.finish(job, sweep, study, signals)
        return 0
    if options.processes:
        job_lib.make_folder(job.workdir)
    study.plan(sweep.trials, points)
    print(
        f"{name}: {sweep.trials} trials of {sweep.metric}, {sweep.size} runs at once on {_devices(sweep)}", flush=True
    )
    with Display(study, sweep).shown() as display:
        try:
            if options.processes > 1:
                sweep_processes.run(options.processes, [*argv, f"--workdir={workdir}"], display.update)
            _work(sweep, study, signals, display)
            while options.processes and study.others_run():
                time.sleep(_POLL_SECONDS)
                display.update()
                _work(sweep, study, signals, display)
        except StoppedError as error:
            if options.processes:
                raise StoppedError(f"{error} with --workdir={workdir}", error.exit_code - 128) from None
            raise
        except UserError:
            if options.processes:
                sweep_report.write(workdir, study, sweep, {})
            raise
    if options.processes:
        sweep_best.finish(job, sweep, study, signals)
    else:
        print(
            f"no trial is left: {summary(study, sweep)['num_trials']} ended; the record is made without --processes=0"
        )
    return 0


def _work(sweep: "Sweep", study: "Study", signals: Signals, display: Any) -> None:
    from launch.worker import Worker

    with study.alive():
        Worker(sweep, study, signals, display.update).run()
    display.update()


def _devices(sweep: "Sweep") -> str:
    return f"{len(sweep.devices)} {sweep.devices[0].platform} device{'s' if len(sweep.devices) > 1 else ''}"


def check_search(experiment: Experiment, options: SweepOptions, config: Config) -> "SearchSpace":
    """The search space of the options.

    Raises:
      UserError: there is none, or it is impossible with the other options or the config.
    """
    from launch import search_space

    if experiment.run:
        raise UserError(f"{experiment.name} makes runs of its own, which a sweep does not: sweep another experiment")
    if not options.search and options.seeds == 1:
        raise UserError("say what to vary, as in --search='optimizer.learning_rate=log(1e-4,1)', or give --seeds=5")
    for name in search_space.RECOVERY:
        if getattr(config, name):
            raise UserError(f"--config.{name}: {search_space.NO_RECOVERY}")
    if 0 < options.population < options.seeds:
        raise UserError(
            f"--population={options.population}: the {options.seeds} runs of a trial train together; give at least "
            f"--population={options.seeds}"
        )
    space = search_space.parse(options.search, config)
    if options.seeds > 1 and "seed" in space.distributions:
        raise UserError("--seeds and --search=seed=... exclude each other")
    if options.seeds > 1:
        search_space.check_value("seed", config.seed + options.seeds - 1, config)
    return space


def _sweep(job: Job) -> tuple["Sweep", list[dict[str, Any]]]:
    """What is swept, checked, and the points of a grid.

    Raises:
      UserError: something is impossible.
    """
    options, config = job.options, job.config
    from launch import sweep_processes
    from launch.worker import Sweep, load

    space = check_search(job.experiment, options, config)
    if options.fit and not space.function:
        from launch import sweep_fit  # SciPy takes a while

        sweep_fit.check(options.fit, space.distributions, options.seeds)
    grid = options.sampler == "grid" or not options.search
    points = space.grid() if grid else []
    if grid and options.trials not in (0, len(points)):
        raise UserError(f"--trials={options.trials}: the grid has {len(points)} points; leave --trials out")
    os.environ.update(sweep_processes.take_place(os.environ))
    if options.processes > 1:  # the workers shall have the accelerators' memory, not this process
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    from research import compilation_cache, optimizers
    from research.data import sources
    from research.population import Population
    from research.population_devices import default_size, split_cpu

    compilation_cache.enable()
    split = split_cpu(options.population)
    dataset = sources.load(config.dataset)
    if dataset.validation is None:
        config.dataset.validation_fraction = _VALIDATION
    config.dataset.name = dataset.name
    dataset = load(config.dataset)
    resolved = copy.deepcopy(config)
    optimizers.resolve(resolved.optimizer)
    dataset = job.experiment.prepare(resolved, dataset)
    devices = jax.local_devices()[: options.population or None]  # hosts of one TPU slice see each other's
    alone = devices[:1] if split and devices[0].platform == "cpu" else None
    population = Population(resolved, job.experiment.make_task(resolved, dataset), dataset, devices, len(devices))
    names = population.figure_names()
    metric = options.metric or ("validation_accuracy" if "validation_accuracy" in names else "validation_loss")
    if metric not in names:
        raise UserError(f"--metric={metric}: {job.experiment.name} has {', '.join(names)}; use validation_loss")
    size = options.population or max(default_size(devices), options.seeds)
    trials = len(points) or options.trials or _TRIALS
    return Sweep(job.experiment, config, space, metric, trials, options.seeds, size, devices, alone), points


def _identity(job: Job, sweep: "Sweep") -> dict[str, Any]:
    """What a study is of; all else may differ between its workers."""
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
