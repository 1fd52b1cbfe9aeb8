"""Which numbers of a Config are inputs of the train step, so that one compiled program serves all their values.

A field declared with `step_input` (`research.config.option`) is one, unless it is 0: that turns something off, and what
is off is not in the program. The seed and the schedule's end points, which follow from `optimizer.warmup`, are inputs
too (`signature=False`). All else is part of the program: its `signature`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from research import config as config_lib
from research import optimizers
from research.config import Config

Inputs = Mapping[str, Any]
SEED, BOUNDARIES, DROPOUT = "seed", "optimizer.boundaries", "model.dropout"


def inputs(config: Config, num_train_steps: int) -> dict[str, Any]:
    """The inputs by the paths of their fields.

    Args:
      config: resolved.
      num_train_steps: the schedule's length.

    Returns:
      "seed" uint32, "optimizer.boundaries" int32 [n] (`research.optimizers.boundaries`); all others are float32.
    """
    fields = {path: np.float32(value) for path, field, value in config_lib.walk(config) if _is_input(field, value)}
    boundaries = optimizers.boundaries(config.optimizer, num_train_steps)
    return {**fields, SEED: np.uint32(config.seed), BOUNDARIES: boundaries}


def signature(config: Config) -> tuple[tuple[str, Any], ...]:
    """What decides the compiled program: equal for configs that differ in inputs only."""
    return tuple(
        (path, "input" if _is_input(field, value) else value)
        for path, field, value in config_lib.walk(config)
        if field.metadata["signature"]
    )


def _is_input(field: Any, value: Any) -> bool:
    return field.metadata.get("step_input", False) and bool(value)


def make_optimizer(config: Config, given: Inputs, widths: Any) -> optax.GradientTransformation:
    """The optimiser of a resolved config with the inputs in their places; they may be traced.

    `widths` are those of the task (`Task.widths`).
    """
    prefix = "optimizer."
    numbers = {path.removeprefix(prefix): value for path, value in given.items() if path.startswith(prefix)}
    boundaries = numbers.pop(BOUNDARIES.removeprefix(prefix))
    optimizer = dataclasses.replace(config.optimizer, **numbers)
    return optimizers.make_optimizer(optimizers.scaled(optimizer, config.batch_size), boundaries, widths)
