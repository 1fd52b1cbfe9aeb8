"""Checks a config that a program has set: the names of its fields, and the types of their values."""

import copy
import dataclasses
from typing import Any

from research.config import Config, assign, walk
from research.errors import UserError
from research.experiment import Experiment
from research.flags import nearest


def checked_copy(experiment: Experiment, config: Any) -> Any:
    """Returns a copy of a config in which every value has the type of its field.

    Numbers of NumPy and JAX become Python's, an int becomes a float where the field is one, a list a tuple.

    Raises:
      UserError: it is not a config of the experiment, something that is not a field was set, or a value has another
        type. The bounds are not checked (`research.config.check`).
    """
    default = experiment.default_config
    if not isinstance(config, Config):
        what = "a function; call it" if callable(config) else f"of type {type(config).__name__}"
        raise UserError(f"config is {what}: give a Config, such as {experiment.name}'s experiment.default_config")
    known = [path for path, _, _ in walk(default)]
    given = {path: (field, value) for path, field, value in walk(config)}
    if missing := [path for path in known if path not in given]:
        raise UserError(
            f"this config ({type(config).__name__}) has no field {missing[0]}, which the configs of {experiment.name} "
            f"have ({type(default).__name__}): start from experiment.default_config"
        )
    for path in _attributes(config):
        if path not in known:
            near = nearest(path, known)
            raise UserError(f"config.{path} is not a field" + (f": did you mean config.{near[0]}?" if near else ""))
    config = copy.deepcopy(config)
    for path, (field, value) in given.items():
        assign(config, path, _converted(path, field.type, value))
    return config


def _attributes(config: Any, prefix: str = "") -> list[str]:
    """Returns the paths of all attributes that are set, whether they are fields or not."""
    paths = []
    for name, value in vars(config).items():
        is_group = dataclasses.is_dataclass(value)
        paths += _attributes(value, f"{prefix}{name}.") if is_group else [f"{prefix}{name}"]
    return paths


def _converted(path: str, kind: Any, value: Any) -> Any:
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if kind == tuple[str, ...]:
        kind, value = tuple, tuple(value) if isinstance(value, list) else value
    elif kind in (float, float | None) and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"config.{path}={value!r}: must be of type {getattr(kind, '__name__', kind)}")
    return value
