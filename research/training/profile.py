"""Profiles chosen train steps (--profile=FIRST:LAST): a trace for TensorBoard and Perfetto, and where the time goes."""

import bisect
import collections
import gzip
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from research.data.pipeline import WAITING_FOR_DATA
from research.errors import UserError
from research.record import storage
from research.training.callbacks import Callback
from research.training.run import Training

_ROWS, _KINDS = 10, 5  # operations in the table, and kinds of them
_END = "end: "
_CONTAINERS = ("while", "call", "conditional")


class Event(NamedTuple):
    """An operation of a compiled program on a device, or a wait for data.

    Attributes:
      name: of the HLO instruction, such as "fusion.3", or `WAITING_FOR_DATA`.
      track: the thread or queue that it ran on; events of one track are nested or follow each other.
      start, end: in seconds.
    """

    name: str
    track: str
    start: float
    end: float


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
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing every call of Python would slow the host down
            jax.profiler.start_trace(self._local.name, profiler_options=options)
            self._began = time.monotonic()
        elif run.progress.step == self.last and self._local:
            seconds = time.monotonic() - self._began
            jax.profiler.stop_trace()
            local, self._local = self._local, None
            with local:
                lines = table(read(Path(local.name)), seconds, self.last - self.first, run.train_program.as_text())
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


def read(folder: Path) -> list[Event]:
    """Returns the operations of the trace in a folder, and the waits for data."""
    # The JSON file of the trace: reading the other one, xplane.pb, aborts the process in jaxlib 0.12.
    (path,) = folder.rglob("*.trace.json.gz")
    events, ends = [], collections.defaultdict(list)
    for event in _events(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]):
        if event.name.startswith(_END):
            ends[event.name.removeprefix(_END)].append(event.end)
        else:
            events.append(event)
    for times in ends.values():
        times.sort()
    return [_until_end(event, ends.get(event.name, ())) for event in events]


def _until_end(event: Event, ends: Sequence[float]) -> Event:
    """Returns the event until the first of `ends` after its start, if there is one, on a track of its own."""
    # A CPU computes large products and copies in other threads: the event only starts them, and one of another name
    # marks their end. That of a loop or call would count its operations twice.
    if event.name.startswith(_CONTAINERS):
        return event
    after = ends[bisect.bisect_left(ends, event.start) :][:1]
    return event._replace(end=after[0], track=f"{event.track} {event.name}") if after else event


def _events(trace: list[dict[str, Any]]) -> Iterator[Event]:
    # "M" names a process or thread, "X" is a complete event; times are in microseconds.
    named = [e for e in trace if e.get("ph") == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}
    for event in trace:
        if event.get("ph") != "X":
            continue
        pid, tid = event["pid"], event["tid"]
        # On a TPU one line has all operations; on CPUs and GPUs, operations carry the name of their instruction.
        is_operation = processes.get(pid, "").startswith("/device:TPU") and threads.get((pid, tid)) == "XLA Ops"
        is_named = event["name"] == WAITING_FOR_DATA or event["name"].startswith(_END)
        if is_operation or is_named or "hlo_op" in event.get("args", {}):
            name = event["name"] if is_named else event["name"].removeprefix("%").partition(" ")[0]
            yield Event(name, f"{pid} {tid}", event["ts"] / 1e6, (event["ts"] + event.get("dur", 0)) / 1e6)


def self_seconds(events: Iterable[Event]) -> dict[str, float]:
    """Sums the time of each operation over all tracks, without that of operations within it, as in a loop."""
    totals: dict[str, float] = collections.defaultdict(float)
    enclosing: list[Event] = []
    for event in sorted(events, key=lambda e: (e.track, e.start, -e.end)):
        while enclosing and (enclosing[-1].track != event.track or enclosing[-1].end <= event.start):
            enclosing.pop()
        totals[event.name] += event.end - event.start
        if enclosing:
            totals[enclosing[-1].name] -= event.end - event.start
        enclosing.append(event)
    return totals


def busy_seconds(events: Iterable[Event]) -> float:
    """Returns the time during which at least one of the events runs."""
    total, until = 0.0, -math.inf
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def table(events: list[Event], seconds: float, steps: int, program: str) -> list[str]:
    """Returns the lines of the table.

    Args:
      events: as `read`.
      seconds: wall time of the trace.
      steps: the number of train steps in it.
      program: the compiled program's text, which names the source of each operation.
    """
    operations = [e for e in events if e.name != WAITING_FOR_DATA]
    busy = busy_seconds(operations)
    waiting = busy_seconds(events) - busy  # on an accelerator, data are often read while it computes
    shares = {"on devices": busy, WAITING_FOR_DATA: waiting, "other work of the host": max(0, seconds - busy - waiting)}
    parts = ", ".join(f"{name} {part / seconds:.1%}" for name, part in shares.items())
    totals = self_seconds(operations)
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
