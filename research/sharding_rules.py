"""An experiment's sharding rules: how the mesh splits the parameters that regular expressions select by their paths.

    app.Experiment(..., sharding_rules={"up/kernel": (None, "model"), "down/kernel": ("model", None)})

The value of a rule has an entry for each axis of the parameter: the mesh axis that splits it, several of them in a
tuple, or None. The first rule whose expression the path contains (`re.search`) counts; parameters without one have the
default (`sharding.partition_spec`). The optimizer's state of a parameter, its average and its gradient follow it.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research import parameter_groups, sharding
from research.errors import UserError

Rules = Mapping[str, Any]  # of sequences of mesh axes, as of `jax.sharding.PartitionSpec`

_NAME = "sharding_rules"


def partition_specs(params: Any, rules: Rules, mesh: Mesh) -> Any:
    """Returns the PartitionSpec of every parameter, a pytree like `params`; without mesh axes of one device."""
    leaves, structure = jax.tree.flatten(params)
    specs = [_spec(path, leaf.shape, rules, mesh) for path, leaf in zip(parameter_groups.names(params), leaves)]
    return jax.tree.unflatten(structure, specs)


def _spec(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> P:
    if (regex := _first_match(path, rules)) is None:
        return sharding.partition_spec(shape, mesh)
    split = [tuple(axis for axis in _axes(entry) if mesh.shape[axis] > 1) for entry in rules[regex]]
    return P(*(axes[0] if len(axes) == 1 else axes or None for axes in split))


def _first_match(path: str, rules: Rules) -> str | None:
    """Returns the expression of the rule that counts for a parameter."""
    return next((regex for regex in rules if re.search(regex, path)), None)


def _axes(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a rule."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def tree_shardings(tree: Any, params: Any, rules: Rules, mesh: Mesh) -> Any:
    """Returns the sharding of every leaf of a train state.

    Args:
      tree: a tree of `jax.ShapeDtypeStruct`. A leaf whose path ends with that of a parameter, and which has its shape,
        is that parameter, or the optimizer's or the average's array for it; others have the default rule.
      params: of the parameters, frozen ones included.
      rules: checked.
      mesh: the devices.
    """
    if not rules:
        return sharding.tree_shardings(tree, mesh)
    shapes = (leaf.shape for leaf in jax.tree.leaves(params))
    specs = jax.tree.leaves(partition_specs(params, rules, mesh))
    found = dict(zip(zip(parameter_groups.names(params), shapes, strict=True), specs, strict=True))

    def shard(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        ends = (("/".join(parts[first:]), leaf.shape) for first in range(len(parts)))  # the longest first
        spec = next((found[end] for end in ends if end in found), None)
        return NamedSharding(mesh, sharding.partition_spec(leaf.shape, mesh) if spec is None else spec)

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(shard, parameter_groups.names(tree), leaves))


def check(rules: Rules, params: Any, mesh: Mesh) -> None:
    """Checks the rules against the network and the mesh.

    Args:
      rules: of the experiment.
      params: the parameters, frozen ones included.
      mesh: the devices.

    Raises:
      UserError: the rules are no dictionary; an expression is invalid or matches no parameter; a rule is no tuple of
        mesh axes, does not have an entry for each axis of a parameter, or the mesh does not split that axis evenly.
    """
    if not isinstance(rules, Mapping) or not all(isinstance(regex, str) for regex in rules):
        raise UserError(f"{_NAME}: give a dictionary from regular expressions to tuples of mesh axes")
    paths = parameter_groups.names(params)
    shapes = dict(zip(paths, (leaf.shape for leaf in jax.tree.leaves(params)), strict=True))
    for regex, rule in rules.items():
        _check_axes(regex, rule)
        parameter_groups.require_match(_NAME, regex, paths)
    for path, shape in shapes.items():
        if (regex := _first_match(path, rules)) is not None:
            _check_shape(f"{_NAME}: {path}", shape, regex, rules[regex], mesh)


def _check_axes(regex: str, rule: Any) -> None:
    given = f"{_NAME}: {regex!r} has {rule!r}"
    if not isinstance(rule, (tuple, list, P)) or not all(isinstance(e, (str, tuple, list, type(None))) for e in rule):
        raise UserError(f"{given}: give a tuple with a mesh axis or None for each axis of the parameter")
    named = list(itertools.chain.from_iterable(map(_axes, rule)))
    if unknown := [name for name in named if name not in sharding.AXES]:
        raise UserError(f"{given}: the mesh has no axis {unknown[0]!r}; use {', '.join(sharding.AXES)} or None")
    if len(set(named)) < len(named):
        raise UserError(f"{given}: a mesh axis can split only one axis of a parameter")


def _check_shape(parameter: str, shape: tuple[int, ...], regex: str, rule: Any, mesh: Mesh) -> None:
    sizes = "x".join(map(str, shape)) or "a scalar"
    if len(rule) != len(shape):
        raise UserError(
            f"{parameter} is {sizes}, and the rule {regex!r} has {len(rule)} entries: give one for each axis"
        )
    for size, entry in zip(shape, rule):
        parts = math.prod(mesh.shape[axis] for axis in _axes(entry))
        if size % parts:
            flags = " ".join(f"--config.mesh.{axis}={mesh.shape[axis]}" for axis in _axes(entry))
            raise UserError(
                f"{parameter} is {sizes}, and {flags} cannot split its {size} evenly, as the rule {regex!r} asks for: "
                "give another mesh or rule"
            )
