"""The dtypes in which parameters are all-gathered: those in which the network uses them.

A layer with `dtype=bfloat16` converts its float32 parameters at every use. Converted before they are gathered, they
have the same bits, half the bytes on the interconnect, and half the memory. Which parameters are used like this is read
from the traced gradient, so that it holds for any network; gradients are still summed in the parameters' own dtype.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh

from research.network import needs_gathering, split_frozen
from research.sharding_rules import Rules

# Operations that only move the elements of their first operand: converted before or after, they give the same.
_MOVES = ("copy", "gather", "reshape", "slice", "squeeze", "transpose")


def gradient(loss: Callable[..., Any], mesh: Mesh, rules: Rules) -> Callable[..., Any]:
    """Returns `jax.grad(loss, has_aux=True)`, which gathers parameters in these dtypes.

    Args:
      loss: (params, model_state, ..., dtypes: for `network.gather`) -> (scalar, auxiliary values).
      mesh: the devices.
      rules: the experiment's sharding rules.
    """

    def gradient_of(params: Any, model_state: Any, *others: Any) -> Any:
        frozen, changing = split_frozen(model_state)

        def traced(params: Any, frozen: Any, dtypes: Any = None) -> Any:
            arrays = params, nnx.merge_state(frozen, changing), *others
            return jax.grad(functools.partial(loss, dtypes=dtypes), has_aux=True)(*arrays)

        gathers = needs_gathering(params, model_state, mesh, rules)
        return traced(params, frozen, used(traced, params, frozen) if gathers else None)

    return gradient_of


def used(function: Callable[..., Any], *arrays: Any) -> Any:
    """Traces a function that gathers arrays by `sharding.gather`.

    Args:
      function: of `arrays`.
      arrays: pytrees of arrays.

    Returns:
      `arrays` with a dtype for each array: the narrower one to which the function converts it at every use after it was
      gathered, or its own.
    """
    closed = jax.make_jaxpr(function)(*arrays)
    jaxpr = dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), instantiate=True)[0]
    leaves, structure = jax.tree.flatten(arrays)
    uses = _Uses()
    found = (set(uses.of(jaxpr, var, gathered=False)) for var in jaxpr.invars)
    return jax.tree.unflatten(structure, [_narrower(leaf.dtype, of) for leaf, of in zip(leaves, found, strict=True)])


def _narrower(own: Any, uses: set[Any]) -> Any:
    use = uses.pop() if len(uses) == 1 else None
    if not isinstance(use, np.dtype) or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (own, use)):
        return own
    return use if use.itemsize < own.itemsize else own


class _Uses:
    """The uses of gathered variables in a jaxpr and in the jaxprs within it."""

    def __init__(self) -> None:
        self._operands: dict[Jaxpr, dict[Var, list[tuple[JaxprEqn, int]]]] = {}

    def of(self, jaxpr: Jaxpr, var: Var, *, gathered: bool) -> Iterator[Any]:
        """Yields the dtype that it is converted to, the number of the output that it is, or None: otherwise."""
        if gathered:
            yield from (number for number, out in enumerate(jaxpr.outvars) if out is var)
        if jaxpr not in self._operands:
            self._operands[jaxpr] = operands = collections.defaultdict(list)
            for eqn in jaxpr.eqns:
                for position, atom in enumerate(eqn.invars):
                    if isinstance(atom, Var):
                        operands[atom].append((eqn, position))
        for eqn, position in self._operands[jaxpr].get(var, ()):
            yield from self._in(jaxpr, eqn, position, gathered=gathered)

    def _in(self, jaxpr: Jaxpr, eqn: JaxprEqn, position: int, *, gathered: bool) -> Iterator[Any]:
        name = eqn.primitive.name
        if name == "sharding_constraint" or (gathered and name in _MOVES and position == 0):
            yield from self.of(jaxpr, eqn.outvars[0], gathered=True)
        elif inner := _inner(eqn, position):
            for use in self.of(*inner, gathered=gathered):
                if isinstance(use, int):
                    yield from self.of(jaxpr, eqn.outvars[use], gathered=True) if name != "scan" else [None]
                else:
                    yield use
        elif gathered:
            yield eqn.params["new_dtype"] if name == "convert_element_type" else None


def _inner(eqn: JaxprEqn, position: int) -> tuple[Jaxpr, Var] | None:
    """Returns where a call, or a scan that does not change it, uses its operand; None: elsewhere, or not at all."""
    called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    jaxpr = called.jaxpr if isinstance(called, ClosedJaxpr) else called
    if not isinstance(jaxpr, Jaxpr) or len(jaxpr.invars) != len(eqn.invars):
        return None
    is_carried = eqn.primitive.name == "scan" and position in _carried(eqn, jaxpr)
    return None if is_carried else (jaxpr, jaxpr.invars[position])


def _carried(scan: JaxprEqn, body: Jaxpr) -> range:
    """Returns which operands a scan carries: those before the ones it scans over, as many as it carries out."""
    # Its parameters have other names in later versions of JAX. What is scanned over has one axis more than in the body.
    scanned = sum(_ndim(outside) > _ndim(inside) for outside, inside in zip(scan.invars, body.invars))
    carried = sum(_ndim(outside) == _ndim(inside) for outside, inside in zip(scan.outvars, body.outvars))
    end = len(body.invars) - scanned
    return range(end - carried, end)


def _ndim(atom: Any) -> int:
    return len(atom.aval.shape)
