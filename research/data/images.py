"""Images on the device: normalization, and random augmentation (crop, flip, cutout)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research import randomness, sharding
from research.config import AugmentConfig, DatasetConfig
from research.errors import UserError
from research.randomness import Stream


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes the mean and standard deviation of each channel, on the host in float64.

    Args:
      images: uint8 [n, h, w, c]; a memory map may be larger than memory.

    Returns:
      mean, std: c numbers each, for values in 0..1. The std of a constant channel is given as 1, so that `normalize`
      makes it 0.

    Raises:
      UserError: `images` has another shape or dtype.
    """
    _check(images)
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)  # exact histograms: no cancellation in the variance below
    chunk = max(1, 2**20 // images[0].size)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        counts += [np.bincount(part[..., channel].ravel(), minlength=256) for channel in range(channels)]
    values, number = np.arange(256), counts[0].sum()
    mean = counts @ values / number
    std = np.sqrt((counts * np.square(values - mean[:, None])).sum(1) / number)
    return tuple((mean / 255).tolist()), tuple(np.where(std > 0, std / 255, 1.0).tolist())


def pixel_means(images: np.ndarray) -> np.ndarray:
    """Computes the mean image, float64 [h, w, c] in 0..1.

    Args:
      images: uint8 [n, h, w, c]; a memory map may be larger than memory.

    Raises:
      UserError: `images` has another shape or dtype.
    """
    _check(images)
    chunk = max(1, 2**20 // images[0].size)
    parts = (images[start : start + chunk].sum(0, dtype=np.int64) for start in range(0, len(images), chunk))
    return sum(parts, np.zeros(images.shape[1:], np.int64)) / (255 * len(images))


def _check(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"images are {images.dtype}{list(images.shape)}; they must be uint8 [n, height, width, channels], "
            "with values from 0 to 255"
        )


def normalize(
    images: jax.typing.ArrayLike,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Normalizes each channel, (images / 255 - mean) / std: uint8 [b, h, w, c] to `dtype`, computed in float32."""
    scale = 1 / (255 * np.asarray(std))
    offset = np.asarray(mean) / np.asarray(std)
    return (jnp.asarray(images, jnp.float32) * scale.astype(np.float32) - offset.astype(np.float32)).astype(dtype)


def check(config: AugmentConfig, image_shape: tuple[int, ...]) -> None:
    """Raises `UserError` if images of `image_shape` (h, w, c) are too small for this augmentation."""
    side = min(image_shape[:2])
    if config.crop >= side:
        raise UserError(f"--config.augment.crop={config.crop}: must be below the images' side, {side}")
    if config.cutout > side:
        raise UserError(f"--config.augment.cutout={config.cutout}: must be at most the images' side, {side}")


def check_one_size(config: DatasetConfig) -> None:
    """Raises `UserError` if images have another size in training than in evaluation."""
    if config.train_image_size not in (0, config.image_size):
        raise UserError(
            f"--config.dataset.train_image_size={config.train_image_size}: this network needs images of one size in "
            f"training and evaluation, which has {config.image_size}; leave the flag out"
        )


def augment(
    images: jax.Array,
    key: jax.Array,
    config: AugmentConfig,
    *,
    index: jax.Array,
    epoch: jax.Array,
    between: Callable[[jax.Array], jax.Array] = lambda images: images,
) -> jax.Array:
    """Augments images: random flip, random crop and cutout, drawn independently for each image.

    The crop is that of the image padded by reflection, which is a shift by up to `config.crop` pixels.

    Args:
      images: float [b, h, w, c], normalized, or as `between` needs them.
      key: of this batch.
      config: the kinds of augmentation and their strengths, already checked by `check`.
      index: int32 [b], the examples' numbers in the training set; used by alternating flips only.
      epoch: int32 [b], the examples' epochs; used by alternating flips only.
      between: applied to the cropped images; returns normalized ones (cutout fills with 0, the mean).

    Returns:
      Images of the same shape.
    """
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    count, height, width, _ = images.shape
    rows, columns = (jnp.broadcast_to(jnp.arange(size), (count, size)) for size in (height, width))
    if config.flip != "none":
        columns = jnp.where(_flipped(config.flip, flip_key, index, epoch)[:, None], columns[:, ::-1], columns)
    if config.crop:
        draw = jax.vmap(lambda key: jax.random.randint(key, (2, 1), -config.crop, config.crop + 1), out_axes=1)
        down, right = draw(sharding.example_keys(crop_key, count))
        rows, columns = _reflect(rows + down, height), _reflect(columns + right, width)
    if config.crop or config.flip != "none":
        # One gather does both: on XLA:CPU 5 times as fast as slicing padded images, 15 times as one-hot matmuls.
        images = jax.vmap(lambda image, row, column: image[row[:, None], column])(images, rows, columns)
    images = between(images)
    return _cutout(images, cutout_key, config.cutout) if config.cutout else images


def _reflect(position: jax.Array, size: int) -> jax.Array:
    """Mirrors positions outside 0..size-1 at the first and the last, as NumPy's pad mode "reflect" does."""
    position = jnp.abs(position)
    return jnp.where(position >= size, 2 * (size - 1) - position, position)


def _flipped(kind: str, key: jax.Array, index: jax.Array, epoch: jax.Array) -> jax.Array:
    """Returns which images are flipped, bool [b].

    "alternating" (Jordan 2024, arXiv 2404.00498, section 3.6): a random half in the first epoch, then each image every
    other epoch. The half is chosen by a hash of the image's number, so it is the same in every run, as in that paper.
    """
    if kind == "random":
        return jax.vmap(jax.random.bernoulli)(sharding.example_keys(key, len(index)))
    hash_key = randomness.key(Stream.ALTERNATING_FLIP)
    half = jax.vmap(lambda number: jax.random.bits(jax.random.fold_in(hash_key, number)))(index)
    return (half + epoch.astype(half.dtype)) % 2 == 1


def _cutout(images: jax.Array, key: jax.Array, side: int) -> jax.Array:
    """Sets a square around a uniformly drawn pixel to 0, clipped at the borders (DeVries & Taylor 2017, 3.2).

    Before clipping, the square covers rows (and columns) p - side // 2 to p - side // 2 + side - 1 for the drawn p: an
    odd side is centered at p, an even one has one more row above and one more column to the left. DeVries & Taylor's
    code does the same for even sides and rounds odd ones down.
    """
    count, height, width, _ = images.shape

    def inside(key: jax.Array, size: int) -> jax.Array:
        draw = jax.vmap(lambda key: jax.random.randint(key, (1,), 0, size))
        start = draw(sharding.example_keys(key, count)) - side // 2
        offset = jnp.arange(size) - start
        return (offset >= 0) & (offset < side)

    row_key, column_key = jax.random.split(key)
    square = inside(row_key, height)[:, :, None] & inside(column_key, width)[:, None, :]
    return jnp.where(square[..., None], 0, images)
