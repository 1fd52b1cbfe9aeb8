"""Batch normalization whose variance does not suffer from cancellation when the mean is large.

`nnx.BatchNorm` computes E[x^2] - E[x]^2 in float32, which has no correct digit if the variance is 1e-7 of the squared
mean. Here both moments are those of x - shift, with a shift near the mean. This is still one pass over x, and more
accurate than two passes, where the second subtracts a mean rounded to float32. The result does not depend on the shift,
so the shift has no gradient.
"""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from research.network import replaced


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over all axes but the last, with exact statistics, computed in float32 for any dtype."""

    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """Normalizes x, float [b, ..., features]; training updates the running averages.

        Returns:
          The same shape, of the layer's dtype.
        """
        dtype = self.dtype or x.dtype
        x = x.astype(dtype).astype(jnp.float32)
        if use_running_average:
            centered, variance = x - self.mean[...], self.var[...]
        else:
            shift = self._across_devices(_near_mean(x))
            x = x - shift
            mean, square = self._across_devices(jnp.stack([_mean(x), _mean(x * x)]))
            centered, variance = x - mean, jnp.maximum(0, square - mean * mean)
            for average, value in ((self.mean, shift + mean), (self.var, variance)):
                average[...] = self.momentum * average[...] + (1 - self.momentum) * value
        scale = lax.rsqrt(variance + self.epsilon)
        if self.scale is not None:
            scale = scale * self.scale[...]
        y = centered * scale
        return (y if self.bias is None else y + self.bias[...]).astype(dtype)

    def _across_devices(self, statistic: jax.Array) -> jax.Array:
        return lax.pmean(statistic, self.axis_name) if self.axis_name else statistic


def momentum_of(model: nnx.Module, momentum: jax.Array | None) -> AbstractContextManager[None]:
    """Within it every batch norm of the model, Flax's too, has this momentum, unless it is None; it may be traced."""
    return replaced(model, lambda module: isinstance(module, nnx.BatchNorm), "momentum", momentum)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(range(x.ndim - 1))


def _near_mean(x: jax.Array) -> jax.Array:
    """Computes the mean of the middle row, without a gradient: [b, rows, ..., features] to [features].

    It is within sqrt(rows) standard deviations of the mean over all rows, so the variance loses at most log2(rows)
    bits. For [b, features] it is the exact mean.
    """
    return lax.stop_gradient(_mean(x[:, x.shape[1] // 2] if x.ndim > 2 else x))
