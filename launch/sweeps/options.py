"""What a sweep can be told, and what of it is impossible."""

import dataclasses
from typing import TYPE_CHECKING

from research import config as config_lib
from research.config import Config, option
from research.errors import UserError
from research.experiment import Experiment
from research.record.storage import check_no_password

if TYPE_CHECKING:
    from launch.sweeps.search_space import SearchSpace


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


def check_search(experiment: Experiment, options: SweepOptions, config: Config) -> "SearchSpace":
    """The search space of the options.

    Raises:
      UserError: there is none, or it is impossible with the other options or the config.
    """
    from launch.sweeps import search_space  # needs Optuna, which is an extra

    if experiment.run:
        raise UserError(f"{experiment.name} makes runs of its own, which a sweep does not: sweep another experiment")
    if not options.search and options.seeds == 1:
        raise UserError("say what to vary, as in --search='optimizer.learning_rate=log(1e-4,1)', or give --seeds=5")
    for path, field, value in config_lib.walk(config):
        # How the processes of a sweep find each other may be said.
        reason = field.metadata["not_searchable"]
        if reason and value != field.default and not path.startswith("distributed."):
            raise UserError(f"--config.{path}: {reason}; leave it out")
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
