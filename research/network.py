"""Splits a network (`nnx.Module`) into its static part and its arrays, merges them, and replaces attributes in it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research import sharding, sharding_rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _StoredKey:
    """A network's random key (as of `nnx.Dropout(rate, rngs=rngs)`) as plain numbers, which can be saved and summed."""

    data: jax.Array
    impl: str = dataclasses.field(metadata={"static": True})


def split_network(network: nnx.Module, frozen: Any = False) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns (static part, trained arrays, other arrays), all keys as plain numbers; inverse of `merge_network`.

    `frozen` is the filter of the parameters that are not trained, which are among the other arrays.
    """
    graphdef, params, model_state = nnx.split(network, nnx.All(nnx.Param, nnx.Not(frozen)), ...)

    def stored(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return _StoredKey(jax.random.key_data(x), str(jax.random.key_impl(x)))

    return graphdef, params, jax.tree.map(stored, model_state)


def split_frozen(model_state: Any) -> tuple[Any, Any]:
    """Splits the other arrays of a network into (frozen parameters, what the network changes itself)."""
    frozen, changing = nnx.split_state(model_state, nnx.Param, ...)
    return frozen, changing


def merge_network(graphdef: nnx.GraphDef, params: Any, model_state: Any) -> Any:
    """Returns a new network (`nnx.Module`) with these arrays; it shares no state with others."""

    def is_stored(x: Any) -> bool:
        return isinstance(x, _StoredKey)

    def typed(x: Any) -> Any:
        return jax.random.wrap_key_data(x.data, impl=x.impl) if is_stored(x) else x

    return nnx.merge(graphdef, params, jax.tree.map(typed, model_state, is_leaf=is_stored), copy=True)


def gather(
    params: Any, model_state: Any, mesh: jax.sharding.Mesh, rules: sharding_rules.Rules, dtypes: Any = None
) -> tuple[Any, Any]:
    """All-gathers the parameters, frozen ones included, inside jit.

    `rules` shard them; `dtypes` of (params, frozen parameters) are as for `sharding.gather`.
    """
    frozen, changing = split_frozen(model_state)
    params, frozen = sharding.gather((params, frozen), mesh, _specs((params, frozen), rules, mesh), dtypes)
    # Within `jax.shard_map`, a layer's own backward pass also computes the gradients of frozen parameters (XLA removes
    # them), and their type must be that of the parameters.
    return params, nnx.merge_state(sharding.vary(frozen), changing)


def _specs(trees: tuple[Any, ...], rules: sharding_rules.Rules, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    return tuple(sharding_rules.partition_specs(tree, rules, mesh) for tree in trees)


def needs_gathering(params: Any, model_state: Any, mesh: jax.sharding.Mesh, rules: sharding_rules.Rules) -> bool:
    """Returns whether `gather` gathers any of the parameters."""
    return sharding.needs_gathering(_specs((params, split_frozen(model_state)[0]), rules, mesh))


@contextlib.contextmanager
def replaced(
    network: nnx.Module, selects: Callable[[nnx.Module], bool], attribute: str, value: jax.Array | None
) -> Iterator[None]:
    """Gives an attribute of the selected modules a value, which may be traced, until the context ends; None: none."""
    modules = [module for _, module in nnx.iter_modules(network) if selects(module)] if value is not None else []
    own = [getattr(module, attribute) for module in modules]
    for module in modules:
        setattr(module, attribute, nnx.data(value))
    yield
    for module, before in zip(modules, own):  # an array would become part of the network's state
        setattr(module, attribute, nnx.static(before))
