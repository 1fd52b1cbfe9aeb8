"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545); `create` builds one.

A 4x4 convolution with stride 4 and three 2x2 convolutions with stride 2 divide four stages of blocks. A block is a
depthwise 7x7 convolution and, at each pixel, an MLP of two layers. The structure and the initialization are those of
torchvision's `convnext_tiny`, `convnext_small` and `convnext_base`.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from research.config import ImageNetworkConfig
from research.layers.gelu import gelu
from research.models import torch_layout
from research.models.blocks import LECUN, Style

_PUBLISHED = {  # width, blocks per stage
    "convnext_tiny": (96, (3, 3, 9, 3)),
    "convnext_small": (96, (3, 3, 27, 3)),
    "convnext_base": (128, (3, 3, 27, 3)),
}
_LAYER_SCALE = 1e-6
_EPSILON = 1e-6  # of the normalizations
# The paper's is truncated, but at 2 (PyTorch's default), 100 standard deviations.
_INIT = nnx.initializers.normal(0.02)


def resolve(config: ImageNetworkConfig) -> ImageNetworkConfig:
    """Returns the config with the published values in the fields that are left open."""
    width = config.width or _PUBLISHED[config.name][0]
    return dataclasses.replace(config, width=width, norm=config.norm or "layer")


def create(config: ImageNetworkConfig, *, channels: int, num_classes: int, rngs: nnx.Rngs) -> "ConvNeXt":
    """Builds the network of a resolved config for images of that many channels (`image_networks.create`)."""
    init = LECUN if config.parametrization == "mup" else _INIT  # muP scales the initial variance by fan-in
    style = Style(
        rngs,
        jnp.dtype(config.dtype),
        config.dropout,
        config.norm,
        init,
        init,
        norm_epsilon=_EPSILON,
        drop_path_rate=config.drop_path,
        norm_group=config.norm_group,
    )
    return ConvNeXt(style, config.width, _PUBLISHED[config.name][1], channels, num_classes)


def torch_names(config: ImageNetworkConfig) -> dict[str, tuple[str, ...]]:
    """Returns the names of every parameter in torchvision, then in timm.

    Args:
      config: resolved (`resolve`).

    Returns:
      Such as {"blocks.0.conv.kernel": ("features.1.0.block.0.weight", "stages.0.blocks.0.conv_dw.weight")}.
      `research.models.torch_layout` converts the arrays.
    """
    conv, norm, named = torch_layout.LINEAR, torch_layout.NORM[config.norm], {}

    def put(layer: str, arrays: tuple[str, ...], *peers: str) -> None:
        named.update(torch_layout.names(layer, arrays, *peers))

    put("stem", conv, "features.0.0", "stem.0")
    put("stem_norm.layer", norm, "features.0.1", "stem.1")
    number = 0
    for stage, count in enumerate(_PUBLISHED[config.name][1]):
        if stage:
            ours, peer = f"downsamples.{stage - 1}", f"stages.{stage}.downsample"
            put(f"{ours}.norm.layer", norm, f"features.{2 * stage}.0", f"{peer}.0")
            put(f"{ours}.conv", conv, f"features.{2 * stage}.1", f"{peer}.1")
        for i in range(count):
            ours, torchvision, timm = f"blocks.{number}", f"features.{2 * stage + 1}.{i}", f"stages.{stage}.blocks.{i}"
            put(f"{ours}.conv", conv, f"{torchvision}.block.0", f"{timm}.conv_dw")
            put(f"{ours}.norm.layer", norm, f"{torchvision}.block.2", f"{timm}.norm")
            put(f"{ours}.expand", torch_layout.LINEAR, f"{torchvision}.block.3", f"{timm}.mlp.fc1")
            put(f"{ours}.contract", torch_layout.LINEAR, f"{torchvision}.block.5", f"{timm}.mlp.fc2")
            named[f"{ours}.layer_scale"] = (f"{torchvision}.layer_scale", f"{timm}.gamma")
            number += 1
    put("norm.layer", norm, "classifier.0", "head.norm")
    put("logits", torch_layout.LINEAR, "classifier.2", "head.fc")
    return named


class Block(nnx.Module):
    """Liu et al. 2022, figure 4: depthwise 7x7 convolution, normalization, an MLP with GELU, and a scale by channel."""

    def __init__(self, style: Style, features: int):
        self.conv = style.conv(features, features, 7, groups=features, use_bias=True)
        self.norm = style.normalization(features)
        self.expand, self.contract = style.linear(features, 4 * features), style.linear(4 * features, features)
        self.layer_scale = nnx.Param(jnp.full(features, _LAYER_SCALE))
        self.drop_path = style.drop_path()

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        y = self.expand(self.norm(self.conv(x), train=train))
        y = self.contract(gelu(y)) * self.layer_scale[...].astype(x.dtype)
        return x + self.drop_path(y, train=train, key=key)


class Downsample(nnx.Module):
    """Normalization, and a 2x2 convolution with stride 2."""

    def __init__(self, style: Style, inputs: int, outputs: int):
        self.norm = style.normalization(inputs)
        self.conv = style.conv(inputs, outputs, 2, stride=2, padding="VALID", use_bias=True)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.conv(self.norm(x, train=train))


class ConvNeXt(nnx.Module):
    """A patch stem, four stages of blocks, global average pooling, normalization, and a linear classifier."""

    per_device_gradients = True

    def __init__(self, style: Style, width: int, counts: tuple[int, ...], channels: int, classes: int):
        self.counts = counts
        self.stem = style.conv(channels, width, 4, stride=4, padding="VALID", use_bias=True)
        self.stem_norm = style.normalization(width)
        features = [width * 2**stage for stage in range(len(counts))]
        self.downsamples = nnx.List([Downsample(style, *pair) for pair in itertools.pairwise(features)])
        sizes = [size for size, count in zip(features, counts) for _ in range(count)]
        self.blocks = nnx.List([Block(style.at_depth(i, len(sizes)), size) for i, size in enumerate(sizes)])
        self.norm, self.dropout = style.normalization(features[-1]), style.dropout()
        self.logits = style.linear(features[-1], classes)

    def __call__(self, images: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
        keys = [None] * (len(self.blocks) + 1) if key is None else list(jax.random.split(key, len(self.blocks) + 1))
        x = self.stem_norm(self.stem(images.astype(self.logits.dtype)), train=train)
        # The numbers of the blocks that begin a stage.
        first = dict(zip(itertools.accumulate(self.counts[:-1]), self.downsamples))
        for i, (block, block_key) in enumerate(zip(self.blocks, keys)):
            if i in first:
                x = first[i](x, train=train)
            x = block(x, train=train, key=block_key)
        x = self.norm(x.mean((1, 2)), train=train)
        return self.logits(self.dropout(x, train=train, key=keys[-1])).astype(jnp.float32)
