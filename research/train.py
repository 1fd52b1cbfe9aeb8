"""The one loop: trains, evaluates after every epoch, and leaves the record; or goes on where an earlier run stopped."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from research import plots
from research.checkpoint import Checkpoints
from research.config import Config
from research.data.sources import Dataset
from research.errors import UserError
from research.signals import Signals
from research.state import TrainState, num_params
from research.tasks.task import Task
from research.training import Training
from research.workdir import read_metrics
from research.writer import Writer


def train_and_evaluate(
    experiment: str,
    config: Config,
    task: Task,
    dataset: Dataset,
    mesh: jax.sharding.Mesh,
    workdir: Path,
    signals: Signals | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains `task` on `dataset` and leaves the record in `workdir`; goes on from its newest checkpoint if it has one.

    Args:
      experiment: its name in the record.
      config: checked and resolved (`research.app` does both).
      task: what is learned.
      dataset: the examples.
      mesh: the devices.
      workdir: an existing folder.
      signals: where a wish to stop is noted.

    Returns:
      The final state, and what summary.json holds.

    Raises:
      NonFiniteLossError: the loss became NaN or infinite; the record up to that step stays.
      StoppedError: a signal came; a checkpoint holds what was done.
      UserError: the batch size is larger than the training set, or the checkpoints cannot be restored.
    """
    training = Training(config, task, dataset, mesh)
    training.signals = signals or training.signals
    progress_writer = Writer(workdir, training.ends[-1], active=jax.process_index() == 0)
    with progress_writer as writer, Checkpoints(workdir, keep=config.keep_checkpoints, message=writer.warning) as saved:
        resumes = training.restore(saved)
        compile_seconds = training.compile(train=True)
        writer.config(config)
        writer.resume(training.progress.step, training.progress.row)
        writer.message(f"{num_params(training.state):,} parameters; compiled in {compile_seconds:.1f} s")
        if resumes:
            writer.message(f"resumed at step {training.progress.step:,} of {training.ends[-1]:,}")
        with training.signals.deferred():
            while training.progress.epoch < config.num_epochs:
                means = training.train_epoch(writer, saved)
                training.finish_epoch(means, writer, saved)
                writer.message(_epoch_line(training.progress.epoch, config.num_epochs, training.progress.results))
        progress = training.progress
        summary = {
            "experiment": experiment,
            "dataset": dataset.name,
            "num_train_steps": progress.step,
            "num_epochs": config.num_epochs,
            "global_batch_size": config.batch_size,
            **progress.results,
            **({"best_validation_loss": progress.best[0], "best_step": progress.best[1]} if progress.best else {}),
            "examples_per_second": progress.step * config.batch_size / progress.train_seconds,
            "compile_seconds": compile_seconds,
            "train_seconds": progress.train_seconds,
            "wall_seconds": training.wall_seconds,
            "platform": mesh.devices.flat[0].platform,
            "device_kind": mesh.devices.flat[0].device_kind,
            "device_count": mesh.size,
            "process_count": jax.process_count(),
            "num_params": num_params(training.state),
            **versions(),
        }
        saved.wait()
        writer.summary(summary)
        writer.picture("curves", lambda: plots.curves({experiment: read_metrics(workdir)}), progress.step)
    return training.state, summary


def versions() -> dict[str, str]:
    """The versions of the packages that decide a run's figures, as summary.json has them."""
    return {f"{package}_version": version(package) for package in ("jax", "flax", "optax", "numpy")}


def evaluate(
    config: Config, task: Task, dataset: Dataset, mesh: jax.sharding.Mesh, workdir: Path
) -> tuple[int, dict[str, float]]:
    """Evaluates the newest checkpoint in `workdir`, and changes nothing there.

    Returns:
      Its step, and the means of the metrics over each held-out split, as `<split>_<name>`.

    Raises:
      UserError: there is no checkpoint that can be restored.
    """
    training = Training(config, task, dataset, mesh)
    message = Writer(workdir, 0, active=jax.process_index() == 0).warning
    with Checkpoints(workdir, keep=config.keep_checkpoints, message=message, read_only=True) as saved:
        if not training.restore(saved):
            raise UserError(f"--workdir={workdir} has no checkpoint to evaluate")
    training.compile(train=False)
    return training.progress.step, training.evaluate()


def _epoch_line(epoch: int, num_epochs: int, results: dict[str, float]) -> str:
    shown = (f"{name} {value:.4f}" for name, value in results.items() if name.endswith(("_loss", "_accuracy")))
    return f"epoch {epoch}/{num_epochs}  " + "  ".join(shown)
