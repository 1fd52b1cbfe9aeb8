"""The progress of a run, and what happens after a loss or gradient that is not finite."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.config import Config
from research.errors import NonFiniteLossError

Values = dict[str, np.ndarray]

QUANTITIES = {"loss": "the training loss", "grad_norm": "the gradient's norm"}


def non_finite(message: str, step: int) -> NonFiniteLossError:
    """Returns the error that ends a run at `step`; `message` says which number is not finite."""
    return NonFiniteLossError(
        f"{message} at step {step}: updates were too large, or an example is unsuitable; try a lower "
        "--config.optimizer.learning_rate, or --config.optimizer.clip_norm=1; --config.max_skipped_steps=10 skips "
        "such steps, --config.max_rewinds=3 rewinds to the last checkpoint and leaves out the data since",
        step,
    )


@dataclasses.dataclass
class Progress:
    """The progress of a run, which a checkpoint holds in addition to the state, as JSON values.

    Attributes:
      step: the number of steps made, skipped ones included.
      epoch: the number of epochs finished, evaluation included.
      sums: for each metric, its sum over the steps so far of the current epoch (at its end: of that epoch), and the
        number of these steps.
      results: the results of the last finished epoch.
      best: [the lowest validation loss, its step], or None.
      row: the unfinished line of metrics.jsonl.
      train_seconds, wall_seconds: training time and wall time of the run, earlier processes included.
      skipped: the number of steps without an update, since their loss or gradient was not finite.
      skipped_in_a_row: how many of the newest steps in a row were skipped.
      rewinds: how many times the run went back to a checkpoint.
      batches_left_out: how many batches rewinds have left out: the data is ahead of the steps by as many.
      statistics_step: the step to whose averaged parameters the state's `ema_model_state` belongs.
      num_epochs, num_steps: the config's fields for the length of training, which the schedules of the newest steps
        span: `num_steps` unless it is 0, else `num_epochs`; both 0: unknown.
      extended: for each extension the earlier length, "num_epochs" or "num_steps", and "step", the last step with its
        schedules.
      stopped: why a callback stopped the run, or "".
      callbacks: the state of each callback.
    """

    step: int = 0
    epoch: int = 0
    sums: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    best: list[Any] | None = None
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rewinds: int = 0
    batches_left_out: int = 0
    statistics_step: int = 0
    num_epochs: int = 0
    num_steps: int = 0
    extended: list[dict[str, int]] = dataclasses.field(default_factory=list)
    stopped: str = ""
    callbacks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(cls, config: Config) -> "Progress":
        """Returns the progress of a run before its first step."""
        return cls(num_epochs=config.num_epochs, num_steps=config.num_steps)

    @classmethod
    def restore(cls, values: dict[str, Any], config: Config, epoch_end_steps: Sequence[int]) -> "Progress":
        """Returns the progress that a checkpoint holds, for a config that may extend the run.

        Args:
          values: the attributes in the checkpoint.
          config: of the steps to come.
          epoch_end_steps: the number of steps made when each epoch ends, with this config.
        """
        progress = cls(**values)
        # Not all that it had finished: its last epoch may have been a part of one, which now continues.
        progress.epoch = bisect.bisect_right(epoch_end_steps, progress.step)
        earlier = ("num_steps", progress.num_steps) if progress.num_steps else ("num_epochs", progress.num_epochs)
        if progress.step and earlier[1] and earlier != config.length:
            progress.extended = [*progress.extended, {earlier[0]: earlier[1], "step": progress.step}]
            progress.stopped = ""
        progress.num_epochs, progress.num_steps = config.num_epochs, config.num_steps
        return progress

    def advance(self, values: Values, most_skipped: int) -> tuple[Values, NonFiniteLossError | None]:
        """Counts the steps just made.

        Args:
          values: the metrics of these steps, [k] each.
          most_skipped: how many steps in a row may be skipped; the train step has left out their updates.

        Returns:
          The metrics of the steps before the one that ends the run, and its error; or all metrics, and None. If steps
          may be skipped, the metrics include "skipped": 1 for a skipped step, else 0.
        """
        finite = {name: np.isfinite(values[name]) for name in QUANTITIES}
        skipped = ~np.logical_and(*finite.values())
        error = None
        for i, is_skipped in enumerate(skipped):
            streak = self.skipped_in_a_row + 1 if is_skipped else 0
            if streak > most_skipped:
                name = next(name for name in QUANTITIES if not finite[name][i])
                error = non_finite(f"{QUANTITIES[name]} became {values[name][i]}", self.step + 1)
                values, skipped = {n: x[:i] for n, x in values.items()}, skipped[:i]
                break
            self.skipped_in_a_row = streak
            self.step += 1
        self.skipped += int(skipped.sum())
        return values | ({"skipped": skipped.astype(np.float32)} if most_skipped else {}), error

    @property
    def next_batch(self) -> int:
        """The index of the next step's batch, from 0."""
        return self.step + self.batches_left_out

    def finish_epoch(self, results: dict[str, float]) -> None:
        """Counts the epoch and stores its results."""
        self.results, self.epoch = results, self.epoch + 1
        self.update_best(results)

    def update_best(self, results: dict[str, float]) -> bool:
        """Stores the validation loss of this step if it is the lowest so far; returns whether it is."""
        loss = results.get("validation_loss")
        if loss is None or (self.best and self.best <= [loss, self.step]):
            return False
        self.best = [loss, self.step]
        return True

    def add(self, values: Values) -> None:
        """Adds the metrics of steps, [k] each, to the epoch's sums, without those of skipped steps."""
        made = values["skipped"] == 0 if "skipped" in values else slice(None)
        for name, x in values.items():
            if name != "skipped":
                total, count = self.sums.get(name, [0.0, 0])
                # In sequence, not np.sum: float rounding must not depend on how many steps a dispatch makes.
                self.sums[name] = [sum(x[made].tolist(), total), count + len(x[made])]

    def means(self) -> dict[str, float]:
        """Returns the mean of each metric over the steps of the epoch that measured it, except skipped ones.

        Some steps may not have measured it: on one device, without microbatches, there is no noise scale.

        Raises:
          NonFiniteLossError: all steps were skipped.
        """
        if not self.sums["loss"][1]:
            raise non_finite(f"every step of epoch {self.epoch + 1} was skipped, so nothing was trained", self.step)
        return {name: total / count for name, (total, count) in self.sums.items() if count}

    def updates_before(self, values: Values) -> np.ndarray:
        """Returns the number of updates before each of the steps just made, int [k]: the schedule's argument."""
        count = len(values["loss"])
        skipped = values.get("skipped", np.zeros(count))
        skipped_since = np.cumsum(skipped[::-1])[::-1]  # that step included
        return (np.arange(self.step - count, self.step) - self.skipped + skipped_since).astype(int)
