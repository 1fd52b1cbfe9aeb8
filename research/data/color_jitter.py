"""Color jitter: random brightness, contrast and saturation, as torchvision's ColorJitter defines them."""

import jax
import jax.numpy as jnp
import numpy as np

from research import sharding
from research.config import AugmentConfig, is_on

_LUMA = np.array([0.2989, 0.587, 0.114], np.float32)  # of red, green and blue in gray (ITU-R BT.601), as torchvision
_KINDS = ("brightness", "contrast", "saturation")


def is_jittered(config: AugmentConfig) -> bool:
    """Returns whether any of the three is on."""
    return any(is_on(getattr(config, kind)) for kind in _KINDS)


def jitter(images: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
    """Changes the brightness, contrast and saturation of each image, in random order.

    Each blends the image with another one, image * factor + other * (1 - factor): with black, with its mean gray value,
    or with the gray image. The factor is uniform in [max(0, 1 - strength), 1 + strength].

    Args:
      images: float32 [b, h, w, c] in 0..255, c 1 or 3.
      key: of this batch.
      config: has the strengths; those that are 0 are left out.

    Returns:
      Images of the same shape in 0..255, not rounded.
    """
    kinds = [kind for kind in _KINDS if is_on(getattr(config, kind))]
    strengths = jnp.stack([jnp.asarray(getattr(config, kind), jnp.float32) for kind in kinds])
    others = jnp.array([_KINDS.index(kind) for kind in kinds])

    def jitter_one(image: jax.Array, key: jax.Array) -> jax.Array:
        order_key, factor_key = jax.random.split(key)
        low, high = jnp.maximum(1 - strengths, 0), 1 + strengths
        factors = low + (high - low) * jax.random.uniform(factor_key, (len(kinds),))
        order = jax.random.permutation(order_key, len(kinds))
        for position in range(len(kinds)):
            kind = order[position]
            image = _blend(image, others[kind], factors[kind])
        return image

    return jax.vmap(jitter_one)(images, sharding.example_keys(key, len(images)))


def _blend(image: jax.Array, kind: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends [h, w, c] with black (kind 0), the mean gray value (1) or the gray image (2)."""
    gray = image @ _LUMA if image.shape[-1] == 3 else image[..., 0]
    other = jnp.where(kind == 0, 0, jnp.where(kind == 1, gray.mean(), gray))[..., None]
    return jnp.clip(factor * image + (1 - factor) * other, 0, 255)
