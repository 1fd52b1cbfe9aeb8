"""Stop signals (SIGTERM, SIGINT, SIGHUP): training stops after the current dispatch and saves a checkpoint.

A signal is only noted here. `Training.dispatches` (training/run.py) polls for it, and `Loop.train_epoch`
(training/loop.py) saves the checkpoint and ends the run.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from research.errors import UserError


class StoppedError(UserError):
    """A signal ended the run; the exit code is 128 + the signal's number, as in a shell."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.exit_code = 128 + number


class Signals:
    """Handles stop signals: at once by default, between dispatches within `deferred`.

    Attributes:
      received: the first signal within `deferred`, or the one that raised `StoppedError`; None before any.
      is_distributed: whether this is one of several processes, which must stop at the same step. A deferred signal is
        then sent on as SIGTERM, for which JAX's preemption service listens; see `distributed.asked_to_stop`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.is_distributed = False
        self._is_deferring = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number)
        if not self._is_deferring or self.received:  # a second signal means stop now
            self.received = name
            raise StoppedError(f"stopped by {name.name}", number)
        if self.is_distributed:
            self._is_deferring = False
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.received = name

    @contextmanager
    def handled(self) -> Iterator["Signals"]:
        """Installs the handlers: within it a signal raises `StoppedError`. Restores the earlier handlers afterwards.

        Python allows handlers only in the main thread; in another one this installs none.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator["Signals"]:
        """Within it the first signal only sets `received`; the second raises `StoppedError`."""
        # An earlier signal's StoppedError may have been swallowed by some library's `except Exception`. One process
        # then still stops by `received`; several, which stop only by agreement, would go on, so raise it again.
        if self.is_distributed and self.received:
            raise StoppedError(f"stopped by {self.received.name}", self.received)
        self._is_deferring = True
        try:
            yield self
        finally:
            self._is_deferring = False
