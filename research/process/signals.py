"""SIGTERM, SIGINT, SIGHUP: a run stops between two dispatches, with a checkpoint; before training it stops at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from research.errors import UserError


class StoppedError(UserError):
    """A signal ended the run; the exit code is 128 + the signal's number, as a shell has it."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.exit_code = 128 + number


class Signals:
    """What the process was asked. Used from the main thread.

    Attributes:
      received: the first signal that came while `deferred`, or one that raised `StoppedError`; else None.
      spreads: whether this is one of several processes, which stop together: while deferred a signal becomes SIGTERM,
        for which jax itself then listens.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.spreads = False
        self._defers = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number)
        if not self._defers or self.received:  # a second signal: somebody is in a hurry
            self.received = name
            raise StoppedError(f"stopped by {name.name}", number)
        if self.spreads:
            self._defers = False
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.received = name

    @contextmanager
    def handled(self) -> Iterator["Signals"]:
        """Within it a signal raises `StoppedError`; afterwards things are as before."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # by nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator["Signals"]:
        """Within it the first signal is only noted in `received`; the second raises `StoppedError`.

        So does one of before, whose own error some `except Exception` took for another's, where processes stop together
        and could not by `received`.
        """
        if self.spreads and self.received:
            raise StoppedError(f"stopped by {self.received.name}", self.received)
        self._defers = True
        try:
            yield self
        finally:
            self._defers = False
