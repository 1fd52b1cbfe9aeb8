"""`--search`: the search space of a sweep, checked before the first trial.

optimizer.learning_rate=log(1e-4,1)     a number, log-uniform
label_smoothing=float(0,0.2)            a number, uniform; in steps with float(0,0.2,step=0.05)
model.width=int(16,64,step=16)          an integer, both bounds included
optimizer.name=[sgd,momentum,adam]      one of a list
search.py                               a Python file: `def search(trial)` calls Optuna's trial.suggest_... with the
                                        names of config fields, or returns a dict of config fields
"""

import copy
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna

from research import config as config_lib
from research.config import Config
from research.errors import UserError
from research.flags import nearest

# Optuna logs each trial, and warns about experimental samplers and pruners that are chosen on purpose.
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", module="optuna")
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)

_NUM_CHECKED_DRAWS = 16  # from a Python file
Distribution = (
    optuna.distributions.FloatDistribution
    | optuna.distributions.IntDistribution
    | optuna.distributions.CategoricalDistribution
)


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """A search space.

    Attributes:
      text: its source, by which workers check that they share one study.
      distributions: the distribution of each config field; {} with a function.
      function: `search` from a Python file, or None.
    """

    text: tuple[str, ...]
    distributions: dict[str, Distribution]
    function: Callable[[optuna.Trial], dict[str, Any] | None] | None = None

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Draws a trial's values, by config field.

        Raises:
          UserError: the Python file's function failed.
        """
        if self.function:
            try:
                return dict(self.function(trial) or trial.params)
            except Exception as error:  # the user's function may raise anything
                raise UserError(f"`search(trial)` failed: {error!r}") from None
        return {path: _suggest(trial, path, distribution) for path, distribution in self.distributions.items()}

    def grid(self) -> list[dict[str, Any]]:
        """All combinations of values.

        Raises:
          UserError: a range has no steps, or the space is a Python file.
        """
        if self.function:
            raise UserError("--sampler=grid: a Python file has no grid; give --search=FIELD=[...] for each field")
        axes = [_points(path, distribution) for path, distribution in self.distributions.items()]
        return [dict(zip(self.distributions, point)) for point in itertools.product(*axes)]


def _suggest(trial: optuna.Trial, path: str, distribution: Distribution) -> Any:
    match distribution:
        case optuna.distributions.FloatDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_float(path, low, high, step=step, log=log)
        case optuna.distributions.IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(path, low, high, step=step, log=log)
        case _:
            return trial.suggest_categorical(path, distribution.choices)


def _points(path: str, distribution: Distribution) -> list[Any]:
    match distribution:
        case optuna.distributions.CategoricalDistribution(choices=choices):
            return list(choices)
        case optuna.distributions.IntDistribution(low=low, high=high, step=step, log=False):
            return list(range(low, high + 1, step))
        case optuna.distributions.FloatDistribution(low=low, high=high, step=float(step)):
            return [low + step * i for i in range(round((high - low) / step) + 1)]
        case _:
            raise UserError(f"--sampler=grid: {path} has no steps; list its values, as in --search={path}=[a,b,c]")


def parse(texts: Sequence[str], config: Config) -> SearchSpace:
    """Parses the values of `--search`.

    Args:
      texts: as in the module's docstring; empty: nothing is varied but the seed.
      config: the experiment's config, whose fields are varied.

    Raises:
      UserError: a field is unknown, given twice or cannot be searched; a range is empty, reversed or exceeds the
        field's bounds; or a Python file cannot be run.
    """
    files = [text for text in texts if text.endswith(".py") and "=" not in text]
    if files and len(texts) > 1:
        raise UserError(f"--search={files[0]}: a Python file must be the only --search; leave the others out")
    if files:
        return _from_file(files[0], config)
    distributions: dict[str, Distribution] = {}
    for text in texts:
        path, _, spec = text.partition("=")
        field = _field(path, config, f"--search={text}")
        if path in distributions:
            raise UserError(f"--search={text}: {path} is given twice")
        distributions[path] = _distribution(f"--search={text}", spec.strip(), field.type)
        for value in _ends(distributions[path]):
            check_value(path, value, config)
    return SearchSpace(tuple(sorted(texts)), distributions)


def _field(path: str, config: Config, where: str) -> dataclasses.Field:
    fields = {name: field for name, field, _ in config_lib.walk(config)}
    if path not in fields:
        near = nearest(path, list(fields))
        raise UserError(f"{where}: no field {path}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    if reason := fields[path].metadata["not_searchable"]:
        raise UserError(f"{where}: {reason}; leave it out")
    return fields[path]


def _distribution(where: str, spec: str, kind: Any) -> Distribution:
    if listed := re.fullmatch(r"\[(.*)\]", spec):
        values = [_value(where, text, kind) for text in listed[1].split(",") if text.strip()]
        if not values or len(set(values)) < len(values):
            raise UserError(f"{where}: list one or more different values, as in [a,b,c]")
        return optuna.distributions.CategoricalDistribution(values)
    called = re.fullmatch(r"(log|float|int)\(([^,]+),([^,]+)(?:,\s*step=([^,]+))?\)", spec)
    if not called:
        raise UserError(f"{where}: expected log(low,high), float(low,high), int(low,high,step=n) or [a,b,c]")
    name, *texts = called.groups()
    is_int = kind is int
    if (name == "int" and not is_int) or (name == "float" and is_int) or kind in (str, bool):
        fitting = "[a,b,c]" if kind in (str, bool) else "int or log" if is_int else "float or log"
        raise UserError(f"{where}: the field is of type {getattr(kind, '__name__', 'float')}; use {fitting}")
    values: list[Any] = [text if text is None else _value(where, text, kind) for text in texts]
    low, high, step = values
    if low >= high:
        raise UserError(f"{where}: the range from {low} to {high} is {'reversed' if low > high else 'empty'}")
    if name == "log" and (low <= 0 or step is not None):
        raise UserError(f"{where}: a logarithmic range {'takes no step' if low > 0 else 'must be above 0'}")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{where}: the step must be above 0 and at most {high - low}")
    if step is not None and not math.isclose((high - low) / step, round((high - low) / step), abs_tol=1e-9):
        raise UserError(f"{where}: the range from {low} to {high} is not a multiple of the step {step}")
    if is_int:
        return optuna.distributions.IntDistribution(low, high, log=name == "log", step=step or 1)
    return optuna.distributions.FloatDistribution(low, high, log=name == "log", step=step)


def _value(where: str, text: str, kind: Any) -> Any:
    text = text.strip().strip("'\"")
    if text == "None" and isinstance(None, kind):
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, str):
            return kind(text)
        value = float(text)
    except (ValueError, KeyError):
        raise UserError(f"{where}: {text!r} is not of type {getattr(kind, '__name__', 'float')}") from None
    if not math.isfinite(value):
        raise UserError(f"{where}: {text} is not a finite number")
    return value


def _ends(distribution: Distribution) -> Sequence[Any]:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return distribution.choices
    return distribution.low, distribution.high


def check_value(path: str, value: Any, config: Config) -> None:
    """Raises `UserError` if the field is unknown, or the value has another type or is out of bounds."""
    field = _field(path, config, "--search")
    kind: Any = field.type
    fitting = kind if kind in (bool, int, str) else kind | int
    if not isinstance(value, fitting) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"--search: {path}={value!r} is not of type {getattr(kind, '__name__', 'float')}")
    if path == "num_epochs" and config.num_steps:
        raise UserError(
            f"--search: num_epochs has no effect with --config.num_steps={config.num_steps}; leave out one of the two"
        )
    changed = copy.deepcopy(config)
    config_lib.assign(changed, path, value)
    config_lib.check_fields(changed, "--search: ")


def _from_file(name: str, config: Config) -> SearchSpace:
    path = Path(os.path.expanduser(name))
    try:
        spec = importlib.util.spec_from_file_location("meshwork_search", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = module.search
        space = SearchSpace((path.read_text(encoding="utf-8"),), {}, function)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise UserError(f"--search={name} must define a working `def search(trial)`: {error!r}") from None
    draws = [space.suggest(study.ask()) for _ in range(_NUM_CHECKED_DRAWS)]
    if not any(draws):
        raise UserError(
            f"--search={name}: `search(trial)` varies nothing: call trial.suggest_... with the names of config fields, "
            "or return a dict of config fields"
        )
    for field, value in (item for draw in draws for item in draw.items()):
        check_value(str(field), value, config)
    return space
