"""The interface of everything that receives a run's record: files, TensorBoard events, trackers."""

from typing import Any


class Output:
    """Receives a run's record, in the order of its steps.

    Attributes:
      can_rewind: whether `start` removes rows that came after the checkpoint. Otherwise this output ignores rows of
        steps that it has already received, and is not sent an unfinished row.
    """

    can_rewind = True

    def start(self, config: dict[str, Any], step: int, rows: list[dict[str, Any]]) -> None:
        """Starts, resumes or rewinds the record.

        Args:
          config: the run's config.
          step: the first step that will be added; this and later steps are superseded.
          rows: the rows of earlier steps.
        """

    def scalars(self, row: dict[str, Any]) -> None:
        """Receives a line of metrics.jsonl: "step", "epoch" and the numbers of this step."""

    def image(self, name: str, png: bytes, step: int) -> None:
        """Receives a plot."""

    def summary(self, summary: dict[str, Any]) -> None:
        """Receives the results of the finished run; returns once they and all rows are stored."""

    def sync(self) -> None:
        """Called before a checkpoint is saved: files then hold all rows."""

    def close(self, failed: bool) -> None:
        """Called once, at the end of the process; `failed`: an error or a signal ended the run."""
