"""The flags of `launch.sweep`, and their checks."""

import dataclasses
from typing import TYPE_CHECKING

from research import config as config_lib
from research.config import Config, MeshConfig, option
from research.errors import UserError
from research.experiment import Experiment
from research.paths import check_no_password

if TYPE_CHECKING:
    from launch.sweeps.search_space import SearchSpace


@dataclasses.dataclass
class SweepOptions:
    """The flags of `launch.sweep`."""

    search: tuple[str, ...] = option(
        (), "a field and its range, as in optimizer.learning_rate=log(1e-4,1), once per field; or a Python file"
    )
    trials: int = option(0, "number of trials of the study; 0: 50, or the whole grid", minimum=0)
    metric: str = option(
        "",
        "metric that ranks the trials; empty: the accuracy if the task has one, else the loss",
        choices=("", "validation_accuracy", "validation_loss"),
    )
    seeds: int = option(
        1, "runs of each trial, with consecutive seeds from --config.seed on; a trial's value is their mean", minimum=1
    )
    sampler: str = option(
        "tpe", "how the values of a trial are chosen", choices=("tpe", "random", "grid", "halton", "cmaes")
    )
    pruner: str = option(
        "none", "which trials are stopped early, decided after each epoch", choices=("asha", "median", "none")
    )
    population: int = option(
        0,
        "runs that train together in one program; 0: 32 on each accelerator; on a CPU 8, or 2 per core if there are "
        "more than 4 (each core trains one run at a time). With --config.mesh: runs at a time, each over its own "
        "devices; 0: as many as the devices suffice for",
        minimum=0,
    )
    processes: int = option(
        1, "worker processes on this machine; 0: a worker that joins a running study and writes no record", minimum=0
    )
    storage: str = option("", "Optuna storage URL or journal file; empty: journal.log in the workdir")
    fit: str = option(
        "",
        "fit a power law of the metric against this size",
        choices=("", "parameters", "flops", "examples"),
    )
    study: str = option("", "the study's name in the storage; empty: the experiment's")


def check_place(workdir: str, options: SweepOptions) -> None:
    """Raises `UserError` if the record or the study would be in a workdir that is not on a local disk.

    Also if the storage URL contains a password, which would show up in scripts, manifests and process lists.
    """
    check_no_password(options.storage)
    if "://" in workdir and (options.processes or not options.storage):
        raise UserError(
            f"--workdir={workdir}: a sweep's record must be on a local disk; workers elsewhere (--processes=0) need "
            "only the --storage: give it a URL that they can reach, as in --storage=postgresql://HOST/NAME"
        )


def check_search(experiment: Experiment, options: SweepOptions, config: Config) -> "SearchSpace":
    """Parses the search space.

    Raises:
      UserError: it is empty or invalid, or contradicts the other options or the config.
    """
    from launch.sweeps import search_space  # imports Optuna, which is an optional dependency

    if experiment.run:
        raise UserError(f"{experiment.name} defines its own runs, which a sweep cannot vary: sweep another experiment")
    if experiment.callbacks:
        raise UserError(
            f"{experiment.name} has callbacks, which a sweep does not call, since its trials train together in one "
            "program: sweep the experiment without them"
        )
    if not options.search and options.seeds == 1:
        raise UserError(
            "nothing to vary: give a search space, as in --search='optimizer.learning_rate=log(1e-4,1)', or --seeds=5"
        )
    for path, field, value in config_lib.walk(config):
        # The mesh of a trial may be configured, and how the processes of a sweep find each other.
        reason = field.metadata["not_searchable"]
        if reason and value != field.default and not path.startswith(("mesh.", "distributed.")):
            raise UserError(f"--config.{path}: {reason}; leave it out")
    over_mesh = config.mesh != MeshConfig()
    if over_mesh and options.processes > 1:
        raise UserError(
            f"--processes={options.processes}: one process trains the trials over a mesh, on all devices; leave it out"
        )
    if 0 < options.population < options.seeds and not over_mesh:
        raise UserError(
            f"--population={options.population}: the {options.seeds} seeds of a trial train together; give at least "
            f"--population={options.seeds}"
        )
    space = search_space.parse(options.search, config)
    if options.seeds > 1 and "seed" in space.distributions:
        raise UserError("--seeds and --search=seed=... exclude each other: give one of them")
    if options.seeds > 1:
        search_space.check_value("seed", config.seed + options.seeds - 1, config)
    return space
