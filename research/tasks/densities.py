"""Log densities and divergences in nats, float32; summed over the last axis except where noted."""

import math

import jax
import jax.numpy as jnp

_LOG_2PI = math.log(2 * math.pi)


def bernoulli(x: jax.Array, logits: jax.Array) -> jax.Array:
    """Computes log p(x) of independent bits: x (0 or 1) and logits [..., d] to [...]."""
    # x log s(l) + (1 - x) log(1 - s(l)) = x l - softplus(l), which does not overflow or lose small probabilities.
    return (x * logits - jax.nn.softplus(logits)).sum(-1)


def gaussian(x: jax.Array, mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Computes log p(x) of independent normals: three arrays [..., d] to [...]."""
    return -0.5 * (jnp.square(x - mean) * jnp.exp(-logvar) + logvar + _LOG_2PI).sum(-1)


def kl_to_standard(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Computes KL(N(mean, exp(logvar)) || N(0, 1)) per dimension, not summed (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)


def log_ratio(noise: jax.Array, latents: jax.Array, logvar: jax.Array) -> jax.Array:
    """Computes log p(z) - log q(z) for standard normal p and z = mean + exp(logvar / 2) noise: [..., d] to [...]."""
    return 0.5 * (jnp.square(noise) - jnp.square(latents) + logvar).sum(-1)
