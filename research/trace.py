"""Traces of `jax.profiler`: the operations of compiled programs, and the waits for data."""

import bisect
import collections
import gzip
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

WAITING_FOR_DATA = "waiting for data"  # the name of its annotation
# The opcodes of collectives, as a regular expression.
COLLECTIVES = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
)
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


def start(folder: Path) -> None:
    """Starts a trace, which `jax.profiler.stop_trace` writes into a local folder."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing every call of Python would slow the host down
    jax.profiler.start_trace(str(folder), profiler_options=options)


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
            # A GPU's event is named after a kernel.
            instruction = event.get("args", {}).get("hlo_op", event["name"]).removeprefix("%").partition(" ")[0]
            name = event["name"] if is_named else instruction
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


def collective_seconds(events: Iterable[Event], program: str) -> float:
    """Sums the time of the collectives over all tracks.

    Args:
      events: as `read`.
      program: the compiled program's text, which has their opcodes: that of `lax.psum` may be named "psum.3".
    """
    names = re.findall(rf"^\s*(?:ROOT )?%?([\w.-]+) = .*? (?:{COLLECTIVES})(?:-start|-done)?\(", program, re.MULTILINE)
    # libtpu's fusion of a reduce-scatter is named after an all-reduce.
    found = self_seconds(events).items()
    return sum(spent for name, spent in found if name in set(names) or re.match(COLLECTIVES, name))
