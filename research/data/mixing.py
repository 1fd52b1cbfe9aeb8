"""MixUp and CutMix: each training image is mixed with another one of its batch."""

import dataclasses

import jax
import jax.numpy as jnp

from research import sharding
from research.config import AugmentConfig, is_on


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedLabels:
    """The labels of mixed images.

    Attributes:
      first, second: int [b], the labels of the image and of the one that it is mixed with.
      weight: float32 [b] in 0..1, the weight of `first`; the rest is that of `second`.
    """

    first: jax.Array
    second: jax.Array
    weight: jax.Array


def is_mixed(config: AugmentConfig) -> bool:
    """Returns whether images are mixed at all."""
    return is_on(config.mixup) or is_on(config.cutmix)


def mix(images: jax.Array, labels: jax.Array, key: jax.Array, config: AugmentConfig) -> tuple[jax.Array, MixedLabels]:
    """Mixes each image with the next one of its (micro)batch, which is a random one because the order is.

    MixUp (Zhang et al. 2018, arXiv 1710.09412) computes weight * image + (1 - weight) * other. CutMix (Yun et al. 2019,
    arXiv 1905.04899) takes a rectangle from the other image; the weight is the part of the image that is left. The
    weight is drawn for each image from Beta(alpha, alpha), and the images of CutMix have a rectangle of the area
    1 - weight around a uniformly drawn pixel, clipped at the borders. If both are on, each image gets one of the two,
    with probability 1/2. In timm, this is the mode "elem".

    Args:
      images: float [b, h, w, c], augmented.
      labels: int [b].
      key: of this batch.
      config: `mixup` and `cutmix` are the alphas, one of which at least is not 0.

    Returns:
      Images of the same shape and dtype, and their labels.
    """
    count, height, width, _ = images.shape
    draw = jax.vmap(lambda key: _pixel_weights(key, (height, width), config))
    weights = draw(sharding.example_keys(key, count))
    expanded = weights[..., None].astype(images.dtype)
    mixed = expanded * images + (1 - expanded) * sharding.next_examples(images)
    return mixed, MixedLabels(labels, sharding.next_examples(labels), weights.mean((1, 2)))


def _pixel_weights(key: jax.Array, shape: tuple[int, int], config: AugmentConfig) -> jax.Array:
    """Draws the weight of each pixel of an image, float32 [h, w]; the other image has the rest."""
    mixup_key, cutmix_key, row_key, column_key, choice_key = jax.random.split(key, 5)
    uniform = jnp.full(shape, _symmetric_beta(mixup_key, config.mixup)) if is_on(config.mixup) else None
    if uniform is not None and not is_on(config.cutmix):
        return uniform
    side = jnp.sqrt(1 - _symmetric_beta(cutmix_key, config.cutmix))
    rows, columns = (_inside(key, size, side) for key, size in zip((row_key, column_key), shape))
    outside = 1.0 - (rows[:, None] & columns)
    return outside if uniform is None else jnp.where(jax.random.bernoulli(choice_key), uniform, outside)


def _symmetric_beta(key: jax.Array, alpha: jax.typing.ArrayLike) -> jax.Array:
    """Draws from Beta(alpha, alpha), float32 scalar.

    With Bailey's formula for Student's t, t = sqrt(2 alpha (u^(-1/alpha) - 1)) cos(2 pi v) (Bailey 1994, Mathematics of
    Computation 62), of which (1 + t / sqrt(2 alpha + t^2)) / 2 has this distribution.
    """
    # Not `jax.random.beta`: its rejection sampling takes seconds to compile.
    u, v = jax.random.uniform(key, (2,))
    cosine = jnp.cos(2 * jnp.pi * v)
    square = jnp.expm1(-jnp.log(u) / alpha) * jnp.square(cosine)  # t^2 / (2 alpha)
    return (1 + jnp.sign(cosine) / jnp.sqrt(1 + 1 / square)) / 2


def _inside(key: jax.Array, size: int, fraction: jax.Array) -> jax.Array:
    """Draws an interval of about `fraction` of an axis; returns which positions are in it, bool [size]."""
    half = jnp.floor(size * fraction).astype(jnp.int32) // 2
    offset = jnp.arange(size) - jax.random.randint(key, (), 0, size)
    return (offset >= -half) & (offset < half)
