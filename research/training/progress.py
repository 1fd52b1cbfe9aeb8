"""How far a run is, and what becomes of steps whose loss or gradient is not finite."""

import dataclasses
from typing import Any

import numpy as np

from research.errors import NonFiniteLossError

Values = dict[str, np.ndarray]

QUANTITIES = {"loss": "the training loss", "grad_norm": "the gradient's norm"}


def non_finite(what: str, step: int) -> NonFiniteLossError:
    """The error of a run that cannot go on."""
    return NonFiniteLossError(
        f"{what} at step {step}: updates were too large, or an example is unsuitable; try a lower "
        "--config.optimizer.learning_rate, or --config.optimizer.clip_norm=1; --config.max_skipped_steps=10 leaves "
        "such steps out, --config.max_rewinds=3 goes back to the checkpoint before and leaves out the data since",
        step,
    )


@dataclasses.dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside the state, all of it JSON.

    Attributes:
      step: steps made, those skipped among them.
      epoch: epochs finished, evaluation included.
      sums: of each metric over the steps of the epoch under way.
      results: of the last finished epoch.
      best: [the lowest validation loss, its step].
      row: the line of metrics.jsonl under way.
      train_seconds, wall_seconds: over all the processes that took part in the run.
      skipped: steps whose update was left out, as their loss or gradient was not finite.
      skipped_in_a_row: the newest of them that no other step follows.
      rewinds: times that the run went back to a checkpoint.
      batches_left_out: by how many batches the data are ahead of the steps, for that.
      statistics_step: whose averaged parameters the state's `ema_model_state` belongs to.
    """

    step: int = 0
    epoch: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
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

    def advance(self, values: Values, most_skipped: int) -> tuple[Values, NonFiniteLossError | None]:
        """Goes on by the steps just made.

        Args:
          values: their metrics, [k] each.
          most_skipped: in a row; their updates were not made (`research.training.steps`).

        Returns:
          The metrics of the steps up to the one that ends the run, and the error that it ends with, or None. Where
          steps may be skipped, "skipped" is among the metrics: 1 for one that was, else 0.
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
        """The number of the batch that the next step takes, from 0."""
        return self.step + self.batches_left_out

    def finish_epoch(self, results: dict[str, float]) -> None:
        """Counts the epoch, with its results."""
        self.results, self.sums, self.epoch = results, {}, self.epoch + 1
        loss = results.get("validation_loss")
        if loss is not None:
            self.best = min(self.best or [loss, self.step], [loss, self.step])

    def add(self, values: Values) -> None:
        """Adds the metrics of steps, [k] each, to the epoch's sums, but for what was skipped."""
        made = values["skipped"] == 0 if "skipped" in values else slice(None)
        for name, x in values.items():
            # One by one: the sum must not depend on how many steps a dispatch makes.
            self.sums[name] = sum((x if name == "skipped" else x[made]).tolist(), self.sums.get(name, 0.0))

    def means(self, count: int) -> dict[str, float]:
        """The means of the metrics over the epoch's `count` steps, but for those skipped.

        Raises:
          NonFiniteLossError: all of them were.
        """
        made = count - self.sums.get("skipped", 0.0)
        if not made:
            raise non_finite(f"every step of epoch {self.epoch + 1} was skipped, and training stands still", self.step)
        return {name: total / made for name, total in self.sums.items() if name != "skipped"}

    def updates_before(self, values: Values) -> np.ndarray:
        """How many updates had been made before each of the steps just made: where the schedule stood, int [k]."""
        count = len(values["loss"])
        skipped = values.get("skipped", np.zeros(count))
        since = np.cumsum(skipped[::-1])[::-1]  # from each step on
        return (np.arange(self.step - count, self.step) - self.skipped + since).astype(int)
