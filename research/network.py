"""Splits a network (`nnx.Module`) into its static part and its arrays, and merges them."""

import dataclasses
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
