"""Reads a run's config.json, and compares it with the config of a command that resumes or evaluates the run."""

import dataclasses
from collections.abc import Callable
from typing import Any

from research.config import Config, assign, walk
from research.errors import UserError


def load(config: Config, values: dict[str, Any], source: str) -> Config:
    """Sets every field of `config`, in place, from the values in config.json, and returns it.

    Args:
      config: a config of the experiment's type.
      values: the parsed config.json, which `dataclasses.asdict` wrote.
      source: the file's name, for the error.

    Raises:
      UserError: `values` has other fields or types than `config`.
    """
    for path, field, _ in walk(config):
        value: Any = values
        for name in path.split("."):
            value = value.get(name, dataclasses.MISSING) if isinstance(value, dict) else dataclasses.MISSING
        kind: Any = field.type
        if not isinstance(value, (kind, int) if kind in (float, float | None) else kind):
            raise UserError(f"{source} is of another experiment or version: {path} is missing or has another type")
        assign(config, path, value)
    if dataclasses.asdict(config) != values:
        raise UserError(f"{source} is of another experiment or version: it has unknown fields")
    return config


def _check_same(config: Config, earlier: Config, workdir: str, allowed: tuple[str, ...]) -> None:
    pairs = zip(walk(config), walk(earlier))
    differing = [
        f"{path} {old!r} there, {new!r} here"
        for (path, field, new), (_, _, old) in pairs
        if new != old and field.metadata["may_change"] not in allowed
    ]
    if differing:
        raise UserError(
            f"--workdir={workdir} holds a run with another config: {'; '.join(differing)}. Give another --workdir, or "
            "omit these flags"
        )


def check_evaluates(config: Config, earlier: Config, workdir: str) -> None:
    """Raises `UserError` if `config` differs from the run's in fields that an evaluation may not change."""
    _check_same(config, earlier, workdir, ("evaluation", "resume"))


def check_resumes(config: Config, earlier: Config, workdir: str, num_train_steps: Callable[[Config], int]) -> None:
    """Raises `UserError` if `config` differs from the run's in fields that a resumed run may not change.

    `num_train_steps` returns the length of a config's training, which may only increase.
    """
    _check_same(config, earlier, workdir, ("resume",))
    if num_train_steps(config) < num_train_steps(earlier):
        (name, value), (earlier_name, earlier_value) = config.length, earlier.length
        raise UserError(
            f"--config.{name}={value}: the run in --workdir={workdir} has {earlier_name}={earlier_value} "
            f"({num_train_steps(earlier):,} steps), which a resumed run can only increase"
        )
