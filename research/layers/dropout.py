"""Dropout whose masks do not depend on how many devices share the batch."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research import sharding
from research.config import is_on
from research.network import replaced


class Dropout(nnx.Module):
    """Sets each value to 0 with probability `rate`, and scales the others by 1 / (1 - rate) (Srivastava et al. 2014).

    Each call takes its key, so no random state is stored. `batch_axis` is the axis of the examples. `rate_of` can make
    the rate a traced one.
    """

    def __init__(self, rate: float, batch_axis: int = 0):
        self.rate: Any = rate
        self.batch_axis = batch_axis

    @property
    def off(self) -> bool:
        """True if the rate is statically 0, so that the compiled program contains no dropout."""
        return not is_on(self.rate)

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """Applies dropout in training; returns x unchanged in evaluation.

        Raises:
          ValueError: `key` is None in training.
        """
        if not train or self.off:
            return x
        if key is None:
            raise ValueError("dropout needs a key in training")
        keys = sharding.example_keys(key, x.shape[self.batch_axis])
        shape = (*x.shape[: self.batch_axis], *x.shape[self.batch_axis + 1 :])
        draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, shape), out_axes=self.batch_axis)
        return jnp.where(draw(keys), x / (1 - self.rate), 0).astype(x.dtype)


def rate_of(model: nnx.Module, rate: jax.Array | None) -> AbstractContextManager[None]:
    """Within it every `Dropout` of the model that is not off has this rate, unless it is None; it may be traced."""
    return replaced(model, lambda module: isinstance(module, Dropout) and not module.off, "rate", rate)
