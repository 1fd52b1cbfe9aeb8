"""Early stopping: ends training once the validation loss has not improved for a number of epochs."""

import bisect
from collections.abc import Sequence
from typing import Any

from research.config import Config
from research.data.sources import Dataset
from research.errors import UserError
from research.training.progress import Progress

_CAUSE = "early stopping"


def check(config: Config, dataset: Dataset) -> None:
    """Raises `UserError` if early stopping is on, but the data set has no validation split."""
    if config.early_stopping_epochs and dataset.validation is None:
        raise UserError(
            f"--config.early_stopping_epochs={config.early_stopping_epochs} needs a validation split: hold one out "
            "with --config.dataset.validation_fraction=0.1"
        )


def reason(config: Config, progress: Progress, epoch_end_steps: Sequence[int]) -> str:
    """Returns why the run stops before its last step, or "" if it does not.

    A function of what a checkpoint holds, so that a resumed run stops at the same step.

    Args:
      config: its `early_stopping_epochs` is used.
      progress: of the run.
      epoch_end_steps: the number of steps made when each epoch ends.
    """
    if progress.step >= epoch_end_steps[-1]:
        return ""
    if progress.stopped or not config.early_stopping_epochs or progress.best is None:
        return progress.stopped
    if progress.step not in epoch_end_steps:  # a run that resumes within an epoch finishes it
        return ""
    loss, step = progress.best
    # The best evaluation may be one within an epoch (--config.eval_every_steps): then that epoch has improved.
    epochs = progress.epoch - 1 - bisect.bisect_left(epoch_end_steps, step)
    if epochs < config.early_stopping_epochs:
        return ""
    count = f"{epochs} epoch{'s' if epochs > 1 else ''}"
    return f"{_CAUSE}: the validation loss has not improved for {count}, since {loss:.4f} at step {step}"


def summary(config: Config, why: str) -> dict[str, Any]:
    """Returns the entries of summary.json; `why` is what `reason` returned."""
    entries = {"early_stopping_epochs": config.early_stopping_epochs} if config.early_stopping_epochs else {}
    return entries | ({"stopped_early": why} if why else {})


def finished(found: dict[str, Any], config: Config, num_train_steps: int) -> str:
    """Returns a message that says how the run ended and how to continue it, or "" if `config` trains it further.

    Args:
      found: the run's summary.json.
      config: of the steps to come.
      num_train_steps: the length of training with this config.
    """
    if found["num_train_steps"] >= num_train_steps:
        return f"is finished: evaluating it; a larger --config.{config.length[0]} trains it further"
    why = found.get("stopped_early", "")
    name = "num_steps" if "num_steps" in found else "num_epochs"
    settings = (name, found[name]), found.get("early_stopping_epochs", 0)
    if not why or settings != (config.length, config.early_stopping_epochs):
        return ""
    field = "early_stopping_epochs, or 0," if why.startswith(_CAUSE) else config.length[0]
    return f"was stopped by {why}. Evaluating it; a larger --config.{field} trains it further"
