"""Augmentation of a training batch, on the device: every kind, in its order, each with its own random key.

Flips and shifts, RandAugment and color jitter come before normalization, cutout and random erasing after it, mixing
last. All are random functions of the step and of the example's position in the (micro)batch: the same on any mesh.
"""

import jax
import jax.numpy as jnp

from research.config import AugmentConfig, is_on
from research.data import color_jitter, images, mixing
from research.data.batch import Batch
from research.data.erasing import erase
from research.data.mixing import MixedLabels
from research.data.randaugment import randaugment
from research.errors import UserError

_RANDAUGMENT, _JITTER, _ERASING, _MIXING = range(3, 7)  # numbers of keys; `images.augment` has the first three


def check(config: AugmentConfig, image_shape: tuple[int, ...], num_classes: int, examples_at_once: int) -> None:
    """Raises `UserError` if an augmentation is impossible, or without an effect, with these images and batches.

    Args:
      config: within its bounds.
      image_shape: h, w, c.
      num_classes: of the data set.
      examples_at_once: of a forward pass, over all devices.
    """
    images.check(config, image_shape)
    if (config.randaugment == 0) != (config.randaugment_magnitude == 0):
        raise UserError(
            f"--config.augment.randaugment={config.randaugment} "
            f"--config.augment.randaugment_magnitude={config.randaugment_magnitude}: RandAugment needs both, as in 2 "
            "and 9; leave both out for none"
        )
    channels = image_shape[-1]
    for name, allowed in (("randaugment", (1, 3)), ("contrast", (1, 3)), ("saturation", (3,))):
        if getattr(config, name) and channels not in allowed:
            raise UserError(
                f"--config.augment.{name}={getattr(config, name)} needs images of "
                f"{' or '.join(map(str, allowed))} channels, not {channels}; set it to 0"
            )
    for name in ("mixup", "cutmix"):
        if (alpha := getattr(config, name)) and num_classes < 2:
            raise UserError(f"--config.augment.{name}={alpha} mixes classes, but the data set has {num_classes}")
        if alpha and examples_at_once < 2:
            raise UserError(
                f"--config.augment.{name}={alpha} mixes the images of a batch, which has 1 (--config.batch_size or "
                "--config.microbatch_size): use 2 or more"
            )


def augment(
    batch: Batch, key: jax.Array, config: AugmentConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[jax.Array, MixedLabels | None]:
    """Augments and normalizes the images of a batch.

    Args:
      batch: "image" uint8 [b, h, w, c] and "label" int [b].
      key: of this batch.
      config: checked.
      mean, std: of each channel, for values in 0..1.

    Returns:
      The images, float32 [b, h, w, c], normalized; and their labels if they are mixed, else None.
    """

    def key_of(number: int) -> jax.Array:
        return jax.random.fold_in(key, number)

    def change_colors(pixels: jax.Array) -> jax.Array:
        if config.randaugment:
            pixels = randaugment(pixels, key_of(_RANDAUGMENT), config.randaugment, config.randaugment_magnitude)
        if color_jitter.is_jittered(config):
            pixels = color_jitter.jitter(pixels.astype(jnp.float32), key_of(_JITTER), config)
        return images.normalize(pixels, mean, std)

    numbers = {"index": batch.index, "epoch": batch.epoch}
    if config.randaugment or color_jitter.is_jittered(config):
        inputs = images.augment(batch["image"], key, config, **numbers, between=change_colors)
    else:
        inputs = images.augment(images.normalize(batch["image"], mean, std), key, config, **numbers)
    if is_on(config.erasing):
        inputs = erase(inputs, key_of(_ERASING), config.erasing)
    return mixing.mix(inputs, batch["label"], key_of(_MIXING), config) if mixing.is_mixed(config) else (inputs, None)
