"""How many train steps one dispatch (a call of the compiled program) makes."""

import jax

from research.config import Config
from research.process import distributed

_SECONDS_PER_DISPATCH = 0.5
_MAX_AGREEMENTS = 8  # with several processes, the size is adapted after each of the first dispatches only
_MAX_STEPS = 512
_MAX_STREAMED_STEPS = 8
_MAX_STREAMED_BYTES = 2**24  # of the batches of one dispatch, of which several are in memory


def dispatch_capacity(config: Config, *, streamed_bytes: int, longest_epoch: int) -> int:
    """Returns the largest number of steps of a dispatch, for which the program is compiled.

    Args:
      config: may set it.
      streamed_bytes: the size of a step's batch, 0 if the data set is resident.
      longest_epoch: its number of steps.
    """
    most = _MAX_STEPS
    if streamed_bytes:
        most = min(_MAX_STREAMED_STEPS, max(1, _MAX_STREAMED_BYTES // streamed_bytes))
    return min(config.steps_per_dispatch or most, longest_epoch)


class DispatchSizer:
    """Chooses the size of the next dispatch: as configured, or about half a second's worth of steps.

    Attributes:
      capacity: the largest number of steps of a dispatch.
      num_steps: the number of steps of the next dispatch.
    """

    def __init__(self, config: Config, *, streamed_bytes: int, longest_epoch: int):
        self.capacity = dispatch_capacity(config, streamed_bytes=streamed_bytes, longest_epoch=longest_epoch)
        self._adapts = not config.steps_per_dispatch
        self._agreements = _MAX_AGREEMENTS
        self.num_steps = 1 if self._adapts else self.capacity

    def update(self, num_steps: int, seconds: float) -> None:
        """Adapts the size to the duration of the newest dispatch."""
        if jax.process_count() > 1:
            # All processes must dispatch the same number of steps, so they all use the first one's clock. Sharing it
            # costs a collective, so the size is fixed after a few dispatches.
            self._adapts = self._adapts and self._agreements > 0
            self._agreements -= 1
            seconds = distributed.from_first(seconds) if self._adapts else seconds
        if self._adapts:
            self.num_steps = max(1, min(self.capacity, int(_SECONDS_PER_DISPATCH * num_steps / seconds)))
