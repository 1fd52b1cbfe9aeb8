"""Declares, checks and walks over the fields of config dataclasses: help texts, bounds and other properties."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from research.errors import UserError

_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    step_input: bool = False,
    constant_default: bool = False,
    signature: bool = True,
    may_change: str = "never",
    not_searchable: str = "",
    decides_others: bool = False,
    record_only: bool = False,
) -> Any:
    """Declares a dataclass field with everything that the code needs to know about it; no other list names fields.

    Args:
      default: the default value.
      help: the help text.
      choices: the values that a string may have; empty: any.
      minimum, above, maximum, below: bounds; `minimum` and `maximum` are themselves allowed.
      step_input: the number is a traced argument of the train step, not a compile-time constant, unless it is 0
        (`training/hyperparams.py`).
      constant_default: with `step_input`, for fields of the optimizer: the default is a compile-time constant, too.
      signature: whether another value needs another compiled program, if it is not a `step_input`.
      may_change: whether the value may differ from that of the recorded run: "never", on "evaluation", or on "resume"
        (and evaluation).
      not_searchable: why a sweep cannot vary the field; empty: it can.
      decides_others: defaults of other fields follow from it, so `--reproduce` refuses another value.
      record_only: whether it only affects the record, or where a run goes back or ends, not a step; refused by commands
        that write no record.
    """
    assert may_change in ("never", "evaluation", "resume")
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "step_input": step_input,
        "constant_default": constant_default,
        "signature": signature,
        "may_change": may_change,
        "not_searchable": not_searchable,
        "decides_others": decides_others,
        "record_only": record_only,
    }
    return dataclasses.field(default=default, metadata=metadata)


def is_on(value: Any) -> bool:
    """Returns whether a number is not 0, which turns a feature off; a traced one counts (`training/hyperparams.py`)."""
    return not isinstance(value, (int, float)) or value != 0


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yields (path, field, value) of every leaf field, as in ("optimizer.name", Field, "adam")."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value


def assign(config: Any, path: str, value: Any) -> None:
    """Sets the field at a dotted path in place: `assign(config, "optimizer.name", "adam")`."""
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, value)


def check_fields(options: Any, prefix: str) -> None:
    """Raises `UserError` for the first field of a dataclass that is out of bounds; its flag is `prefix` + its path."""
    for path, field, value in walk(options, prefix):
        if value is not None:
            _check_bounds(path, field.metadata, value)


def _check_bounds(flag: str, metadata: Any, value: Any) -> None:
    if metadata["choices"] and value not in metadata["choices"]:
        raise UserError(f"{flag}={value!r}: use one of {', '.join(repr(c) for c in metadata['choices'])}")
    smallest, largest = _FLOAT32
    if isinstance(value, float) and value and not smallest <= abs(value) <= largest:
        raise UserError(f"{flag}={value}: must be 0 or a finite float32, {smallest:.1e} to {largest:.1e}")
    tests = {
        "minimum": ("at least", lambda bound: value >= bound),
        "above": ("above", lambda bound: value > bound),
        "maximum": ("at most", lambda bound: value <= bound),
        "below": ("below", lambda bound: value < bound),
    }
    for name, (words, holds) in tests.items():
        bound = metadata[name]
        if bound is not None and not holds(bound):
            raise UserError(f"{flag}={value}: must be {words} {bound}")
