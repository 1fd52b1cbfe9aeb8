"""Which numbers of a Config are traced arguments of the train step, so that one compiled program serves all values.

A field declared with `step_input` (`research.config.option`) is one, unless it is 0: that turns a feature off, and the
program does not contain it. With `constant_default`, a field that has its default is a constant, too. The seed and the
schedule's boundaries, which follow from `optimizer.warmup`, are traced too (`signature=False`). All other fields are
compile-time constants: the program's `signature`.

The step reads them in two places, both here: `make_optimizer`, and `applied` for the task and the network.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import optax
from flax import nnx

from research import config as config_lib
from research import optimizers, parameter_groups
from research.config import Config
from research.layers.dropout import drop_path_rate_of, rate_of
from research.tasks.task import Task

HParams = Mapping[str, Any]
SEED, BOUNDARIES = "seed", "optimizer.boundaries"
DROPOUT, DROP_PATH = "model.dropout", "model.drop_path"


def traced(config: Config, num_train_steps: int) -> dict[str, Any]:
    """Returns the traced hyperparameters by the paths of their fields.

    Args:
      config: resolved.
      num_train_steps: the schedule's length.

    Returns:
      "seed" as uint32, "optimizer.boundaries" as int32 [n] (`research.optimizers.boundaries`), others as float32.
    """
    fields = {
        path: np.float32(value) for path, field, value in config_lib.walk(config) if _is_input(config, field, value)
    }
    boundaries = optimizers.boundaries(config.optimizer, num_train_steps)
    return {**fields, SEED: np.uint32(config.seed), BOUNDARIES: boundaries}


def signature(config: Config) -> tuple[tuple[str, Any], ...]:
    """Returns what the compiled program depends on: equal for configs that differ in traced hyperparameters only."""
    return tuple(
        (path, "input" if _is_input(config, field, value) else value)
        for path, field, value in config_lib.walk(config)
        if field.metadata["signature"]
    )


def _is_input(config: Config, field: Any, value: Any) -> bool:
    if not field.metadata.get("step_input", False) or not value:
        return False
    # 1 - 0.999 has an error of 5e-5 in float32, and a constant none.
    return not (field.metadata["constant_default"] and optimizers.is_default(config.optimizer, field.name))


def make_optimizer(config: Config, hparams: HParams, widths: Any) -> optax.GradientTransformation:
    """Builds the optimizer of a resolved config, with `hparams`, which may be traced, instead of their fields.

    `widths` are those of the task (`Task.widths`). The optimizer is for the parameters that are not frozen.
    """
    prefix = "optimizer."
    numbers = {path.removeprefix(prefix): value for path, value in hparams.items() if path.startswith(prefix)}
    boundaries = numbers.pop(BOUNDARIES.removeprefix(prefix))
    optimizer = dataclasses.replace(config.optimizer, **numbers)
    widths = parameter_groups.trained_only(widths, optimizer)
    return optimizers.make_optimizer(optimizers.scaled(optimizer, config.batch_size), boundaries, widths)


@contextmanager
def applied(task: Task, model: nnx.Module, hparams: HParams) -> Iterator[Task]:
    """Yields the task with `hparams`, which may be traced; within the block the network's dropout has their rates."""
    with rate_of(model, hparams.get(DROPOUT)), drop_path_rate_of(model, hparams.get(DROP_PATH)):
        yield task.with_hparams(hparams)
