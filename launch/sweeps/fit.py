"""`--fit`: a scaling law (a power law) from a sweep over the size of the network or the data set.

The best trial of each size is used, and each of its seeds is one measurement. For an accuracy, the error (1 - accuracy)
is fitted.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optuna
from optuna.trial import FrozenTrial

from launch.plans import hlo, lowering
from launch.sweeps import scaling_law
from launch.sweeps.search_space import Distribution
from launch.sweeps.worker import SEED_VALUES, Sweep, fields
from research import app, sharding
from research.config import MeshConfig
from research.errors import UserError
from research.training import hyperparams
from research.training.state import num_params

_EXTRAPOLATIONS = (2, 4, 10)  # multiples of the largest size


def check(by: str, searched: Mapping[str, Distribution], seeds: int) -> None:
    """Raises `UserError` if the search covers too few sizes for a fit.

    Args:
      by: as in `size_of`.
      searched: the search space.
      seeds: measurements of each size.
    """
    sizes = {"examples": ["dataset.train_fraction"]}.get(by, ["model.width", "model.depth", "model.layers"])
    count = math.prod(_count(searched[field]) for field in sizes if field in searched)
    if count < scaling_law.FEWEST_SIZES or count * seeds < scaling_law.FEWEST:
        flags = " or ".join(f"--search='{field}=[...]'" for field in sizes)
        raise UserError(
            f"--fit={by} needs {scaling_law.FEWEST_SIZES} sizes or more, {scaling_law.FEWEST} with one seed each, and "
            f"the search has {count}: give {flags}"
        )


def _count(distribution: Distribution) -> float:
    """The number of values of a distribution."""
    match distribution:
        case optuna.distributions.CategoricalDistribution():
            return len(set(distribution.choices))
        case optuna.distributions.IntDistribution():
            return len(range(distribution.low, distribution.high + 1, distribution.step))
        case _:
            return math.inf


def size_of(by: str, sweep: Sweep, config: Any) -> int:
    """The number of a trial's parameters, FLOPs of the whole training, or training examples.

    Args:
      by: "parameters", "flops" or "examples".
      sweep: the sweep of the trial.
      config: the trial's config (`Sweep.trial_config`).
    """
    config.mesh = MeshConfig(data=1)
    workload = lowering.Workload(*app.load(sweep.experiment, config))
    config = workload.config
    if by == "examples":
        return workload.num_examples
    lowered, state = lowering.lower(workload, config, sharding.make_mesh(config, jax.local_devices()[:1]))
    if by == "parameters":
        return num_params(state)
    return round(hlo.Program(lowered.compile().as_text() or "").cost()["flops"]) * workload.num_train_steps


def measurements(by: str, sweep: Sweep, ranked: Sequence[FrozenTrial]) -> list[tuple[int, float]]:
    """(size, loss or error) of every seed of the best trial of each size, the smallest first.

    Args:
      by: as in `size_of`.
      sweep: the sweep of the trials.
      ranked: the completed trials, best first.
    """
    # Trials with one signature share one program, and so one size: FLOPs are counted in the compiled program.
    sizes: dict[Any, int] = {}
    best: dict[int, FrozenTrial] = {}
    for trial in ranked:
        config = sweep.trial_config(fields(trial))
        if (signature := hyperparams.signature(config)) not in sizes:
            sizes[signature] = size_of(by, sweep, config)
        best.setdefault(sizes[signature], trial)
    values = ((size, value) for size, trial in best.items() for value in trial.user_attrs[SEED_VALUES])
    return sorted((size, 1 - value if sweep.maximizes else value) for size, value in values)


def fitted(by: str, metric: str, points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Fits a power law; returns its entry in sweep.json.

    Args:
      by: the kind of size, as in `size_of`.
      metric: the name of the measured values, as in "validation_loss".
      points: the (size, value) pairs of `measurements`.

    Raises:
      UserError: there are too few points.
    """
    sizes, values = (np.array(column, np.float64) for column in zip(*points))
    try:
        law = scaling_law.fit(sizes, values)
    except ValueError as error:
        raise UserError(f"--fit={by}: {error}; search more sizes, or give --seeds=3") from None
    found = {
        "by": by,
        "figure": metric,
        "floor": law.floor,
        "factor": law.at_scale * law.scale**law.exponent,
        "exponent": law.exponent,
        "points": [list(point) for point in points],
        "beyond": [_expected(law, times * sizes.max()) for times in _EXTRAPOLATIONS],
    }
    # A test of the fit: predict the largest size from the others.
    smaller = sizes < sizes.max()
    if smaller.sum() >= 4 and len(np.unique(sizes[smaller])) >= 3:
        without = scaling_law.fit(sizes[smaller], values[smaller])
        found["largest"] = _expected(without, sizes.max()) | {"measured": float(values[~smaller].mean())}
    return found


def _expected(law: scaling_law.ScalingLaw, size: float) -> dict[str, float]:
    low, high = law.interval(size)
    return {"size": float(size), "expected": float(law(size)), "low": float(low), "high": float(high)}


def lines(found: Mapping[str, Any]) -> str:
    """The fit in words, for the terminal."""
    power = f"{found['factor']:.4g} * {found['by']}^-{found['exponent']:.3f}"
    text = [f"fit: {found['figure']} = {found['floor']:.4g} + {power}"]
    text += [f"  expected at {_interval(row)}" for row in found["beyond"]]
    if largest := found.get("largest"):
        text.append(f"  predicted from the smaller sizes for {_interval(largest)}; measured {largest['measured']:.4f}")
    return "\n".join(text)


def _interval(row: Mapping[str, float]) -> str:
    return f"{row['size']:.4g}: {row['expected']:.4g} (95% of runs: {row['low']:.4g} to {row['high']:.4g})"
