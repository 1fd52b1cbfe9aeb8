"""Residual networks; `create` builds a ResNet for ImageNet.

He et al. 2016, arXiv 1512.03385, tables 1 and 5: a 7x7 convolution with stride 2, 3x3 max pooling with stride 2,
and four groups of basic blocks with 64, 128, 256 and 512 channels, or of bottlenecks with four times as many outputs.
A bottleneck's stride is that of its 3x3 convolution ("v1.5", as in torchvision), not of its first 1x1 convolution. The
structure is that of torchvision's `resnet18` to `resnet152`. Two initial values differ: the scale of each block's last
normalization is 0 (Goyal et al. 2017, arXiv 1706.02677, section 5.1), so that a block starts as its shortcut, and the
classifier's bias is 0.

The networks for CIFAR (`research.models.cnn`) have a 3x3 stem with stride 1 and no pooling.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from research.config import ImageNetworkConfig
from research.layers.dropout import Dropout
from research.layers.pooling import max_pool
from research.models import torch_layout
from research.models.blocks import HE, HE_FAN_IN, LECUN_THIRD, Style

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # depth -> basic blocks per group
_BOTTLENECKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resolve(config: ImageNetworkConfig) -> ImageNetworkConfig:
    """Returns the config with the published values in the fields that are left open."""
    return dataclasses.replace(config, width=config.width or 64, norm=config.norm or "batch")


def create(config: ImageNetworkConfig, *, channels: int, num_classes: int, rngs: nnx.Rngs) -> "ResNet":
    """Builds the network of a resolved config for images of that many channels (`image_networks.create`)."""
    kernel_init = HE_FAN_IN if config.parametrization == "mup" else HE  # muP scales the initial variance by fan-in
    zeros = nnx.initializers.zeros_init()
    options = {"last_scale_init": zeros, "drop_path_rate": config.drop_path}
    style = Style(rngs, jnp.dtype(config.dtype), config.dropout, config.norm, kernel_init, LECUN_THIRD, **options)
    block, counts = _structure(config.name)
    groups = [(config.width * 2**i, count) for i, count in enumerate(counts)]
    return ResNet(style, block, config.width, groups, channels, num_classes, large_images=True)


def _structure(name: str) -> tuple[Any, tuple[int, ...]]:
    """Returns the class of the blocks, and how many there are per group."""
    depth = int(name.removeprefix("resnet"))
    return (BasicBlock, BLOCKS[depth]) if depth in BLOCKS else (Bottleneck, _BOTTLENECKS[depth])


def torch_names(config: ImageNetworkConfig) -> dict[str, tuple[str, ...]]:
    """Returns the names of every parameter and batch statistic in torchvision and timm, which have the same ones.

    Args:
      config: resolved (`resolve`).

    Returns:
      Such as {"blocks.0.conv1.kernel": ("layer1.0.conv1.weight",)}. `research.models.torch_layout` converts the arrays.
    """
    named = torch_layout.names("logits", torch_layout.LINEAR, "fc")
    for conv, norm, torch_conv, torch_norm in _layers(config.name):
        named |= torch_layout.names(conv, torch_layout.CONV, torch_conv)
        named |= torch_layout.names(f"{norm}.layer", torch_layout.NORM[config.norm], torch_norm)
    return named


def _layers(name: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields the paths of each convolution and of its normalization: here, then in PyTorch."""
    yield "stem", "norm", "conv1", "bn1"
    block, counts = _structure(name)
    number = 0
    for group, count in enumerate(counts):
        for i in range(count):
            ours, peer = f"blocks.{number}.", f"layer{group + 1}.{i}."
            for conv in range(1, block.num_convs + 1):
                yield f"{ours}conv{conv}", f"{ours}norm{conv}", f"{peer}conv{conv}", f"{peer}bn{conv}"
            if i == 0 and (group > 0 or block.expansion > 1):
                yield f"{ours}shortcut", f"{ours}shortcut_norm", f"{peer}downsample.0", f"{peer}downsample.1"
            number += 1


class _Block(nnx.Module):
    """A residual block: ReLU of the sum of its convolutions and of a shortcut, which is projected if the shape changes.

    Attributes:
      expansion: how many times the block's features its output has.
      num_convs: the convolutions, each with a normalization.
    """

    expansion: ClassVar[int] = 1
    num_convs: ClassVar[int]

    def _init_shortcut(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        projected = stride != 1 or inputs != outputs
        self.drop_path = style.drop_path()
        self.shortcut = style.conv(inputs, outputs, 1, stride=stride) if projected else None
        self.shortcut_norm = style.normalization(outputs) if projected else None

    def _add(self, x: jax.Array, y: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x), train=train)
        return nnx.relu(x + self.drop_path(y, train=train, key=key))


class BasicBlock(_Block):
    """He et al. 2016, figure 2: two 3x3 convolutions and a shortcut, with a 1x1 projection if the shape changes."""

    num_convs = 2

    def __init__(self, style: Style, inputs: int, features: int, stride: int):
        self.conv1, self.norm1 = style.conv(inputs, features, stride=stride), style.normalization(features)
        self.conv2, self.norm2 = style.conv(features, features), style.last_normalization(features)
        self._init_shortcut(style, inputs, features, stride)

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x), train=train))
        y = self.norm2(self.conv2(y), train=train)
        return self._add(x, y, train=train, key=key)


class Bottleneck(_Block):
    """He et al. 2016, figure 5, right: 1x1, 3x3 and 1x1 convolutions, the last of which has four times the features."""

    expansion, num_convs = 4, 3

    def __init__(self, style: Style, inputs: int, features: int, stride: int):
        outputs = self.expansion * features
        self.conv1, self.norm1 = style.conv(inputs, features, 1), style.normalization(features)
        self.conv2, self.norm2 = style.conv(features, features, stride=stride), style.normalization(features)
        self.conv3, self.norm3 = style.conv(features, outputs, 1), style.last_normalization(outputs)
        self._init_shortcut(style, inputs, outputs, stride)

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x), train=train))
        y = nnx.relu(self.norm2(self.conv2(y), train=train))
        y = self.norm3(self.conv3(y), train=train)
        return self._add(x, y, train=train, key=key)


class WideBlock(nnx.Module):
    """Zagoruyko & Komodakis 2016: normalization and ReLU before each convolution, dropout between the two."""

    expansion: ClassVar[int] = 1

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
        block: Any,
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
        inputs, num_blocks = stem, sum(count for _, count in groups)
        for number, (features, count) in enumerate(groups):
            for i in range(count):
                at_depth = style.at_depth(len(self.blocks), num_blocks)
                self.blocks.append(block(at_depth, inputs, features, 2 if i == 0 and number > 0 else 1))
                inputs = features * block.expansion
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
