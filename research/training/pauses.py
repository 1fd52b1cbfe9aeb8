"""The steps within an epoch at which training pauses: to evaluate, to save a checkpoint, to call a callback."""

import math
import time
from collections.abc import Sequence

from research.config import Config
from research.process import distributed


class Pauses:
    """Chooses the steps within an epoch at which training pauses, the same ones in every process.

    Args:
      config: its `eval_every_steps`, `checkpoint_every_steps` and `checkpoint_every_minutes` are used.
      callback_periods: numbers of steps at whose multiples training also pauses, for callbacks.
      at_steps: further steps at which it pauses.
    """

    def __init__(self, config: Config, callback_periods: Sequence[int] = (), at_steps: Sequence[int] = ()):
        self._callback_periods, self._at_steps = callback_periods, at_steps
        self._eval_every = config.eval_every_steps
        self._checkpoint_every = config.checkpoint_every_steps
        self._seconds = 60 * config.checkpoint_every_minutes
        self.restart(0)

    def restart(self, step: int) -> None:
        """Starts the clock of `checkpoint_every_minutes`: at a checkpoint of `step`, or where training starts."""
        self._saved_step, self._saved_time = step, time.monotonic()
        self._clock_step = step + 1

    def next(self, step: int, end: int) -> int:
        """Returns the first step after `step` at which training pauses, at most `end`, the end of the epoch."""
        periods = (self._eval_every, self._checkpoint_every, *self._callback_periods)
        multiples = [(step // every + 1) * every for every in periods if every]
        clock = [max(self._clock_step, step + 1)] if self._seconds else []
        return min([end, *multiples, *clock, *(at for at in self._at_steps if at > step)])

    def evaluates(self, step: int) -> bool:
        """Returns whether an evaluation is due at this step."""
        return bool(self._eval_every) and step % self._eval_every == 0

    def saves(self, step: int) -> bool:
        """Returns whether a checkpoint is due at this step. All processes call it at the same steps."""
        if self._checkpoint_every and step % self._checkpoint_every == 0:
            return True
        return bool(self._seconds) and step >= self._clock_step and self._is_time(step)

    def _is_time(self, step: int) -> bool:
        # Clocks differ between processes, so that of the first one counts. Asking it waits for the devices: hence not
        # after each dispatch, but at the step at which the time will be up at the speed so far.
        passed = time.monotonic() - self._saved_time
        steps_per_second = (step - self._saved_step) / max(passed, 1e-9)
        steps_left = distributed.from_first(max(0, math.ceil((self._seconds - passed) * steps_per_second)))
        self._clock_step = step + max(1, int(steps_left))
        return steps_left == 0
