"""The exact GELU, in a form that is fast on the CPU."""

import math

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """Computes x * Phi(x) in float32 (Hendrycks & Gimpel 2016); returns the dtype of `x`."""
    # Not `jax.nn.gelu(approximate=False)`: that calls erfc, of which XLA:CPU computes both branches. With its gradient
    # it takes 1.7 times as long as the tanh approximation; this takes 1.04 times as long. Far below 0 the error is 1e-7
    # of x, not of GELU(x), as in PyTorch.
    y = x.astype(jnp.float32)
    return (y * (0.5 + 0.5 * jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)
