"""A run's config as its record has it: read back, and compared with that of a command that resumes the run."""

import dataclasses
from typing import Any

from research.config import Config, assign, walk
from research.errors import UserError


def load(config: Config, values: dict[str, Any], source: str) -> Config:
    """Sets every field of `config`, in place, to what config.json has.

    Args:
      config: of the experiment's type.
      values: what `dataclasses.asdict` gave.
      source: the file, for the error.

    Raises:
      UserError: other fields, or types, than this version's.
    """
    for path, field, _ in walk(config):
        value: Any = values
        for name in path.split("."):
            value = value.get(name, dataclasses.MISSING) if isinstance(value, dict) else dataclasses.MISSING
        kind: Any = field.type
        if not isinstance(value, (kind, int) if kind in (float, float | None) else kind):
            raise UserError(f"{source} is not of this experiment and version: {path} is missing or of another type")
        assign(config, path, value)
    if dataclasses.asdict(config) != values:
        raise UserError(f"{source} is not of this experiment and version: it has fields that are not known here")
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
            "leave these flags out"
        )


def check_evaluates(config: Config, earlier: Config, workdir: str) -> None:
    """Raises `UserError` naming the fields by which `config` would evaluate another run than `workdir` holds."""
    _check_same(config, earlier, workdir, ("evaluation", "resume"))


def check_resumes(config: Config, earlier: Config, workdir: str) -> None:
    """Raises `UserError` naming the fields by which `config` is not that of the run that `workdir` holds."""
    _check_same(config, earlier, workdir, ("resume",))
    if config.num_epochs < earlier.num_epochs:
        raise UserError(
            f"--config.num_epochs={config.num_epochs}: the run in --workdir={workdir} has {earlier.num_epochs} epochs, "
            "and a resumed run can only have more"
        )
