"""Random erasing (Zhong et al. 2020, arXiv 1708.04896)."""

import jax
import jax.numpy as jnp
import numpy as np

from research import sharding

_AREA = 0.02, 0.33  # of the image; these and the ratios are torchvision's defaults
_RATIO = 0.3, 3.3  # height to width, log-uniform
_TRIES = 10


def erase(images: jax.Array, key: jax.Array, probability: jax.typing.ArrayLike) -> jax.Array:
    """Sets a random rectangle of each image to 0, the mean, with a probability.

    A rectangle that does not fit into the image is drawn again, up to ten times; then the image stays as it is. This
    is torchvision's RandomErasing.

    Args:
      images: float [b, h, w, c], normalized.
      key: of this batch.
      probability: of an image's having a rectangle.

    Returns:
      Images of the same shape and dtype.
    """
    count, height, width, _ = images.shape
    draw = jax.vmap(lambda key: _rectangle(key, (height, width), probability))
    erased = draw(sharding.example_keys(key, count))
    return jnp.where(erased[..., None], 0, images)


def _rectangle(key: jax.Array, shape: tuple[int, int], probability: jax.typing.ArrayLike) -> jax.Array:
    """Draws a rectangle; returns which pixels are in it, bool [h, w]."""
    height, width = shape
    draws = jax.random.uniform(key, (5, _TRIES))
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[0])
    low, high = np.log(_RATIO)
    ratio = jnp.exp(low + (high - low) * draws[1])
    rows, columns = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (rows < height) & (columns < width)
    chosen = jnp.argmax(fits)  # the first that fits
    rows, columns = rows[chosen], columns[chosen]
    top = jnp.floor(draws[2, 0] * (height - rows + 1))
    left = jnp.floor(draws[3, 0] * (width - columns + 1))
    down, right = jnp.arange(height) - top, jnp.arange(width) - left
    inside = ((down >= 0) & (down < rows))[:, None] & ((right >= 0) & (right < columns))
    return inside & fits.any() & (draws[4, 0] < probability)
