"""What a peer reports of itself: its losses, and how long it took."""

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
      losses: the mean of each epoch.
      seconds: of each epoch.
      device: on what this project ran, as jax names it ("cpu", "NVIDIA H200").
      step_flops: what its compiled train step costs, by `launch.plans.hlo`.
    """

    began: float
    first_step_seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    device: str = ""
    step_flops: float = 0.0

    def step(self) -> None:
        """A step is done; only the first counts."""
        self.first_step_seconds = self.first_step_seconds or time.time() - self.began

    def epoch(self, loss: float, seconds: float) -> None:
        """An epoch is done."""
        self.losses.append(loss)
        self.seconds.append(seconds)

    def passes(self, count: int, once: Callable[[], float]) -> None:
        """Calls `once`, which gives an epoch's figure to be compared, some times."""
        for _ in range(count):
            start = time.monotonic()
            figure = once()
            self.step()
            self.epoch(figure, time.monotonic() - start)

    def report(self) -> dict[str, Any]:
        """All of it, as JSON can have it, and the process's largest resident memory in bytes."""
        # Not `getrusage`: a new process inherits that maximum from the one that started it.
        kib = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        peak = int(kib[0]) * 1024
        return {**dataclasses.asdict(self), "peak_memory_bytes": peak}
