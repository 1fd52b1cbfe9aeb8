"""Workarounds for Orbax: which checkpoints it keeps, when it stops, and what it logs of errors that it also raises.

Importing this module installs the log filters, for the whole process.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy


def _drop_orbax_duplicates(record: logging.LogRecord) -> bool:
    """A logging filter: drops log lines about errors that Orbax also raises, at once or from its background thread."""
    is_duplicate = record.exc_info or str(record.msg).startswith("Metadata file does not exist")
    return not (is_duplicate and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_drop_orbax_duplicates)

_original_hook = sys.unraisablehook


def _ignore_closed_event_loop(unraisable: Any) -> None:
    # When several writes fail, the first failure closes Orbax's event loop; TensorStore's threads then print an error
    # for each of the others, which adds nothing to the one that is raised.
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        _original_hook(unraisable)


sys.unraisablehook = _ignore_closed_event_loop


class KeepNewestAndBest(preservation_policy.PreservationPolicy):
    """Keeps the newest checkpoints, and the one of `best_step()`.

    Orbax's own BestN reads the metrics of every checkpoint at start-up, and fails if one of them is damaged.
    """

    def __init__(self, newest: int, best_step: Callable[[], int | None]):
        self._newest = newest
        self._best_step = best_step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        first = len(checkpoints) - self._newest
        return [i >= first or info.step == self._best_step() for i, info in enumerate(checkpoints)]


class CheckpointManager(ocp.CheckpointManager):
    """Orbax's manager, but it never asks JAX whether to stop: only `distributed.asked_to_stop` does."""

    def reached_preemption(self, step: int) -> bool:
        # JAX makes all processes agree on a number after the last one that it was asked about. Orbax asks with step
        # numbers, the run with its count of polls. If a signal arrived between the two, JAX could agree on a number
        # that the run's count never reaches.
        return False
