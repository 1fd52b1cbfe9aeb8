"""The one loop: trains, evaluates after every epoch, and leaves the record; or goes on where an earlier run stopped."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from research import plots, sharding
from research.config import Config
from research.data.sources import Dataset
from research.errors import NonFiniteLossError, UserError
from research.process.signals import Signals
from research.record.workdir import read_metrics
from research.record.writer import Writer
from research.tasks.task import Task
from research.training.checkpoint import Checkpoints
from research.training.run import Training
from research.training.state import TrainState, num_params


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
      NonFiniteLossError: the loss or the gradient became NaN or infinite, more often than the config allows; the
        record up to that step stays.
      StoppedError: a signal came; a checkpoint holds what was done.
      UserError: the batch size is larger than the training set, or the checkpoints cannot be restored.
    """
    training = Training(config, task, dataset, mesh)
    training.signals = signals or training.signals
    with (
        jax.set_mesh(mesh),
        Writer(workdir, training.ends[-1], active=jax.process_index() == 0) as writer,
        Checkpoints(workdir, keep=config.keep_checkpoints, message=writer.warning) as saved,
    ):
        resumes = training.restore(saved)
        compile_seconds = training.compile(train=True)
        if not resumes and (path := workdir / "metrics.jsonl").exists() and path.stat().st_size:
            writer.warning("metrics.jsonl has steps, but there is no checkpoint: training from the start")
        writer.config(config)
        writer.resume(training.progress.step, training.progress.row)
        writer.message(f"{num_params(training.state):,} parameters; compiled in {compile_seconds:.1f} s")
        if mesh.size > 1:
            writer.message(_memory_line(training.state))
        if resumes:
            writer.message(f"resumed at step {training.progress.step:,} of {training.ends[-1]:,}")
        if config.max_rewinds and not resumes:
            training.save(writer, saved)  # the first there is to go back to
        with training.signals.deferred():
            while (epoch := training.progress.epoch) < config.num_epochs:
                if epoch and config.pictures_every_epochs and epoch % config.pictures_every_epochs == 0:
                    _draw(experiment, training, writer)
                try:
                    training.finish_epoch(training.train_epoch(writer, saved), writer, saved)
                except NonFiniteLossError as error:
                    training.rewind(error, writer, saved)
                    continue
                writer.message(_epoch_line(epoch + 1, config.num_epochs, training.progress.results))
        saved.wait()
        figures = training.progress.results | task.final_metrics(training.predictor(), dataset)
        summary = _summary(experiment, training, figures, compile_seconds)
        writer.summary(summary)
        _draw(experiment, training, writer)
    return training.state, summary


def _memory_line(state: TrainState) -> str:
    """What one device holds of the state, and how much of it there is."""
    parts = {"parameters": state.params, "optimiser state": state.opt_state, "average": state.ema_params}
    shown = (
        f"{sharding.bytes_per_device(tree) / 2**20:,.2f} of {sum(x.nbytes for x in leaves) / 2**20:,.2f} MiB of {name}"
        for name, tree in parts.items()
        if (leaves := jax.tree.leaves(tree))
    )
    return f"each device holds {', '.join(shown)}"


def _draw(experiment: str, training: Training, writer: Writer) -> None:
    """The curves so far, and the task's pictures of what it has learned."""
    step, row = training.progress.step, writer.sync()

    def curves() -> Any:
        return plots.curves({experiment: [*read_metrics(writer.workdir), *filter(None, [row])]})

    writer.picture("curves", curves, step)
    try:
        pictures = training.task.pictures(training.predictor(), training.dataset)
    except Exception as error:  # whatever it is: no run stops for a picture
        writer.warning(f"no pictures were drawn: {error}")
        return
    for name, draw in pictures.items():
        writer.picture(name, draw, step)


def _summary(experiment: str, training: Training, figures: dict[str, float], compile_seconds: float) -> dict[str, Any]:
    config, progress, mesh = training.config, training.progress, training.mesh
    unit, count = training.task.unit
    speed = progress.step * config.batch_size / progress.train_seconds
    return {
        "experiment": experiment,
        "dataset": training.dataset.name,
        "num_train_steps": progress.step,
        "num_epochs": config.num_epochs,
        "global_batch_size": config.batch_size,
        **figures,
        **({"best_validation_loss": progress.best[0], "best_step": progress.best[1]} if progress.best else {}),
        **({"skipped_steps": progress.skipped} if config.max_skipped_steps else {}),
        **({"rewinds": progress.rewinds} if config.max_rewinds else {}),
        "examples_per_second": speed,
        **({f"{unit}_per_second": speed * count} if count > 1 else {}),
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


def versions() -> dict[str, str]:
    """The versions of the packages that decide a run's figures, as summary.json has them."""
    return {f"{package}_version": version(package) for package in ("jax", "flax", "optax", "numpy")}


def restore(config: Config, task: Task, dataset: Dataset, mesh: jax.sharding.Mesh, workdir: Path) -> Training:
    """The run in `workdir` at its newest checkpoint, of which nothing is changed.

    Raises:
      UserError: there is no checkpoint that can be restored.
    """
    training = Training(config, task, dataset, mesh)
    message = Writer(workdir, 0, active=jax.process_index() == 0).warning
    with Checkpoints(workdir, keep=config.keep_checkpoints, message=message, read_only=True) as saved:
        if not training.restore(saved):
            raise UserError(f"--workdir={workdir} has no checkpoint to go by")
    with jax.set_mesh(mesh):
        training.estimate_statistics()
    return training


def evaluate(training: Training) -> dict[str, float]:
    """The means of the metrics over each held-out split, as `<split>_<name>`, and the task's final figures."""
    with jax.set_mesh(training.mesh):
        training.compile(train=False)
        return training.evaluate() | training.task.final_metrics(training.predictor(), training.dataset)


def _epoch_line(epoch: int, num_epochs: int, results: dict[str, float]) -> str:
    shown = (f"{name} {value:.4f}" for name, value in results.items() if name.endswith(("_loss", "_accuracy")))
    return f"epoch {epoch}/{num_epochs}  " + "  ".join(shown)
