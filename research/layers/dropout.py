"""Dropout and stochastic depth whose masks do not depend on how many devices share the batch."""

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


class DropPath(nnx.Module):
    """Stochastic depth: an example skips a residual block with probability `depth * rate` (Huang et al. 2016).

    The others' residual is scaled by 1 / (1 - depth * rate), so that evaluation needs no scaling (the paper scales
    there). `rate` is that of the last block and `depth` this block's position, from 0, the first, to 1, the last.
    `drop_path_rate_of` can make the rate a traced one.

    Reference: arXiv 1603.09382, equation 4; linear from 0 as in torchvision and timm, where the first block is always
    kept.
    """

    def __init__(self, rate: float, depth: float):
        self.rate: Any = rate
        self.depth = depth

    @property
    def off(self) -> bool:
        """True if no example is ever dropped, so that the compiled program contains no stochastic depth."""
        return self.depth == 0 or not is_on(self.rate)

    def __call__(self, residual: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """Drops the residual [b, ...] of random examples in training; returns it unchanged in evaluation.

        Raises:
          ValueError: `key` is None in training.
        """
        if not train or self.off:
            return residual
        if key is None:
            raise ValueError("stochastic depth needs a key in training")
        keep = 1 - self.depth * self.rate
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep))(sharding.example_keys(key, len(residual)))
        kept = kept.reshape(-1, *[1] * (residual.ndim - 1))
        return jnp.where(kept, residual / keep, 0).astype(residual.dtype)


def rate_of(model: nnx.Module, rate: jax.Array | None) -> AbstractContextManager[None]:
    """Within it every `Dropout` of the model that is not off has this rate, unless it is None; it may be traced."""
    return replaced(model, lambda module: isinstance(module, Dropout) and not module.off, "rate", rate)


def drop_path_rate_of(model: nnx.Module, rate: jax.Array | None) -> AbstractContextManager[None]:
    """As `rate_of`, for stochastic depth (`DropPath`)."""
    return replaced(model, lambda module: isinstance(module, DropPath) and not module.off, "rate", rate)
