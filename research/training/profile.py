"""Profiles chosen train steps (--profile=FIRST:LAST): a trace for TensorBoard and Perfetto, and where the time goes."""

import collections
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
from tqdm import tqdm

from research import trace
from research.errors import UserError
from research.record import storage
from research.training.callbacks import Callback
from research.training.run import Training

_ROWS, _KINDS = 10, 5  # operations in the table, and kinds of them


class Profile(Callback):
    """Traces the steps after `first`, up to `last`, in the first process; writes the trace and prints a table.

    Args:
      first, last: numbers of steps made, as the progress shows them.
      folder: of the trace.
    """

    every_steps = 0

    def __init__(self, first: int, last: int, folder: Path):
        self.first, self.last, self.at_steps = first, last, (first, last)
        self._folder = folder
        self._local: tempfile.TemporaryDirectory | None = None  # of the trace, while there is one
        self._is_due = jax.process_index() == 0  # one trace, even if the run goes back to an earlier step
        self._began = 0.0

    def on_start(self, run: Training) -> None:
        # A warning, since a launcher restarts the same command after a preemption.
        if self._is_due and run.progress.step >= self.first:
            self._is_due = False
            self._warn(f"the run resumes at step {run.progress.step}: nothing is profiled")

    def on_step(self, run: Training, metrics: dict[str, float]) -> str | None:
        if run.progress.step == self.first and self._is_due:
            self._is_due = False
            self._local = tempfile.TemporaryDirectory()
            trace.start(Path(self._local.name))
            self._began = time.monotonic()
        elif run.progress.step == self.last and self._local:
            seconds = time.monotonic() - self._began
            jax.profiler.stop_trace()
            local, self._local = self._local, None
            with local:
                lines = table(
                    trace.read(Path(local.name)), seconds, self.last - self.first, run.train_program.as_text()
                )
                self._save(Path(local.name))
            head = f"profile of the steps {self.first + 1:,} to {self.last:,}: {self._folder}"
            tqdm.write("\n".join([head, *lines]), file=sys.stdout)

    def close(self) -> None:
        if self._local:
            jax.profiler.stop_trace()
            self._local.cleanup()
            self._local = None
            self._warn(f"the run ended before step {self.last}: nothing was written")

    def _save(self, local: Path) -> None:
        # The profiler itself writes to local folders only, and a workdir may be on an object store.
        for path in filter(Path.is_file, local.rglob("*")):
            target = self._folder / path.relative_to(local)
            target.parent.mkdir(parents=True, exist_ok=True)
            storage.replace(target, path.read_bytes())

    def _warn(self, text: str) -> None:
        tqdm.write(f"WARNING: --profile={self.first}:{self.last}: {text}", file=sys.stderr)


def make(text: str, num_train_steps: int, workdir: Path) -> Profile:
    """Makes the callback of --profile=FIRST:LAST.

    Raises:
      UserError: it is not two increasing steps of training.
    """
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first < last <= num_train_steps:
        raise UserError(
            f"--profile={text}: give FIRST:LAST, to profile the steps after FIRST up to LAST, with 1 <= FIRST < LAST "
            f"<= {num_train_steps}, the number of train steps"
        )
    return Profile(first, last, workdir / "profile")


def table(events: list[trace.Event], seconds: float, steps: int, program: str) -> list[str]:
    """Returns the lines of the table.

    Args:
      events: as `trace.read`.
      seconds: wall time of the trace.
      steps: the number of train steps in it.
      program: the compiled program's text, which names the source of each operation.
    """
    operations = [e for e in events if e.name != trace.WAITING_FOR_DATA]
    busy = trace.busy_seconds(operations)
    waiting = trace.busy_seconds(events) - busy  # on an accelerator, data are often read while it computes
    shares = {
        "on devices": busy,
        trace.WAITING_FOR_DATA: waiting,
        "other work of the host": max(0, seconds - busy - waiting),
    }
    parts = ", ".join(f"{name} {part / seconds:.1%}" for name, part in shares.items())
    totals = trace.self_seconds(operations)
    kinds: dict[str, float] = collections.defaultdict(float)
    whole = sum(totals.values())
    for name, spent in totals.items():
        kinds[re.sub(r"[.\d]+$", "", name)] += spent / whole
    lines = [
        f"  {1e3 * seconds / steps:,.2f} ms per step: {parts}",
        "  operations by kind: " + ", ".join(f"{kind} {share:.1%}" for kind, share in _largest(kinds, _KINDS)),
        "  ms per step   share  operation",
    ]
    sources = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', program, re.MULTILINE))
    for name, spent in _largest(totals, _ROWS):
        source = "/".join(sources.get(name, "").split("/")[-2:])
        lines.append(f"  {1e3 * spent / steps:11.3f}  {spent / whole:6.1%}  {name}  {source}".rstrip())
    return lines


def _largest(seconds: dict[str, float], count: int) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])[:count]
