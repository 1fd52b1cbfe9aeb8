"""Splits a network (`nnx.Module`) into its static part and its arrays, merges them, and replaces attributes in it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _StoredKey:
    """A network's random key (as of `nnx.Dropout(rate, rngs=rngs)`) as plain numbers, which can be saved and summed."""

    data: jax.Array
    impl: str = dataclasses.field(metadata={"static": True})


def split_network(network: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns (static part, trained arrays, other arrays), all keys as plain numbers; inverse of `merge_network`."""
    graphdef, params, model_state = nnx.split(network, nnx.Param, ...)

    def stored(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return _StoredKey(jax.random.key_data(x), str(jax.random.key_impl(x)))

    return graphdef, params, jax.tree.map(stored, model_state)


def merge_network(graphdef: nnx.GraphDef, params: Any, model_state: Any) -> Any:
    """Returns a new network (`nnx.Module`) with these arrays; it shares no state with others."""

    def is_stored(x: Any) -> bool:
        return isinstance(x, _StoredKey)

    def typed(x: Any) -> Any:
        return jax.random.wrap_key_data(x.data, impl=x.impl) if is_stored(x) else x

    return nnx.merge(graphdef, params, jax.tree.map(typed, model_state, is_leaf=is_stored), copy=True)


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
