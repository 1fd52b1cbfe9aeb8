"""Rematerialization: the backward pass recomputes what the forward pass would have to store (`--config.remat`).

With `blocks` the forward pass stores the inputs of the network's blocks only, and the backward pass recomputes one
block after another. With `all` it stores the inputs of groups of about sqrt(n) of the n blocks only, and the backward
pass recomputes the blocks' inputs of one group after another as well (Chen et al. 2016, arXiv 1604.06174, section 4.3):
least memory, one more forward pass. research/README.md has the measured memory and time.

A network need not know about it. Its blocks are its submodules and the elements of its lists (`nnx.List`,
`nnx.Sequential`); a submodule that itself has a list of modules of several layers counts as several blocks. What a
network computes outside of its submodules is stored as usual.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.extend.core.primitives import remat_p
from jax.sharding import Mesh

from research.errors import UserError

_CONTAINERS = (nnx.List, nnx.Dict, nnx.Sequential)


def apply(network: nnx.Module, mode: str) -> None:
    """Makes calls of the network's blocks rematerialize, unless `mode` is "none".

    The network must not be split afterwards except for its arrays: the modules' classes are replaced.

    Raises:
      UserError: the network has no submodules.
    """
    if mode == "none":
        return
    blocks = list(_blocks(network))
    if not blocks:
        raise UserError(
            f"--config.remat={mode}: {type(network).__name__} has no submodules (nnx.Module) to recompute; use none"
        )
    for block in blocks:
        block.__class__ = _rematerialized(type(block))


def grouped(loss: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Makes a loss function, whose network `apply` has changed, rematerialize groups of blocks if `mode` is "all"."""

    def call(*args: Any, **options: Any) -> Any:
        closed, shapes = jax.make_jaxpr(functools.partial(loss, **options), return_shape=True)(*args)
        jaxpr = closed.jaxpr
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *jax.tree.leaves(args)]))
        groups = _groups(jaxpr.eqns)
        for i, eqns in enumerate(groups):
            rest = [atom for group in groups[i + 1 :] for eqn in group for atom in eqn.invars]
            later = {atom for atom in [*rest, *jaxpr.outvars] if isinstance(atom, Var)}
            used = dict.fromkeys(atom for eqn in eqns for atom in eqn.invars if isinstance(atom, Var))
            inputs = [var for var in used if var in values]
            outputs = [var for eqn in eqns for var in eqn.outvars if var in later]
            effects = set().union(*(eqn.effects for eqn in eqns))
            part = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=eqns, effects=effects)
            function = jax.checkpoint(jaxpr_as_fun(ClosedJaxpr(part, ())))
            values |= zip(outputs, function(*(values[var] for var in inputs)))
        results = [atom.val if isinstance(atom, Literal) else values[atom] for atom in jaxpr.outvars]
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call if mode == "all" else loss


def _groups(eqns: Sequence[JaxprEqn]) -> list[Sequence[JaxprEqn]]:
    """Divides equations after some of the blocks: sqrt(n) groups of n blocks with about as many bytes of outputs."""
    sizes = {i + 1: sum(map(_num_bytes, eqn.outvars)) for i, eqn in enumerate(eqns) if eqn.primitive is remat_p}
    budget = sum(sizes.values()) / math.ceil(math.sqrt(len(sizes))) if sizes else 0
    cuts, stored = [0], 0
    for end, size in sizes.items():
        stored += size
        if stored >= budget:
            cuts, stored = [*cuts, end], 0
    return [eqns[start:end] for start, end in itertools.pairwise(sorted({*cuts, len(eqns)}))]


def _num_bytes(var: Var) -> int:
    aval: Any = var.aval
    return math.prod(aval.shape) * aval.dtype.itemsize


def compiler_options(mode: str, mesh: Mesh) -> dict[str, Any] | None:
    """Returns the options to compile a step with."""
    # XLA:CPU removes the barriers of `jax.checkpoint` before common subexpression elimination, which then merges what
    # is recomputed with what was computed before, so that all of it is stored after all.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if on_cpu and mode != "none" else None


def _children(module: nnx.Module) -> list[nnx.Module]:
    values = module if isinstance(module, nnx.List) else vars(module).values()
    return [value for value in values if isinstance(value, nnx.Module)]


def _blocks(module: nnx.Module) -> Iterator[nnx.Module]:
    for child in _children(module):
        if isinstance(child, _CONTAINERS) or any(_is_stack(inner) for _, inner in nnx.iter_modules(child)):
            yield from _blocks(child)
        else:
            yield child


def _is_stack(module: nnx.Module) -> bool:
    """Returns whether this is a list of modules that have several layers each."""
    return isinstance(module, _CONTAINERS) and any(len(_children(child)) > 1 for child in _children(module))


@functools.cache
def _rematerialized(cls: Any) -> type:
    """Returns a subclass whose calls store only their inputs."""

    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        graphdef, state = nnx.split(self)
        leaves, structure = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

        @jax.checkpoint
        def pure(state: Any, arrays: list[jax.Array]) -> tuple[Any, Any]:
            before = {path: _value(leaf) for path, leaf in nnx.to_flat_state(state)}
            module, remaining = nnx.merge(graphdef, state, copy=True), iter(arrays)
            merged = [next(remaining) if traced else leaf for leaf, traced in zip(leaves, is_array)]
            args, kwargs = jax.tree.unflatten(structure, merged)
            output = cls.__call__(module, *args, **kwargs)
            after = nnx.to_flat_state(nnx.state(module))
            # Batch statistics, for example. Writing the others back would be an error within a loop over the layer.
            changed = [(path, leaf) for path, leaf in after if _value(leaf) is not before[path]]
            return output, nnx.from_flat_state(changed)

        output, changed = pure(state, [leaf for leaf, traced in zip(leaves, is_array) if traced])
        nnx.update(self, changed)
        return output

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _value(leaf: Any) -> Any:
    """Returns the array of a `nnx.Variable`, or the leaf itself: an attribute that is an array, as a traced rate is."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
