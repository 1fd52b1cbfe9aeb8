"""Writes a run's record: metrics, plots and tables, to files and trackers; shows progress on the terminal."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from research.errors import RecordError
from research.record import drawing, json_files, storage, trackers
from research.record.events import Events
from research.record.json_files import JsonFiles
from research.record.output import Output

_SECONDS_BETWEEN_PLAIN_LINES = 10.0
_MIN_COLUMNS = 80  # a narrower terminal would cut off the full progress bar
_NARROW_BAR = "{n_fmt}/{total_fmt} {remaining} left{postfix}"


class Writer:
    """Passes one run's record on to its outputs (files, TensorBoard, trackers), and shows progress on the terminal.

    Args:
      workdir: an existing folder.
      num_train_steps: the length of the progress bar; 0: no bar.
      active: whether this process writes at all; true only in process 0.
      experiment: its name, for trackers.
      tracker_names: the trackers that receive the record, too.
    """

    def __init__(
        self,
        workdir: Path,
        num_train_steps: int,
        *,
        active: bool,
        experiment: str = "",
        tracker_names: Sequence[str] = (),
    ):
        self.workdir = workdir
        self._active = active
        self._experiment, self._tracker_names = experiment, tracker_names
        self._outputs: list[Output] = []  # none until the record starts
        self._config: dict[str, Any] = {}
        self._total = num_train_steps
        self._first_step = 0
        self._row: dict[str, Any] = {}
        self._start = self._last_line = time.monotonic()
        # A bar needs a notebook, or a terminal that can move the cursor: None lets tqdm check.
        disable = True if not (active and num_train_steps) or os.environ.get("TERM") == "dumb" else None
        self._bar = tqdm(total=num_train_steps, unit="step", dynamic_ncols=True, disable=disable)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        with contextlib.ExitStack() as stack:
            if error:  # report the first error
                stack.enter_context(contextlib.suppress(RecordError))
            for output in self._outputs:  # all are closed, even if one cannot write
                stack.callback(output.close, failed=error is not None)
            # After an error the newest line is unfinished: a resumed run may add to it.
            self._flush(unfinished=error is not None)

    def config(self, config: Any) -> None:
        """Sets the config, which `resume` writes."""
        self._config = dataclasses.asdict(config)

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes the last line of metrics.jsonl and then summary.json, which marks the run as finished."""
        self._flush()
        for output in self._outputs:
            output.summary(summary)

    def sync(self) -> dict[str, Any]:
        """Makes metrics.jsonl hold all lines but the newest, whose step may still get values; returns the newest."""
        for output in self._outputs:
            output.sync()
        return dict(self._row)

    def resume(self, step: int, row: dict[str, Any]) -> None:
        """Starts the record, or truncates it to its state at `step`, when `sync` returned `row`."""
        self._row = dict(row)
        if self._active:
            self._outputs = self._outputs or self._open_outputs()
            first_step = row.get("step", step + 1)
            rows, damaged = json_files.read_rows(self.workdir, first_step)
            if damaged:
                self.warning(f"metrics.jsonl: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
            for output in self._outputs:
                output.start(self._config, first_step, rows)
        # Compilation and a rewound part of the run do not count when estimating the remaining time.
        self._start = self._last_line = time.monotonic()
        self._bar.reset()
        self._bar.initial = self._bar.n = self._first_step = step

    def _open_outputs(self) -> list[Output]:
        others = trackers.make(self._tracker_names, self.workdir, self._experiment, self.message, self.warning)
        # The JSON files last: summary.json marks the run as finished.
        return [Events(self.workdir, self.warning), *others, JsonFiles(self.workdir)]

    def scalars(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Adds values to the line of metrics.jsonl for `step`. Steps must not decrease; each has one line."""
        if self._row and self._row["step"] != step:
            self._flush()
        self._row |= {"step": step, "epoch": epoch, **values}

    def _flush(self, *, unfinished: bool = False) -> None:
        for output in self._outputs if self._row else ():
            if output.can_rewind or not unfinished:
                output.scalars(self._row)
        self._row = {}

    def plot(self, name: str, draw: Callable[[], Any], step: int) -> None:
        """Saves a plot as `<name>.png` and as a TensorBoard image. Any failure is only a warning.

        Args:
          name: the file's name without its suffix.
          draw: returns the matplotlib Figure; called only in the process that writes.
          step: the training step that the plot shows.
        """
        if self._active and (png := drawing.save(self.workdir / f"{name}.png", draw, self.warning)):
            for output in self._outputs:
                output.image(name, png, step)

    def table(self, name: str, text: str) -> None:
        """Writes `<name>.csv`."""
        if self._active:
            storage.replace(self.workdir / f"{name}.csv", text.encode())

    def progress(self, step: int, loss: float, examples_per_second: float, utilization: float | None = None) -> None:
        """Shows progress, with the model FLOPs utilization if given: a bar on a terminal, else a line every 10 s."""
        speed = f"{examples_per_second:,.0f} examples/s" + (f", MFU {utilization:.1%}" if utilization else "")
        is_narrow = (self._bar.format_dict["ncols"] or _MIN_COLUMNS) < _MIN_COLUMNS
        self._bar.bar_format = _NARROW_BAR if is_narrow else None
        self._bar.set_postfix_str(f"loss {loss:.4f}" + ("" if is_narrow else f", {speed}"), refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and self._active and now - self._last_line > _SECONDS_BETWEEN_PLAIN_LINES:
            self._last_line = now
            left = tqdm.format_interval((now - self._start) / (step - self._first_step) * (self._total - step))
            self.message(f"step {step:,}/{self._total:,}  loss {loss:.4f}  {speed}  {left} left")

    def message(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warning(self, text: str) -> None:
        """Prints a line on stderr, above the progress bar."""
        if self._active:
            tqdm.write(f"WARNING: {text}", file=sys.stderr)
