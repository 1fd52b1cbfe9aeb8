"""The Python API, for notebooks and programs: trains and loads runs, as the command of an experiment does."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import jax

from research import app, flags
from research import config as config_lib
from research.config import Config, DistributedConfig, MeshConfig
from research.config_values import checked_copy
from research.errors import UserError, as_out_of_memory_error
from research.experiment import Experiment
from research.process import backend, distributed
from research.process.signals import Signals, StoppedError
from research.trained_run import TrainedRun


def train(
    experiment: Experiment,
    config: Config,
    workdir: str | Path | None = None,
    *,
    tracker: str | None = None,
) -> TrainedRun:
    """Trains an experiment, or resumes the run in `workdir`, and records it.

    The same as the command `python -m experiments.NAME --workdir=DIR --config...`, with the same bits. In the main
    thread, SIGINT (Ctrl-C, or a notebook's interrupt button) and SIGTERM save a checkpoint first. Errors name a field
    by its flag: `--config.batch_size` is `config.batch_size`.

    Args:
      experiment: such as `experiments.cifar_cnn.EXPERIMENT`.
      config: of the experiment, as from `experiment.default_config` or `experiment.presets[name]()`; not changed.
      workdir: the folder of the record; None: a new folder, runs/<experiment>/<date-time>-<random>.
      tracker: as --tracker: "wandb", "mlflow" or "wandb,mlflow"; None: those that the run in `workdir` had before.

    Raises:
      UserError: the command's errors, such as bad input, a loss that is not finite, or a full disk.
      KeyboardInterrupt: it was interrupted. If it was training, a checkpoint was saved, and the same `workdir` resumes
        the run.
    """
    command = _command(experiment, config, workdir, tracker)
    signals, error = Signals(), None
    try:
        with signals.handled():
            training, _ = app.execute(experiment, command, signals)
        distributed.wait("the first process has written the record")
        return TrainedRun(experiment, command, training)
    except Exception as raised:
        error = raised if isinstance(raised, UserError) else as_out_of_memory_error(raised)
        if error is None:
            raise
    # Raised out here, without its traceback: notebooks keep the last one, and with it the run's memory on the devices.
    error = error.with_traceback(None)
    if isinstance(error, StoppedError) and signals.received == signal.SIGINT:
        raise KeyboardInterrupt(str(error))  # no UserError: a loop over runs may catch that, and must end here
    raise error


def _command(experiment: Experiment, config: Any, workdir: str | Path | None, tracker: str | None) -> flags.Command:
    _check_experiment(experiment)
    if experiment.run:
        raise UserError(f"{experiment.name} has a train loop of its own: run its command")
    config = checked_copy(experiment, config)
    config_lib.check(config)
    given = {"workdir": workdir or None, "tracker": tracker}
    argv = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return dataclasses.replace(flags.parse(experiment, argv), config=config)


def _check_experiment(experiment: Any) -> None:
    if not isinstance(experiment, Experiment):
        raise UserError(f"experiment is of type {type(experiment).__name__}: give an Experiment, a module's EXPERIMENT")


def load(
    experiment: Experiment,
    workdir: str | Path,
    checkpoint: str | int = "newest",
    *,
    mesh: MeshConfig | None = None,
) -> TrainedRun:
    """Loads a run that was trained by the command or by `train`, perhaps on other devices. The workdir is only read.

    Args:
      experiment: of the run.
      workdir: the folder of its record.
      checkpoint: as --checkpoint: "newest", "best" (the lowest validation loss) or a step.
      mesh: how the network is sharded over all devices; None: it is on the first device.

    Raises:
      UserError: there is no such run or checkpoint, or it is of another experiment.
    """
    _check_experiment(experiment)
    command = flags.parse(experiment, ["--mode=eval", f"--workdir={workdir}", f"--checkpoint={checkpoint}"])
    config = command.config
    config.mesh = mesh or MeshConfig()
    config.distributed = DistributedConfig(start="never")  # not "always", as in a run on Cloud TPU
    backend.check()
    if jax.process_count() > 1:
        raise UserError("research.load is for one process: start it without a launcher")
    training = app.restored(
        experiment, command, app.start(config, None if mesh else jax.devices()[:1]), with_examples=False
    )
    return TrainedRun(experiment, command, training)
