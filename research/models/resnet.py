"""Residual networks of basic or wide blocks; `create` builds the ImageNet network of a `ResNetConfig`.

He et al. 2016, arXiv 1512.03385, tables 1 and 5: a 7x7 convolution with stride 2, 3x3 max pooling with stride 2,
and four groups of basic blocks with 64, 128, 256 and 512 channels. The structure is that of torchvision's `resnet18`
and `resnet34`, with 11,689,512 and 21,797,672 parameters at 1,000 classes. Two initial values differ: the scale of each
block's last normalization is 0 (Goyal et al. 2017, arXiv 1706.02677, section 5.1), so that a block starts as its
shortcut, and the classifier's bias is 0.

The networks for CIFAR (`research.models.cnn`) have a 3x3 stem with stride 1 and no pooling.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.config import ResNetConfig
from research.errors import UserError
from research.layers.dropout import Dropout
from research.layers.pooling import max_pool
from research.models.blocks import HE, HE_FAN_IN, LECUN_THIRD, Style

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # depth -> blocks per group
_SMALLEST_IMAGE = 32  # the last group's resolution is 1/32


def resolve(config: ResNetConfig, image_shape: tuple[int, ...]) -> ResNetConfig:
    """Returns the config unchanged.

    Raises:
      UserError: there is no network of this depth, or the images (h, w, c) are too small.
    """
    if config.depth not in BLOCKS:
        raise UserError(f"--config.model.depth={config.depth}: use {' or '.join(map(str, BLOCKS))}")
    if min(image_shape[:2]) < _SMALLEST_IMAGE:
        size = "x".join(map(str, image_shape[:2]))
        raise UserError(f"a ResNet needs images of {_SMALLEST_IMAGE}x{_SMALLEST_IMAGE} or more, not {size}")
    return config


def create(config: ResNetConfig, *, image_shape: tuple[int, ...], num_classes: int, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a network with its initial parameters.

    It is called as `network(images, train=..., key=...)` with normalized images, float [b, h, w, c] of any size, and
    returns logits, float32 [b, classes]. `key` is for dropout and is needed in training only.

    Args:
      config: resolved (`resolve`).
      image_shape: (h, w, c).
      num_classes: the number of logits.
      rngs: for initialization.
    """
    kernel_init = HE_FAN_IN if config.parametrization == "mup" else HE  # muP scales the initial variance by fan-in
    zeros = nnx.initializers.zeros_init()
    style = Style(
        rngs, jnp.dtype(config.dtype), config.dropout, config.norm, kernel_init, LECUN_THIRD, last_scale_init=zeros
    )
    groups = [(config.width * 2**i, count) for i, count in enumerate(BLOCKS[config.depth])]
    return ResNet(style, BasicBlock, config.width, groups, image_shape[-1], num_classes, large_images=True)


class BasicBlock(nnx.Module):
    """He et al. 2016, figure 2: two 3x3 convolutions and a shortcut, with a 1x1 projection if the shape changes."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int):
        self.conv1, self.norm1 = style.conv(inputs, outputs, stride=stride), style.normalization(outputs)
        self.conv2, self.norm2 = style.conv(outputs, outputs), style.last_normalization(outputs)
        projected = stride != 1 or inputs != outputs
        self.shortcut = style.conv(inputs, outputs, 1, stride=stride) if projected else None
        self.shortcut_norm = style.normalization(outputs) if projected else None

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x), train=train))
        y = self.norm2(self.conv2(y), train=train)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x), train=train)
        return nnx.relu(x + y)


class WideBlock(nnx.Module):
    """Zagoruyko & Komodakis 2016: normalization and ReLU before each convolution, dropout between the two."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int):
        self.norm1, self.conv1 = style.normalization(inputs), style.conv(inputs, outputs, stride=stride)
        self.dropout = style.dropout()
        self.norm2, self.conv2 = style.normalization(outputs), style.conv(outputs, outputs)
        projected = stride != 1 or inputs != outputs
        self.shortcut = style.conv(inputs, outputs, 1, stride=stride) if projected else None

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        y = nnx.relu(self.norm1(x, train=train))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = nnx.relu(self.norm2(self.conv1(y), train=train))
        return shortcut + self.conv2(self.dropout(y, train=train, key=key))


class ResNet(nnx.Module):
    """Residual groups, each at half the resolution of the one before; global average pooling; linear classifier."""

    per_device_gradients = True

    def __init__(
        self,
        style: Style,
        block: type,
        stem: int,
        groups: Sequence[tuple[int, int]],
        channels: int,
        classes: int,
        *,
        large_images: bool = False,
    ):
        """`groups` are (features, number of blocks); `large_images` selects the stem for ImageNet."""
        # Blocks that begin with a normalization (pre-activation) need one after the last block, not after the stem.
        self.norm_last = block is WideBlock
        self.large_images = large_images
        self.stem = style.conv(channels, stem, 7, stride=2) if large_images else style.conv(channels, stem)
        self.blocks = nnx.List([])
        inputs = stem
        for number, (features, count) in enumerate(groups):
            for i in range(count):
                self.blocks.append(block(style, inputs, features, 2 if i == 0 and number > 0 else 1))
                inputs = features
        self.norm = style.normalization(inputs if self.norm_last else stem)
        # Wide blocks have their own dropout.
        self.dropout = Dropout(0.0) if self.norm_last else style.dropout()
        self.logits = style.linear(inputs, classes)

    def __call__(self, images: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
        keys = [None] * (len(self.blocks) + 1) if key is None else list(jax.random.split(key, len(self.blocks) + 1))
        x = self.stem(images.astype(self.logits.dtype))
        if not self.norm_last:
            x = self.norm(x, train=train)
            # Max pooling commutes with ReLU; done first, it leaves it a quarter of the work.
            x = nnx.relu(max_pool(x, 3, stride=2, padding=1) if self.large_images else x)
        for block, block_key in zip(self.blocks, keys):
            x = block(x, train=train, key=block_key)
        if self.norm_last:
            x = nnx.relu(self.norm(x, train=train))
        x = self.dropout(x.mean((1, 2)), train=train, key=keys[-1])
        return self.logits(x).astype(jnp.float32)
