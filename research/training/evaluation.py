"""Restores a run for evaluation, sampling and export, and evaluates it."""

from pathlib import Path

import jax

from research.config import Config
from research.data.sources import Dataset
from research.errors import UserError
from research.record.writer import Writer
from research.tasks.task import Task
from research.training.checkpoint import Checkpoints
from research.training.checkpoint_choice import find_step
from research.training.run import Training


def restore(
    config: Config,
    task: Task,
    dataset: Dataset,
    mesh: jax.sharding.Mesh,
    workdir: Path,
    checkpoint: str = "newest",
) -> Training:
    """Restores the run in `workdir` for evaluation: without the training carry. The workdir is only read.

    Args:
      config: resolved; the batch size need not be the run's.
      task: what was learned.
      dataset: may lack examples if the run is not evaluated and has no `stale_statistics`.
      mesh: the devices.
      workdir: the run's folder.
      checkpoint: "newest", "best" (the lowest validation loss) or a step.

    Raises:
      UserError: there is no such checkpoint, or it cannot be restored.
    """
    run = Training(config, task, dataset, mesh)
    message = Writer(workdir, 0, active=jax.process_index() == 0).warning
    with Checkpoints(workdir, keep=config.keep_checkpoints, message=message, read_only=True) as checkpoints:
        if not run.restore(checkpoints, find_step(checkpoints, checkpoint), with_carry=False):
            raise UserError(f"--workdir={workdir} has no checkpoint")
    if dataset.has_examples:
        with jax.set_mesh(mesh):
            run.estimate_statistics()
    return run


def evaluate(run: Training) -> dict[str, float]:
    """The means of the metrics over each held-out split, as `<split>_<name>`, and the task's final metrics."""
    with jax.set_mesh(run.mesh):
        run.compile(train=False)
        return run.evaluate() | run.task.final_metrics(run.predictor(), run.dataset)
