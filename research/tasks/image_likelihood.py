"""Likelihoods of images given the parameters that a decoder returns: bernoulli, gaussian and logistic."""

import math

import jax
import jax.numpy as jnp

from research.layers import logistic_mixture
from research.tasks import densities

TARGETS = {
    "bernoulli": "a pixel is 1 with the probability image / 255, else 0, drawn by a key derived from `index`",
    "gaussian": "(image + noise) / 256, drawn by a key derived from `index`",
    "logistic": "image / 255",
}


def targets(likelihood: str, image: jax.Array, keys: jax.Array) -> jax.Array:
    """Draws the network's inputs and targets, float32 [b, h, w, c]: bits, or values in 0..1 (`TARGETS`).

    Args:
      likelihood: "bernoulli", "gaussian" or "logistic".
      image: uint8 [b, h, w, c].
      keys: a random key for each image, [b].
    """
    match likelihood:
        case "bernoulli":
            return jax.vmap(_bits)(keys, image)
        case "gaussian":
            noise = jax.vmap(lambda key: jax.random.uniform(key, image.shape[1:]))(keys)
            return (image + noise) / 256
        case _:
            return image.astype(jnp.float32) / 255


def log_prob(likelihood: str, targets: jax.Array, parameters: jax.Array) -> jax.Array:
    """Computes log p(x|z) in nats, [...]: targets [..., h, w, c] and flat `parameters` [..., n] of a decoder."""
    if likelihood == "logistic":
        return logistic_mixture.log_prob(targets, _by_pixel(parameters, targets.shape[-3:]))
    flat = targets.reshape(*targets.shape[:-3], -1)
    if likelihood == "bernoulli":
        return densities.bernoulli(flat, parameters)
    # The density of values in 0..256 is that of values in 0..1, divided by 256 for each pixel.
    return densities.gaussian(flat, *jnp.split(parameters, 2, -1)) - flat.shape[-1] * math.log(256)


def expected(likelihood: str, parameters: jax.Array, image_shape: tuple[int, ...]) -> jax.Array:
    """Computes the expected images, float32 [b, h, w, c] in 0..1, of `parameters` [..., n]."""
    match likelihood:
        case "bernoulli":
            images = jax.nn.sigmoid(parameters)
        case "gaussian":
            images = jnp.clip(jnp.split(parameters, 2, -1)[0], 0, 1)
        case _:
            images = logistic_mixture.expected(_by_pixel(parameters, image_shape), image_shape[-1])
    return images.reshape(-1, *image_shape)


def _by_pixel(parameters: jax.Array, image_shape: tuple[int, ...]) -> jax.Array:
    return parameters.reshape(*parameters.shape[:-1], *image_shape[:2], -1)


def _bits(key: jax.Array, image: jax.Array) -> jax.Array:
    """Draws float32 bits, each 1 with probability gray / 255 of its pixel (uint8), to within 2^-17."""
    # Half a random word for each pixel: the draws take a good part of a small network's train step.
    words = jax.random.bits(key, (-(-image.size // 2),))
    halves = jnp.concatenate([words & 0xFFFF, words >> 16])[: image.size].reshape(image.shape)
    return (halves < (image.astype(jnp.uint32) * 65536 + 127) // 255).astype(jnp.float32)
