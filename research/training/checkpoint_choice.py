"""Finds the checkpoint that `--checkpoint` names."""

import contextlib

from research.errors import UserError
from research.training.checkpoint import Checkpoints


def find_step(checkpoints: Checkpoints, choice: str) -> int | None:
    """Returns the step of a checkpoint.

    Args:
      checkpoints: of the run.
      choice: "newest", "best" (the lowest validation loss) or a step.

    Returns:
      The step; None for "newest", since `Checkpoints.restore` then falls back from damaged checkpoints.

    Raises:
      UserError: there is no such checkpoint.
    """
    if choice == "newest":
        return None
    steps = checkpoints.steps
    step = _best_step(checkpoints) if choice == "best" else int(choice)
    if step is None:
        raise UserError("--checkpoint=best: the run has no validation loss to choose by; use newest or a step")
    if step not in steps:
        name = f"step {step}, the best" if choice == "best" else f"step {step}"
        raise UserError(
            f"--checkpoint={choice}: there is no checkpoint of {name}; the run has "
            + (f"those of steps {', '.join(map(str, steps))}" if steps else "no checkpoints")
        )
    return step


def best_or_newest(checkpoints: Checkpoints) -> int | None:
    """Returns the step with the lowest validation loss, without one the newest, or None without a checkpoint."""
    steps, best = checkpoints.steps, _best_step(checkpoints)
    return best if best in steps else max(steps, default=None)


def _best_step(checkpoints: Checkpoints) -> int | None:
    """Returns the step with the lowest validation loss, according to the newest record that can be read."""
    for step in reversed(checkpoints.steps):
        with contextlib.suppress(Exception):  # of a damaged checkpoint, which `restore` reports
            best = checkpoints.read_record(step)["progress"]["best"]
            return best[1] if best else None
    return None
