"""Starts a run from the weights of `--config.init.path`: which of them fit, and the state with them."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research import parameter_groups
from research.config import InitConfig
from research.errors import UserError
from research.network import split_frozen
from research.training import weights
from research.training.state import TrainState
from research.training.weights import FLAG, Names, Weights

_RESET = "--config.init.reset"
_MAX_NAMED = 30  # of each kind, in an error


def check(config: InitConfig) -> None:
    """Raises `UserError` if `reset` is no regular expression, or there is no `path`."""
    parameter_groups.parse_regex(_RESET, config.reset)
    if config.reset and not config.path:
        raise UserError(f"{_RESET} needs {FLAG}, the weights to start from")


def load(
    config: InitConfig, state: TrainState, torch_names: Names, num_classes: int
) -> tuple[dict[str, jax.Array], str]:
    """Loads the weights that fit the network.

    Args:
      config: names the weights.
      state: a new state, whose arrays have the shapes, dtypes and shardings of those to load.
      torch_names: the network's `Task.torch_names`.
      num_classes: of the data set; a layer with this many outputs, of which the weights have another number, keeps its
        initial values.

    Returns:
      The arrays by path, and a line that says what was loaded and what not.

    Raises:
      UserError: the weights cannot be read, or other arrays do not fit.
    """
    wanted, own = _targets(state)
    shapes = {name: x.shape for name, x in wanted.items()}
    source = weights.open_weights(config.path, shapes, torch_names)
    reset = _reset(config, wanted)
    classifier = _classifier(source, {name: shapes[name] for name in shapes if name not in reset}, num_classes)
    fitting = {name: x for name, x in wanted.items() if name not in reset | classifier.keys()}
    ignored = {name for name in source.shapes if name in own or (config.reset and re.search(config.reset, name))}
    _check_fits(config.path, source, fitting, ignored | wanted.keys())
    line = f"started from {config.path}: {len(fitting)} of {len(wanted)} arrays"
    if reset:
        line += f"; re-initialized by init.reset: {', '.join(sorted(reset))}"
    if classifier:
        line += (
            f"; re-initialized: {', '.join(classifier)}, for {num_classes:,} classes here and "
            f"{next(iter(classifier.values())):,} there"
        )
    return source.read(fitting), line


def apply(state: TrainState, arrays: Mapping[str, jax.Array]) -> TrainState:
    """Returns a new state with these arrays, by path, instead of its initial ones; its averages start from them."""

    if not arrays:
        return state

    def replaced(tree: Any) -> Any:
        # Copies: the state is donated, and the arrays may be those of several states.
        pairs = zip(parameter_groups.names(tree), jax.tree.leaves(tree), strict=True)
        return jax.tree.unflatten(
            jax.tree.structure(tree), [jnp.copy(arrays[name]) if name in arrays else x for name, x in pairs]
        )

    def copied(average: Any, tree: Any) -> Any:
        return None if average is None else jax.tree.map(jnp.copy, tree)

    params, model_state = replaced(state.params), replaced(state.model_state)
    return dataclasses.replace(
        state,
        params=params,
        model_state=model_state,
        ema_params=copied(state.ema_params, params),
        ema_model_state=copied(state.ema_model_state, split_frozen(model_state)[1]),
    )


def _targets(state: TrainState) -> tuple[dict[str, jax.Array], set[str]]:
    """Returns the arrays that weights replace, by path, and the paths of others: the network's own random streams."""
    streams, rest = nnx.split_state(state.model_state, nnx.RngState, ...)
    arrays = nnx.merge_state(state.params, rest)
    named = zip(parameter_groups.names(arrays), jax.tree.leaves(arrays), strict=True)
    return dict(named), set(parameter_groups.names(streams))


def _reset(config: InitConfig, paths: Iterable[str]) -> set[str]:
    if not config.reset:
        return set()
    parameter_groups.require_match(_RESET, config.reset, paths)
    reset = {path for path in paths if re.search(config.reset, path)}
    if reset == set(paths):
        raise UserError(f"{_RESET}={config.reset} matches every array: remove {FLAG}, or reset fewer")
    return reset


def _classifier(source: Weights, shapes: Mapping[str, tuple[int, ...]], num_classes: int) -> dict[str, int]:
    """Returns the arrays of the one layer whose outputs are the classes, with the number of classes there.

    {} if they fit, or if several layers differ: then the weights are another network's.
    """
    found = {
        path: source.shapes[path][-1]
        for path, shape in shapes.items()
        if shape and shape[-1] == num_classes and _differs_in_outputs(source.shapes.get(path, shape), shape)
    }
    return found if len({path.rpartition("/")[0] for path in found}) == 1 else {}


def _differs_in_outputs(there: tuple[int, ...], here: tuple[int, ...]) -> bool:
    return len(there) == len(here) and there[:-1] == here[:-1] and there != here


def _check_fits(text: str, source: Weights, wanted: Mapping[str, jax.Array], known: set[str]) -> None:
    missing = [name for name in wanted if name not in source.shapes]
    shapes = [
        f"{name} {source.shapes[name]} there, {x.shape} here"
        for name, x in wanted.items()
        if name in source.shapes and source.shapes[name] != x.shape
    ]
    unknown = [name for name in source.shapes if name not in known]
    problems = {"missing there": missing, "of another shape": shapes, "unknown here": unknown}
    described = [f"{kind}: {_named(names)}" for kind, names in problems.items() if names]
    if described:
        raise UserError(
            f"{FLAG}={text}: these weights are not this network's ({'; '.join(described)}): use the flags of their "
            f"network, or leave arrays out with {_RESET}=REGEX"
        )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(sorted(names)[:_MAX_NAMED]) + more
