"""How many steps one call of the compiled program makes."""

import jax

from research.config import Config
from research.process import distributed

_SECONDS_PER_DISPATCH = 0.5
_MOST_AGREEMENTS = 8  # dispatches by which several processes find their pace
_MOST_STEPS_PER_DISPATCH = {True: 512, False: 8}  # by whether the data set is resident: streamed batches take memory


def most_steps(config: Config, *, resident: bool, steps_per_epoch: int) -> int:
    """How many steps a dispatch can make: what the compiled program is made for."""
    return min(config.steps_per_dispatch or _MOST_STEPS_PER_DISPATCH[resident], steps_per_epoch)


class Pace:
    """How many steps the next dispatch makes: as configured, or about half a second's worth."""

    def __init__(self, config: Config, *, resident: bool, steps_per_epoch: int):
        self.capacity = most_steps(config, resident=resident, steps_per_epoch=steps_per_epoch)
        self._adapts = not config.steps_per_dispatch
        self._agreements = _MOST_AGREEMENTS
        self.steps = 1 if self._adapts else self.capacity

    def measured(self, num_steps: int, seconds: float) -> None:
        if jax.process_count() > 1:
            # All processes must dispatch alike, so they go by the first one's clock; once it is known, nobody waits.
            self._adapts = self._adapts and self._agreements > 0
            self._agreements -= 1
            seconds = distributed.from_first(seconds) if self._adapts else seconds
        if self._adapts:
            self.steps = max(1, min(self.capacity, int(_SECONDS_PER_DISPATCH * num_steps / seconds)))
