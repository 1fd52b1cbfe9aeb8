"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719): random operations on images of 8 bits, each as Pillow has it.

The operations are the paper's 14. Their strengths are in proportion to magnitude / 10, and at 10 those of torchvision:
shear by 0.3, shift by 45% of the side, rotation by 30 degrees, factors of 0.1 and 1.9 for brightness, color, contrast
and sharpness, 4 bits for posterize, and 0 as the threshold of solarize. Directions and signs are random.
"""

import jax
import jax.numpy as jnp
import numpy as np

from research import sharding

OPERATIONS = (
    "identity",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    # The geometric ones come last: `_transform` makes one gather of them.
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
)
_SHEAR, _SHIFT, _DEGREES, _FACTOR, _BITS = 0.3, 150 / 331, 30.0, 0.9, 4
_GRAY = 128  # of what comes from outside of the image, as in the paper's code
# The weights of red, green and blue in gray, of 2**16, with which Pillow converts to "L".
_LUMA = np.array([19595, 38470, 7471], np.int32)


def randaugment(images: jax.Array, key: jax.Array, count: int, magnitude: jax.typing.ArrayLike) -> jax.Array:
    """Applies `count` random operations to each image, one after another.

    Args:
      images: uint8 [b, h, w, c], c 1 or 3.
      key: of this batch.
      count: how many operations, drawn with replacement from `OPERATIONS`.
      magnitude: their strength, from 0 to 10.

    Returns:
      Images of the same shape, float32, whole numbers in 0..255.
    """

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        def step(image: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            name_key, sign_key = jax.random.split(key)
            number = jax.random.randint(name_key, (), 0, len(OPERATIONS))
            sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
            return operate(image, number, sign * magnitude / 10), None

        return jax.lax.scan(step, image.astype(jnp.float32), jax.random.split(key, count))[0]

    return jax.vmap(augment)(images, sharding.example_keys(key, len(images)))


def operate(image: jax.Array, number: jax.Array, strength: jax.Array) -> jax.Array:
    """Applies one operation.

    Args:
      image: float32 [h, w, c], whole numbers in 0..255.
      number: int32 scalar, the index in `OPERATIONS`.
      strength: float32 scalar in -1..1; the sign is a direction.
    """
    x = _transform(image, number, strength)
    # All are computed, and one is selected: under vmap, `lax.switch` would do the same.
    colors = (
        x,
        _blend(jnp.zeros_like(x), x, strength),
        _blend(_gray(x), x, strength),
        _blend(jnp.floor(_gray(x).mean() + 0.5), x, strength),
        _blend(_smooth(x), x, strength),
        _posterize(x, jnp.abs(strength)),
        jnp.where(x < 255 - 255 * jnp.abs(strength), x, 255 - x),
        _autocontrast(x),
        _equalize(x),
    )
    return jax.lax.select_n(jnp.where(number < len(colors), number, 0), *colors)


def _transform(image: jax.Array, number: jax.Array, strength: jax.Array) -> jax.Array:
    """Applies a geometric operation, and no other: the nearest pixel at the transformed position, or gray."""
    height, width, channels = image.shape
    is_shear_x, is_shear_y, is_shift_x, is_shift_y, is_rotation = (
        jnp.where(number == OPERATIONS.index(name), strength, 0) for name in OPERATIONS[-5:]
    )
    angle = is_rotation * np.deg2rad(_DEGREES)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Positions are those of the centers of pixels. Rotations are about the center, shears keep the corner.
    x, y = jnp.arange(width) + 0.5, jnp.arange(height)[:, None] + 0.5
    dx, dy = x - width / 2, y - height / 2
    source_x = cos * dx - sin * dy + width / 2 + is_shear_x * _SHEAR * y + is_shift_x * _SHIFT * width
    source_y = sin * dx + cos * dy + height / 2 + is_shear_y * _SHEAR * x + is_shift_y * _SHIFT * height
    column, row = jnp.floor(source_x).astype(jnp.int32), jnp.floor(source_y).astype(jnp.int32)
    is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    position = jnp.where(is_inside, row * width + column, 0)
    return jnp.where(is_inside[..., None], image.reshape(-1, channels)[position], _GRAY)


def _blend(other: jax.Array, image: jax.Array, strength: jax.Array) -> jax.Array:
    """Moves an image away from another one, or towards it, by a factor of 1 + 0.9 * strength."""
    return jnp.floor(jnp.clip(other + (1 + _FACTOR * strength) * (image - other), 0, 255))


def _gray(image: jax.Array) -> jax.Array:
    """Converts [h, w, 3] to gray [h, w, 1]; gray images stay as they are."""
    if image.shape[-1] == 1:
        return image
    return (((image.astype(jnp.int32) @ _LUMA) + 2**15) >> 16).astype(jnp.float32)[..., None]


def _smooth(image: jax.Array) -> jax.Array:
    """Applies a 3x3 filter of ones with a 5 in the middle; the border stays as it is."""
    height, width, _ = image.shape
    windows = (image[i : height - 2 + i, k : width - 2 + k] for i in range(3) for k in range(3))
    inner = jnp.floor((sum(windows) + 4 * image[1:-1, 1:-1]) / 13 + 0.5)
    return image.at[1:-1, 1:-1].set(inner)


def _posterize(image: jax.Array, strength: jax.Array) -> jax.Array:
    step = (1 << jnp.round(_BITS * strength).astype(jnp.int32)).astype(image.dtype)
    return jnp.floor(image / step) * step


def _autocontrast(image: jax.Array) -> jax.Array:
    """Stretches the values of each channel to 0..255."""
    low, high = image.min((0, 1)), image.max((0, 1))
    # A quotient that is not a whole number is at least 1/255 below the next one: the addition corrects rounding only.
    stretched = jnp.floor((image - low) * (255 / jnp.maximum(high - low, 1)) + 1e-3)
    return jnp.where(high > low, stretched, image)


def _equalize(image: jax.Array) -> jax.Array:
    """Makes the histogram of each channel flat: a table of 256 values, from the counts of the smaller ones."""
    pixels = image.reshape(-1, image.shape[-1]).astype(jnp.int32)
    # A scatter: on a CPU 50 times as fast as products of one-hot matrices.
    counts = jax.vmap(lambda channel: jnp.zeros(256, jnp.int32).at[channel].add(1), 1)(pixels)
    below = jnp.cumsum(counts, 1) - counts
    largest = jnp.take_along_axis(counts, pixels.max(0)[:, None], 1)
    step = (len(pixels) - largest) // 255
    # In float32, which is exact here: XLA:CPU divides for each pixel, and integers are slow.
    quotients = jnp.floor((step // 2 + below).astype(jnp.float32) / jnp.maximum(step, 1).astype(jnp.float32))
    table = jnp.where(step > 0, jnp.minimum(quotients, 255), jnp.arange(256.0))
    return jax.vmap(lambda row, column: row[column], (0, 1), 1)(table, pixels).reshape(image.shape)
