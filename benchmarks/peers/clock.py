"""The report of a peer: its losses, times and peak memory."""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Clock:
    """The times of one process.

    Attributes:
      began: when the process was started, by `time.time`.
      first_step_seconds: from then to the end of the first step.
      losses: the mean loss of each epoch.
      seconds: the time of each epoch.
      device: this project's device, as jax names it ("cpu", "NVIDIA H200").
      step_flops: FLOPs of its compiled train step, by `launch.plans.hlo`.
    """

    began: float
    first_step_seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    device: str = ""
    step_flops: float = 0.0

    def step(self) -> None:
        """Records the end of a step; only the first matters."""
        self.first_step_seconds = self.first_step_seconds or time.time() - self.began

    def epoch(self, loss: float, seconds: float) -> None:
        """Records an epoch."""
        self.losses.append(loss)
        self.seconds.append(seconds)

    def passes(self, count: int, once: Callable[[], float]) -> None:
        """Calls `once` repeatedly and records each call as an epoch; it returns the value to be compared."""
        for _ in range(count):
            start = time.monotonic()
            value = once()
            self.step()
            self.epoch(value, time.monotonic() - start)

    def report(self) -> dict[str, Any]:
        """Returns everything as JSON-serializable values, with the process's peak resident memory in bytes."""
        # Not `getrusage`: a process inherits that maximum from its parent.
        kib = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        peak = int(kib[0]) * 1024
        return {**dataclasses.asdict(self), "peak_memory_bytes": peak}
