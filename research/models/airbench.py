"""The airbench networks (Jordan 2024, arXiv 2404.00498): whitening, three groups of convolutions, a scaled classifier.

The published networks (github.com/KellerJordan/cifar10-airbench) have 64/256/256 channels and two convolutions a group
(airbench94), or 128/384/512 and three (airbench96). `research.models.cnn.create` builds them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.layers.convolution import conv2d
from research.layers.gelu import gelu
from research.layers.pooling import max_pool
from research.models.blocks import LECUN_THIRD, Bias, Style

CHANNELS = {2: (64, 256, 256), 3: (128, 384, 512)}  # convolutions a group -> published channels of the three groups


def whitening_kernel(images: np.ndarray, epsilon: float = 5e-4) -> np.ndarray:
    """Computes the kernel that whitens 2x2 patches (Jordan 2024, section 3.2), on the host.

    Args:
      images: float32 [n, h, w, c], normalized.
      epsilon: added to the patches' variances.

    Returns:
      float32 [2, 2, c, 8 c]: the principal directions, each divided by its standard deviation, then their negatives.
    """
    patches = np.lib.stride_tricks.sliding_window_view(images, (2, 2), axis=(1, 2))  # [n, h-1, w-1, c, 2, 2]
    channels = images.shape[-1]
    rows = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 4 * channels)
    variances, directions = np.linalg.eigh(rows.T @ rows / len(rows))
    kernel = (directions / np.sqrt(variances + epsilon))[:, ::-1].reshape(2, 2, channels, 4 * channels)
    return np.concatenate([kernel, -kernel], axis=-1).astype(np.float32)


class Frozen(nnx.Variable):
    """An array that is never trained."""


def dirac_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> jax.Array:
    """Initializes the first outputs to the identity of the inputs, the rest uniformly (Jordan 2024, section 3.3)."""
    height, width, inputs, outputs = shape
    kernel = LECUN_THIRD(key, shape, dtype)
    count = min(inputs, outputs)
    identity = jnp.zeros((height, width, inputs, count), dtype)
    identity = identity.at[height // 2, width // 2].set(jnp.eye(inputs, count, dtype=dtype))
    return kernel.at[..., :count].set(identity)


class AirbenchGroup(nnx.Module):
    """Jordan 2024, section 3: 2 or 3 convolutions with max pooling after the first; the third adds a residual."""

    def __init__(self, style: Style, inputs: int, outputs: int, depth: int):
        self.convs = nnx.List([style.conv(inputs if i == 0 else outputs, outputs) for i in range(depth)])
        self.norms = nnx.List([style.normalization(outputs) for _ in range(depth)])

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        first = x = gelu(self.norms[0](max_pool(self.convs[0](x), 2), train=train))
        for i in range(1, len(self.convs)):
            x = self.norms[i](self.convs[i](x), train=train)
            x = gelu(x + first if i == 2 else x)
        return x


class Airbench(nnx.Module):
    """Jordan 2024, section 3: a frozen whitening layer, three groups of convolutions, exact GELU, a scaled classifier.

    `width` is the number of channels of the first group. The other two have 4 and 4 times as many at depth 2, 3 and 4
    times as many at depth 3: 64/256/256 (airbench94) and 128/384/512 (airbench96) at the published widths.
    """

    per_device_gradients = True

    def __init__(
        self,
        style: Style,
        width: int,
        depth: int,
        whitening: np.ndarray,
        image_shape: tuple[int, ...],
        num_classes: int,
    ):
        whitened = whitening.shape[-1]
        self.whitening = Frozen(jnp.asarray(whitening))
        self.bias = Bias(whitened)
        published = CHANNELS[depth]
        features = [whitened, *(width * channels // published[0] for channels in published)]
        self.groups = nnx.List([AirbenchGroup(style, *pair, depth) for pair in itertools.pairwise(features)])
        self.dropout = style.dropout()
        sizes = [(side - 1) // 8 // 3 for side in image_shape[:2]]
        self.logits = style.linear(math.prod(sizes) * features[-1], num_classes, use_bias=False)

    def __call__(self, images: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
        x = images.astype(self.logits.dtype)
        x = gelu(self.bias(conv2d(x, self.whitening[...].astype(x.dtype), padding="VALID")))
        for group in self.groups:
            x = group(x, train=train)
        x = max_pool(x, 3).reshape(x.shape[0], -1)
        return self.logits(self.dropout(x, train=train, key=key)).astype(jnp.float32) / 9
