"""Writes a run's record (metrics.jsonl, TensorBoard events, plots, ...) and shows progress on the terminal."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from research.errors import RecordError
from research.record import drawing, storage
from research.record.events import Events

_SECONDS_BETWEEN_PLAIN_LINES = 10.0
_MIN_COLUMNS = 80  # a narrower terminal would cut off the full progress bar
_NARROW_BAR = "{n_fmt}/{total_fmt} {remaining} left{postfix}"


def _nonfinite_to_null(value: dict[str, Any]) -> dict[str, Any]:
    """Replaces NaN and infinities, which JSON does not have, by None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}


def _parse_step(line: str) -> float:
    """Returns the step of a line of metrics.jsonl; infinity if the line is unfinished, NaN if it is damaged."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.nan


class Writer:
    """Writes one run's record.

    Args:
      workdir: an existing folder.
      num_train_steps: the length of the progress bar.
      active: whether this process writes at all; true only in process 0.
    """

    def __init__(self, workdir: Path, num_train_steps: int, *, active: bool):
        self.workdir = workdir
        self._active = active
        self._metrics = storage.Log(workdir / "metrics.jsonl")
        self._events = Events(workdir, self.warning)
        self._config = ""
        self._total = num_train_steps
        self._first_step = 0
        self._row: dict[str, Any] = {}
        self._start = self._last_line = time.monotonic()
        # A bar needs a terminal that can move the cursor. None lets tqdm check whether stderr is a terminal.
        disable = True if not active or os.environ.get("TERM") == "dumb" else None
        self._bar = tqdm(total=num_train_steps, unit="step", dynamic_ncols=True, disable=disable)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        with contextlib.suppress(RecordError) if error else contextlib.nullcontext():  # report the first error
            self._flush()
            self._sync()

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        if self._active:
            text = json.dumps(_nonfinite_to_null(value), indent=2, allow_nan=False) + "\n"
            storage.replace(self.workdir / name, text.encode())

    def config(self, config: Any) -> None:
        """Writes config.json."""
        text = json.dumps(dataclasses.asdict(config), indent=2)
        self._config = textwrap.indent(text, "    ")  # a code block in TensorBoard's Markdown
        self._write_json("config.json", dataclasses.asdict(config))

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes the last line of metrics.jsonl and then summary.json, which marks the run as finished."""
        self._flush()
        self._sync()
        self._write_json("summary.json", summary)

    def sync(self) -> dict[str, Any]:
        """Makes metrics.jsonl hold all lines but the newest, whose step may still get values; returns the newest."""
        self._sync()
        return dict(self._row)

    def _sync(self) -> None:
        if self._active:
            self._events.sync()
            self._metrics.sync()

    def resume(self, step: int, row: dict[str, Any]) -> None:
        """Truncates metrics.jsonl and the events to their state at `step`, when `sync` returned `row`."""
        path = self.workdir / "metrics.jsonl"
        self._row = dict(row)
        if self._active:
            lines = (
                path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
            )
            steps = list(map(_parse_step, lines))
            if damaged := sum(map(math.isnan, steps)):
                self.warning(f"metrics.jsonl: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
            first_step = row.get("step", step + 1)
            kept = [line for line, at in zip(lines, steps) if at < first_step]
            self._metrics.replace("".join(kept).encode())
            self._events.start(self._config, first_step)
        # Compilation and a rewound part of the run do not count when estimating the remaining time.
        self._start = self._last_line = time.monotonic()
        self._bar.reset()
        self._bar.initial = self._bar.n = self._first_step = step

    def scalars(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Adds values to the line of metrics.jsonl for `step`. Steps must not decrease; each has one line."""
        if self._row and self._row["step"] != step:
            self._flush()
        self._row |= {"step": step, "epoch": epoch, **values}

    def _flush(self) -> None:
        if self._active and self._row:
            self._events.scalars(self._row)
            self._metrics.append(json.dumps(_nonfinite_to_null(self._row), allow_nan=False).encode() + b"\n")
        self._row = {}

    def plot(self, name: str, draw: Callable[[], Any], step: int) -> None:
        """Saves a plot as `<name>.png` and as a TensorBoard image. Any failure is only a warning.

        Args:
          name: the file's name without its suffix.
          draw: returns the matplotlib Figure; called only in the process that writes.
          step: the training step that the plot shows.
        """
        if self._active and (png := drawing.save(self.workdir / f"{name}.png", draw, self.warning)):
            self._events.image(name, png, step)

    def table(self, name: str, text: str) -> None:
        """Writes `<name>.csv`."""
        if self._active:
            storage.replace(self.workdir / f"{name}.csv", text.encode())

    def progress(self, step: int, loss: float, examples_per_second: float) -> None:
        """Shows progress: a bar on a terminal, else a line every 10 seconds."""
        speed = f"{examples_per_second:,.0f} examples/s"
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
