"""The record of a run: config.json, metrics.jsonl and summary.json in the workdir, and progress on the terminal."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from research.errors import UserError

_SECONDS_BETWEEN_PLAIN_LINES = 10.0


def create_workdir(workdir: Path) -> list[Path]:
    """Makes the folder of a new run and claims it, so that no other run can have it.

    Returns:
      What was made: what `discard` removes again if the run never starts.

    Raises:
      UserError: it cannot be written, or holds a run already.
    """
    metrics = workdir / "metrics.jsonl"
    try:
        made = [path for path in (metrics, workdir, *workdir.parents) if not path.exists()]
        workdir.mkdir(parents=True, exist_ok=True)
        metrics.open("x").close()
    except OSError as error:
        if isinstance(error, FileExistsError) and metrics.exists():
            raise UserError(f"--workdir={workdir} already holds a run: give a folder of its own") from None
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    return made


def discard(made: list[Path]) -> None:
    """Removes a new run's folders, the innermost first, as far as they hold nothing else."""
    metrics, *folders = made
    metrics.unlink(missing_ok=True)
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _standard(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON can have it: a number that is not finite becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}


class Writer:
    """Writes one run's record; only process 0 has an active one.

    Args:
      workdir: an existing folder.
      num_train_steps: the length of the progress bar.
      active: whether this process writes at all.
    """

    def __init__(self, workdir: Path, num_train_steps: int, *, active: bool):
        self._workdir = workdir
        self._active = active
        self._total = num_train_steps
        self._row: dict[str, Any] = {}
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(total=num_train_steps, unit="step", dynamic_ncols=True, disable=None if active else True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._bar.close()

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        if self._active:
            (self._workdir / name).write_text(json.dumps(_standard(value), indent=2, allow_nan=False) + "\n")

    def config(self, config: Any) -> None:
        """Writes config.json."""
        self._write_json("config.json", dataclasses.asdict(config))

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        self._write_json("summary.json", summary)

    def scalars(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Adds to the line of metrics.jsonl for `step`; steps must come in order, and each gets one line."""
        if self._row and self._row["step"] != step:
            self._flush()
        self._row |= {"step": step, "epoch": epoch, **values}

    def _flush(self) -> None:
        if self._active and self._row:
            with (self._workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(_standard(self._row), allow_nan=False) + "\n")
        self._row = {}

    def progress(self, step: int, loss: float, examples_per_second: float) -> None:
        """Shows how far training is: a bar on a terminal, else a line now and then."""
        speed = f"{examples_per_second:,.0f} examples/s"
        self._bar.set_postfix_str(f"loss {loss:.4f}, {speed}", refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and self._active and now - self._last_line > _SECONDS_BETWEEN_PLAIN_LINES:
            self._last_line = now
            left = tqdm.format_interval((now - self._start) / step * (self._total - step))
            self.message(f"step {step:,}/{self._total:,}  loss {loss:.4f}  {speed}  {left} left")

    def message(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
