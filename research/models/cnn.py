"""Convolutional networks for small images; `create` builds the network of a `CNNConfig`.

| name | source | published width, depth, normalization |
| --- | --- | --- |
| simple | the tutorial CNN: three convolutions and a hidden layer | 32, -, none |
| resnet | He et al. 2016, arXiv 1512.03385, with a 3x3 stem for CIFAR | 64, 18, batch |
| wide_resnet | Zagoruyko & Komodakis 2016, arXiv 1605.07146 | 10 (times 16), 28, batch |
| airbench | Jordan 2024, arXiv 2404.00498: airbench94 | 64, 2, batch without scale |
| | with depth 3: airbench96 | 128, 3, batch without scale |

Every network is called as `network(images, train=..., key=...)` with normalized images, float [b, h, w, c], and returns
logits, float32 [b, classes]. `key` is for dropout and is needed in training only.

The tutorial CNN is the network of TensorFlow's tutorial: https://www.tensorflow.org/tutorials/images/cnn
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.config import CNNConfig
from research.errors import UserError
from research.layers.pooling import avg_pool, max_pool
from research.models import airbench
from research.models.blocks import GLOROT, HE, HE_FAN_IN, LECUN, LECUN_THIRD, Style, check_image_size, check_norm_group
from research.models.resnet import BLOCKS, BasicBlock, ResNet, WideBlock

Pool = Callable[[jax.Array, int], jax.Array]

_PUBLISHED = {  # width, depth (0: not configurable), norm
    "simple": (32, 0, "none"),
    "resnet": (64, 18, "batch"),
    "wide_resnet": (10, 28, "batch"),
    "airbench": (64, 2, "batch"),
}
_SMALLEST_IMAGE = {"simple": 18, "resnet": 8, "wide_resnet": 4, "airbench": 25}


def resolve(config: CNNConfig, image_shape: tuple[int, ...]) -> CNNConfig:
    """Returns the config with the architecture's published values in the fields that are left open.

    Raises:
      UserError: a field is set that the architecture ignores, it does not have this depth, or the images (h, w, c) are
        too small for it.
    """
    width, depth, norm = _PUBLISHED[config.name]
    if config.depth and not depth:
        raise UserError(f"--config.model.depth={config.depth}: {config.name} has a fixed depth; leave it at 0")
    if config.pool != "max" and config.name != "simple":
        raise UserError(f"--config.model.pool={config.pool}: only the simple network supports it")
    config = dataclasses.replace(config, depth=config.depth or depth, norm=config.norm or norm)
    if config.name == "airbench":
        if config.depth not in airbench.CHANNELS:
            raise UserError(f"--config.model.depth={config.depth}: airbench has 2 or 3 convolutions per group")
        width = airbench.CHANNELS[config.depth][0]
    if config.name == "resnet" and config.depth not in BLOCKS:
        raise UserError(f"--config.model.depth={config.depth}: resnet supports {' or '.join(map(str, BLOCKS))}")
    if config.name == "wide_resnet" and (config.depth < 10 or config.depth % 6 != 4):
        raise UserError(f"--config.model.depth={config.depth}: wide_resnet has 6 n + 4 layers: 10, 16, 22, 28, ...")
    check_image_size(config.name, image_shape, _SMALLEST_IMAGE[config.name])
    check_norm_group(config.norm, config.norm_group)
    return dataclasses.replace(config, width=config.width or width)


def create(
    config: CNNConfig,
    *,
    image_shape: tuple[int, ...],
    num_classes: int,
    rngs: nnx.Rngs,
    whitening: np.ndarray | None = None,
    norm_momentum: float = 0.95,
) -> nnx.Module:
    """Builds a network with its initial parameters.

    Args:
      config: resolved (`resolve`).
      image_shape: (h, w, c).
      num_classes: the number of logits.
      rngs: for initialization.
      whitening: `airbench.whitening_kernel` of the training images; airbench needs it.
      norm_momentum: m in airbench's batch norm, running = m * running + (1 - m) * batch (PyTorch's momentum is 1 - m).
        The published values are 0.6 for airbench94 (batches of 1,024 or 2,000) and 0.9 for airbench96 (512). With
        batches of 128, the default averages over as many examples as 0.6 does with batches of 1,024.
    """
    width, depth = config.width, config.depth
    dtype = jnp.dtype(config.dtype)
    by_fan_in = config.parametrization == "mup"  # muP scales the initial variance by fan-in
    group = config.norm_group
    he_init = HE_FAN_IN if by_fan_in else HE
    he = Style(rngs, dtype, config.dropout, config.norm, he_init, LECUN_THIRD, norm_group=group)
    match config.name:
        case "simple":
            init = LECUN if by_fan_in else GLOROT
            style = Style(rngs, dtype, config.dropout, config.norm, init, init, norm_group=group)
            pool = max_pool if config.pool == "max" else avg_pool
            return Simple(style, width, pool, image_shape, num_classes)
        case "resnet":
            groups = [(width * 2**i, count) for i, count in enumerate(BLOCKS[depth])]
            return ResNet(he, BasicBlock, width, groups, image_shape[-1], num_classes)
        case "wide_resnet":
            groups = [(16 * width * 2**i, (depth - 4) // 6) for i in range(3)]
            return ResNet(he, WideBlock, 16, groups, image_shape[-1], num_classes)
        case _:
            norm = {"norm_scale": False, "norm_momentum": norm_momentum, "norm_epsilon": 1e-12, "norm_group": group}
            style = Style(rngs, dtype, config.dropout, config.norm, airbench.dirac_init, LECUN_THIRD, **norm)
            assert whitening is not None
            return airbench.Airbench(style, width, depth, whitening, image_shape, num_classes)


class Simple(nnx.Module):
    """Three 3x3 valid convolutions of w, 2w and 2w channels, 2x2 pooling after the first two, and 2w hidden units."""

    per_device_gradients = True

    def __init__(self, style: Style, width: int, pool: Pool, image_shape: tuple[int, ...], num_classes: int):
        height, width_, channels = image_shape
        sizes = [((side - 2) // 2 - 2) // 2 - 2 for side in (height, width_)]
        self.pool = pool
        # Max pooling commutes with a bias and ReLU; done first, it leaves them a quarter of the work.
        self.pool_first = pool is max_pool and style.norm == "none"
        features = [channels, width, 2 * width, 2 * width]
        pairs = list(itertools.pairwise(features))
        self.convs = nnx.List([style.conv(*pair, padding="VALID") for pair in pairs])
        self.norms = nnx.List([style.normalization(outputs) for _, outputs in pairs])
        self.hidden = style.linear(math.prod(sizes) * 2 * width, 2 * width)
        self.dropout = style.dropout()
        self.logits = style.linear(2 * width, num_classes)

    def __call__(self, images: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
        x = images.astype(self.hidden.dtype)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = conv(x)
            if i == 2:
                x = nnx.relu(norm(x, train=train))
            elif self.pool_first:
                x = nnx.relu(norm(self.pool(x, 2), train=train))
            else:
                x = self.pool(nnx.relu(norm(x, train=train)), 2)
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.logits(self.dropout(x, train=train, key=key)).astype(jnp.float32)
