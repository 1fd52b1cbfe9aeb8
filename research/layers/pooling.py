"""Pooling by strided slices, whose gradient costs a fraction of that of `lax.reduce_window` on the CPU.

Windows do not overlap and have no padding (rows and columns left over at the end are dropped), so that the pool is an
elementwise function of their strided slices.
"""

from functools import reduce

import jax
import jax.numpy as jnp


def max_pool(x: jax.Array, window: int) -> jax.Array:
    """The maximum over square windows.

    Where several elements of a window are the largest they share its gradient: a subgradient whose sum is kept.
    (`lax.reduce_window` gives it to the first of them.)

    Args:
      x: float [b, h, w, c].
      window: side of the window.

    Returns:
      [b, h // window, w // window, c], of x's dtype.
    """
    return reduce(_maximum, _slices(x, window))


@jax.custom_jvp
def _maximum(x: jax.Array, y: jax.Array) -> jax.Array:
    """The larger of each pair; equals share the gradient.

    JAX's own gradient of `maximum` asks x == max(x, y). Where XLA computes x twice, in two fusions that round
    differently, neither side may be equal, and the gradient is lost. Here both sides' shares add up to 1 whatever.
    """
    return jnp.maximum(x, y)


@_maximum.defjvp
def _maximum_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    share = jnp.where(x > y, 1, jnp.where(x < y, 0, 0.5)).astype(x.dtype)
    return _maximum(x, y), share * dx + (1 - share) * dy


def avg_pool(x: jax.Array, window: int) -> jax.Array:
    """The mean over square windows; arguments and result as of `max_pool`."""
    return reduce(jnp.add, _slices(x, window)) / window**2


def _slices(x: jax.Array, window: int) -> list[jax.Array]:
    """The window's elements, each for all windows: window ** 2 arrays [b, h // window, w // window, c]."""
    height, width = (size // window * window for size in x.shape[1:3])
    return [x[:, i:height:window, j:width:window] for i in range(window) for j in range(window)]
