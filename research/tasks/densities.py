"""Log densities and divergences in nats, float32, each the sum over the last axis."""

import math

import jax
import jax.numpy as jnp

_LOG_2PI = math.log(2 * math.pi)


def bernoulli(x: jax.Array, logits: jax.Array) -> jax.Array:
    """log p(x) of independent bits: x 0 or 1 and logits [..., d] to [...].

    x log s(l) + (1 - x) log(1 - s(l)) = x l - softplus(l), which neither overflows nor loses small probabilities.
    """
    return (x * logits - jax.nn.softplus(logits)).sum(-1)


def gaussian(x: jax.Array, mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """log p(x) of independent normals: three [..., d] to [...]."""
    return -0.5 * (jnp.square(x - mean) * jnp.exp(-logvar) + logvar + _LOG_2PI).sum(-1)


def kl_to_standard(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of every dimension, not summed (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)


def log_ratio(noise: jax.Array, latents: jax.Array, logvar: jax.Array) -> jax.Array:
    """log p(z) - log q(z) for a standard normal p and z = mean + exp(logvar / 2) noise: three [..., d] to [...]."""
    return 0.5 * (jnp.square(noise) - jnp.square(latents) + logvar).sum(-1)
