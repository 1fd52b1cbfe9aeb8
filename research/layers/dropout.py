"""Dropout whose draws do not depend on how many devices share the batch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research import sharding
from research.config import is_on


class Dropout(nnx.Module):
    """Sets each value to 0 with probability `rate`, and scales the others by 1 / (1 - rate) (Srivastava et al. 2014).

    It is given its key at each call and stores no random state; `batch_axis` is the axis that counts examples. The rate
    may become a traced one (`set_rate`).
    """

    def __init__(self, rate: float, batch_axis: int = 0):
        self.rate: Any = rate
        self.batch_axis = batch_axis

    @property
    def off(self) -> bool:
        """Whether it does nothing, so that the program has nothing of it."""
        return not is_on(self.rate)

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """x in evaluation.

        Raises:
          ValueError: in training there is no key.
        """
        if not train or self.off:
            return x
        if key is None:
            raise ValueError("dropout needs a key in training")
        keys = sharding.example_keys(key, x.shape[self.batch_axis])
        shape = (*x.shape[: self.batch_axis], *x.shape[self.batch_axis + 1 :])
        draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, shape), out_axes=self.batch_axis)
        return jnp.where(draw(keys), x / (1 - self.rate), 0).astype(x.dtype)


def set_rate(model: nnx.Module, rate: Any) -> None:
    """Sets the rate of every `Dropout` that is not off; a traced one must be replaced before the model is split."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Dropout) and not module.off:
            module.rate = nnx.data(rate) if isinstance(rate, jax.Array) else nnx.static(rate)
