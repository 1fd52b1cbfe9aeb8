"""Callbacks: an experiment's own code at chosen steps, after every epoch and at the end, which may stop the run."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.errors import UserError
from research.process import distributed
from research.training.run import Training


class Callback:
    """The hooks of a run, all of which do nothing here. `Experiment.callbacks` makes a run's callbacks.

    Every process calls every hook, at the same steps. `run.state` is the state of that step, `run.progress` how far the
    run is; `run.evaluate()` and `run.predictor()` work in every hook, if all processes call them.

    A hook that returns a string stops the run; the string is the reason. If any process returns one, all stop, at this
    step: the run is evaluated, saved and summarized as at its last step. An exception ends the run with its traceback;
    the newest checkpoint is intact, and a resumed run repeats the steps and hooks since.

    Attributes:
      every_steps: `on_step` is called at the multiples of this; 0: only at `at_steps`. A dispatch, otherwise about half
        a second's worth of steps, ends there, so small numbers are slow for small networks. With several processes each
        call is also a collective.
      at_steps: further steps at which `on_step` is called.
      state: JSON values, {} at first, that the hooks may read and change. Every checkpoint holds them, those of the
        first process if there are several; other attributes are lost when a run is killed.
    """

    every_steps: int = 1
    at_steps: Sequence[int] = ()
    state: dict[str, Any]

    def on_start(self, run: Training) -> None:
        """Called before training starts or resumes, and before the steps are compiled; may raise `UserError`."""

    def on_step(self, run: Training, metrics: dict[str, float]) -> str | None:
        """Called after a step with its metrics, such as "loss" and "grad_norm"."""

    def on_epoch(self, run: Training, results: dict[str, float]) -> str | None:
        """Called after the evaluation of an epoch with its results, such as "train_loss" and "validation_accuracy"."""

    def on_end(self, run: Training, summary: dict[str, Any]) -> None:
        """Called after training, before summary.json is written; not if an error or a signal ends the run."""

    def close(self) -> None:
        """Called last, however the run ends, to release what the hooks have opened."""


_Hook = Callable[[Callback], str | None]


class Callbacks:
    """The callbacks of one run.

    Args:
      callbacks: in the order in which they are called.

    Attributes:
      every_steps: the multiples of steps at which a callback is called.
      at_steps: further steps at which one is called.

    Raises:
      UserError: an `every_steps` is negative.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        # The position, too: a run may have several callbacks of one class.
        self._callbacks = {f"{i}.{type(callback).__name__}": callback for i, callback in enumerate(callbacks)}
        self._on_step = {n: c for n, c in self._callbacks.items() if type(c).on_step is not Callback.on_step}
        self.every_steps = [callback.every_steps for callback in self._on_step.values()]
        self.at_steps = [step for callback in self._on_step.values() for step in callback.at_steps]
        for name, callback in self._on_step.items():
            if callback.every_steps < 0:
                raise UserError(f"callback {name}: every_steps={callback.every_steps} must be at least 0")

    def on_start(self, run: Training) -> None:
        """Calls all of them."""
        _call(run, self._callbacks, lambda callback: callback.on_start(run))

    def close(self) -> None:
        """Calls all of them."""
        for callback in self._callbacks.values():
            callback.close()

    def on_step(self, run: Training, metrics: dict[str, np.ndarray]) -> None:
        """Calls those that are due at the newest step; the metrics are of the newest steps, [k] each."""
        due = {n: c for n, c in self._on_step.items() if _is_due(c, run.progress.step)}
        if due:
            newest = {name: float(values[-1]) for name, values in metrics.items()}
            self._call_and_stop(run, due, lambda callback: callback.on_step(run, newest))

    def on_epoch(self, run: Training, results: dict[str, float]) -> None:
        """Calls all of them."""
        self._call_and_stop(run, self._callbacks, lambda callback: callback.on_epoch(run, results))

    def on_end(self, run: Training, summary: dict[str, Any]) -> None:
        """Calls all of them."""
        self._call_and_stop(run, self._callbacks, lambda callback: callback.on_end(run, summary))

    def _call_and_stop(self, run: Training, callbacks: dict[str, Callback], hook: _Hook) -> None:
        """Calls a hook; if it requests a stop in any process, stores the reason in the run's progress."""
        if not callbacks:
            return
        reasons = _call(run, callbacks, hook)
        if distributed.in_any_process(bool(reasons)):
            run.progress.stopped = "; ".join(reasons) or "a callback of another process"


def _call(run: Training, callbacks: dict[str, Callback], hook: _Hook) -> list[str]:
    """Calls a hook, with the callbacks' states of the run's progress; returns the reasons to stop that it gave."""
    states, reasons = run.progress.callbacks, []
    for name, callback in callbacks.items():
        # Set before each call: resuming and rewinding replace the run's progress.
        callback.state = states.get(name, {})
        if why := hook(callback):
            reasons.append(f"{type(callback).__name__}: {why}")
        # As a resumed run reads it: keys are strings, and tuples are lists.
        states[name] = json.loads(json.dumps(callback.state))
    return reasons


def _is_due(callback: Callback, step: int) -> bool:
    return step in callback.at_steps or (callback.every_steps > 0 and step % callback.every_steps == 0)
