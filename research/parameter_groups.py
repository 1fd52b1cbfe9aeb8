"""Parameters selected by regular expressions over their paths: frozen ones, and those with a scaled learning rate.

A path joins the names from the network to the array, as in "blocks/0/conv1/kernel". A regular expression selects the
parameters whose path contains a match (`re.search`): `stem` selects all of that layer, `^stem/` only that of the
network itself, and `bias$` every bias.
"""

import difflib
import itertools
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import optax
from flax import nnx

from research.config import OptimizerConfig
from research.errors import UserError

_FREEZE, _SCALE = "--config.optimizer.freeze", "--config.optimizer.learning_rate_scale"
_SCALED = re.compile(r"(.+?):([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)(?:,|$)")


def names(tree: Any) -> list[str]:
    """Returns the paths of all arrays of a pytree of arrays or Flax variables, in the order of its leaves."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: tuple[Any, ...]) -> str:
    while len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey):  # the array of an `nnx.Variable`
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def selects(regex: str) -> Any:
    """Returns the filter of `nnx.split` that selects the variables with a match of `regex`; "": none."""
    pattern = re.compile(regex)
    return lambda path, _: bool(regex) and bool(pattern.search("/".join(map(str, path))))


def parse_regex(flag: str, regex: str) -> re.Pattern[str]:
    """Compiles a regular expression; raises `UserError` if it is not one."""
    try:
        return re.compile(regex)
    except re.error as error:
        raise UserError(f"{flag}={regex}: this is not a regular expression ({error})") from None


def require_match(flag: str, regex: str, paths: Iterable[str]) -> None:
    """Raises `UserError`, with the nearest path, if a regular expression selects none of the paths."""
    paths = list(paths)
    if any(map(parse_regex(flag, regex).search, paths)):
        return
    # By the nearest part of a path: the whole of a long one resembles no short expression.
    parts = {part: path for path in reversed(paths) for part in itertools.accumulate(path.split("/"), "{}/{}".format)}
    near = difflib.get_close_matches(regex, parts, n=1, cutoff=0)
    raise UserError(f"{flag}={regex} matches no parameter" + (f": the nearest is {parts[near[0]]}" if near else ""))


def parse_scales(text: str) -> list[tuple[str, float]]:
    """Parses "REGEX:FACTOR,REGEX:FACTOR,...".

    Raises:
      UserError: it has another form, or a factor is not above 0.
    """
    scales, rest = [], text
    while rest:
        found = _SCALED.match(rest)
        try:
            regex, factor = (found[1], float(found[2])) if found else ("", 0.0)
        except ValueError:  # "1.2.3"
            regex, factor = "", 0.0
        if not found or not 0 < factor < math.inf:
            raise UserError(
                f"{_SCALE}={text}: give REGEX:FACTOR with a factor above 0, several separated by commas, as in "
                f"stem:0.1,blocks/0:0.5; {_FREEZE}=REGEX leaves parameters unchanged"
            )
        parse_regex(_SCALE, regex)
        scales.append((regex, factor))
        rest = rest[found.end() :]
    return scales


def check_syntax(config: OptimizerConfig) -> None:
    """Raises `UserError` if a field with regular expressions cannot be parsed."""
    parse_regex(_FREEZE, config.freeze)
    parse_scales(config.learning_rate_scale)


def check(config: OptimizerConfig, params: Any, frozen: Any) -> None:
    """Checks the regular expressions against the network.

    Args:
      config: the fields of the optimizer.
      params: the trained parameters.
      frozen: the others.

    Raises:
      UserError: an expression selects no parameter, a scale selects only frozen ones, or all parameters are frozen.
    """
    trained = names(params)
    if config.freeze:
        require_match(_FREEZE, config.freeze, trained + names(frozen))
        if not trained:
            raise UserError(f"{_FREEZE}={config.freeze} matches every parameter: leave some to train")
    for regex, _ in parse_scales(config.learning_rate_scale):
        require_match(_SCALE, regex, trained + names(frozen))
        if not any(map(re.compile(regex).search, trained)):
            raise UserError(f"{_SCALE}={regex} matches only frozen parameters ({_FREEZE}={config.freeze})")


def trained_only(tree: Any, config: OptimizerConfig) -> Any:
    """Returns a tree with one leaf for each parameter (`nnx.State`) without those of frozen parameters; None: None."""
    return None if tree is None else nnx.filter_state(tree, nnx.Not(selects(config.freeze)))


def scale_rates(text: str) -> optax.GradientTransformation:
    """Scales the updates of the selected parameters; of several expressions that select one, the first counts."""
    scales = parse_scales(text)

    def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        name = _name(path)
        factor = next((factor for regex, factor in scales if re.search(regex, name)), 1.0)
        return factor * update if factor != 1 else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))
