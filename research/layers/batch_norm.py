"""Batch normalization whose variance does not suffer from cancellation when the mean is large.

`nnx.BatchNorm` computes E[x^2] - E[x]^2 in float32, which has no correct digit if the variance is 1e-7 of the squared
mean. Here both moments are those of x - shift, with a shift near the mean. This is still one pass over x, and more
accurate than two passes, where the second subtracts a mean rounded to float32. The result does not depend on the shift,
so the shift has no gradient.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from research.network import replaced


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over all axes but the last, with exact statistics, computed in float32 for any dtype.

    Attributes:
      group_size: in training, how many consecutive examples are normalized by their own statistics, which the running
        averages are means of; 0: all examples (of all devices).
    """

    group_size: int = 0

    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """Normalizes x, float [b, ..., features]; training updates the running averages.

        Returns:
          The same shape, of the layer's dtype.
        """
        dtype = self.dtype or x.dtype
        x = x.astype(dtype).astype(jnp.float32)
        if use_running_average:
            return self._scaled(x - self.mean[...], self.var[...]).astype(dtype)
        if self.group_size:
            groups = x.reshape(-1, self.group_size, *x.shape[1:])
            y, means, variances = jax.vmap(lambda group: self._by_own_statistics(group, lambda statistic: statistic))(
                groups
            )
            # Nothing waits for the means over the groups, so one all-reduce per step serves all layers.
            mean, variance = self._across_devices(jnp.stack([means.mean(0), variances.mean(0)]))
        else:
            y, mean, variance = self._by_own_statistics(x, self._across_devices)
        for average, value in ((self.mean, mean), (self.var, variance)):
            average.set_value(self.momentum * average[...] + (1 - self.momentum) * value)
        return y.reshape(x.shape).astype(dtype)

    def _by_own_statistics(
        self, x: jax.Array, across_devices: Callable[[jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalizes x by its mean and variance, and returns these, too."""
        shift = across_devices(_near_mean(x))
        x = x - shift
        mean, square = across_devices(jnp.stack([_mean(x), _mean(x * x)]))
        variance = jnp.maximum(0, square - mean * mean)
        return self._scaled(x, variance, mean), shift + mean, variance

    def _scaled(self, x: jax.Array, variance: jax.Array, mean: jax.Array | float = 0.0) -> jax.Array:
        """Divides by the standard deviation, then applies scale and bias.

        The mean is subtracted after the division, so it must not be large: sqrt(rows) standard deviations at most.
        """
        scale = lax.rsqrt(variance + self.epsilon)
        if self.scale is not None:
            scale = scale * self.scale[...]
        offset = -mean * scale
        if self.bias is not None:
            offset = offset + self.bias[...]
        # The gradients of `scale` and `offset` are the only sums over the batch; (x - mean) * scale would need a third.
        return x * scale + offset

    def _across_devices(self, statistic: jax.Array) -> jax.Array:
        return lax.pmean(statistic, self.axis_name) if self.axis_name else statistic


def momentum_of(model: nnx.Module, momentum: jax.Array | None) -> AbstractContextManager[None]:
    """Within it every batch norm of the model, Flax's too, has this momentum, unless it is None; it may be traced."""
    return replaced(model, lambda module: isinstance(module, nnx.BatchNorm), "momentum", momentum)


def group_sizes(model: nnx.Module) -> set[int]:
    """Returns the sizes of the groups in which the model's batch norms take their statistics, without 0."""
    found = {module.group_size for _, module in nnx.iter_modules(model) if isinstance(module, BatchNorm)}
    return found - {0}


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(range(x.ndim - 1))


def _near_mean(x: jax.Array) -> jax.Array:
    """Computes the mean of the middle row, without a gradient: [b, rows, ..., features] to [features].

    It is within sqrt(rows) standard deviations of the mean over all rows, so the variance loses at most log2(rows)
    bits. For [b, features] it is the exact mean.
    """
    return lax.stop_gradient(_mean(x[:, x.shape[1] // 2] if x.ndim > 2 else x))
