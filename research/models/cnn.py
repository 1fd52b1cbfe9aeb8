"""Convolutional networks for small images; `create` builds the one that a `CNNConfig` describes.

| name | source | published width, depth, normalisation |
| --- | --- | --- |
| simple | the paper: three convolutions and a hidden layer | 32, -, none |
| resnet | He et al. 2016, arXiv 1512.03385, with a 3x3 stem for CIFAR | 64, 18, batch |
| wide_resnet | Zagoruyko & Komodakis 2016, arXiv 1605.07146 | 10 (times 16), 28, batch |
| airbench | Jordan 2024, arXiv 2404.00498: airbench94; of depth 3 as airbench96 | 64, 2, batch without scale |

Every network is called as `network(images, train=..., key=...)` with normalised images, float [b, h, w, c], and gives
logits, float32 [b, classes]. `key` is for dropout, in training only.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.config import CNNConfig
from research.errors import UserError
from research.layers.convolution import conv2d
from research.layers.dropout import Dropout
from research.layers.pooling import avg_pool, max_pool
from research.models.blocks import GLOROT, HE, HE_FAN_IN, LECUN, LECUN_THIRD, Bias, Style

Pool = Callable[[jax.Array, int], jax.Array]

_PUBLISHED = {  # width, depth, norm
    "simple": (32, 0, "none"),
    "resnet": (64, 18, "batch"),
    "wide_resnet": (10, 28, "batch"),
    "airbench": (64, 2, "batch"),
}
_SMALLEST_IMAGE = {"simple": 18, "resnet": 8, "wide_resnet": 4, "airbench": 25}
_RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def resolve(config: CNNConfig, image_shape: tuple[int, ...]) -> None:
    """Fills in place what the config leaves to the architecture, so that the record shows it.

    Raises:
      UserError: a field is set that the architecture would ignore, a depth that it does not have, or the images
        (h, w, c) are too small for it.
    """
    width, depth, norm = _PUBLISHED[config.name]
    if config.depth and not depth:
        raise UserError(f"--config.model.depth={config.depth}: {config.name} has one depth; leave it 0")
    if config.pool != "max" and config.name != "simple":
        raise UserError(f"--config.model.pool={config.pool}: only the simple network has this choice")
    config.width, config.depth, config.norm = config.width or width, config.depth or depth, config.norm or norm
    if config.name == "airbench" and config.depth not in (2, 3):
        raise UserError(f"--config.model.depth={config.depth}: airbench has 2 or 3 convolutions a group")
    if config.name == "resnet" and config.depth not in _RESNET_BLOCKS:
        raise UserError(f"--config.model.depth={config.depth}: resnet has {' or '.join(map(str, _RESNET_BLOCKS))}")
    if config.name == "wide_resnet" and (config.depth < 10 or config.depth % 6 != 4):
        raise UserError(f"--config.model.depth={config.depth}: wide_resnet has 6 n + 4 layers: 10, 16, 22, 28, ...")
    if min(image_shape[:2]) < (smallest := _SMALLEST_IMAGE[config.name]):
        size = "x".join(map(str, image_shape[:2]))
        raise UserError(f"--config.model.name={config.name} needs images of {smallest}x{smallest} or more, not {size}")


def create(
    config: CNNConfig,
    *,
    image_shape: tuple[int, ...],
    num_classes: int,
    rngs: nnx.Rngs,
    whitening: np.ndarray | None = None,
) -> nnx.Module:
    """Builds a network with its initial parameters.

    Args:
      config: resolved (`resolve`).
      image_shape: (h, w, c).
      num_classes: the number of logits.
      rngs: for initialisation.
      whitening: `whitening_kernel` of the training images; airbench needs it.
    """
    width, depth = config.width, config.depth
    dtype = jnp.dtype(config.dtype)
    by_fan_in = config.parametrization == "mup"
    he = Style(rngs, dtype, config.dropout, config.norm, HE_FAN_IN if by_fan_in else HE, LECUN_THIRD)
    match config.name:
        case "simple":
            init = LECUN if by_fan_in else GLOROT
            style = Style(rngs, dtype, config.dropout, config.norm, init, init)
            pool = max_pool if config.pool == "max" else avg_pool
            return Simple(style, width, pool, image_shape, num_classes)
        case "resnet":
            groups = [(width * 2**i, count) for i, count in enumerate(_RESNET_BLOCKS[depth])]
            return ResNet(he, BasicBlock, width, groups, image_shape[-1], num_classes)
        case "wide_resnet":
            groups = [(16 * width * 2**i, (depth - 4) // 6) for i in range(3)]
            return ResNet(he, WideBlock, 16, groups, image_shape[-1], num_classes)
        case _:
            # Published is a momentum of 0.6, for batches of 1,024; 0.95 averages as many examples at 128.
            norm = {"norm_scale": False, "norm_momentum": 0.95, "norm_epsilon": 1e-12}
            style = Style(rngs, dtype, config.dropout, config.norm, _dirac, LECUN_THIRD, **norm)
            assert whitening is not None
            return Airbench(style, width, depth, whitening, image_shape, num_classes)


def whitening_kernel(images: np.ndarray, epsilon: float = 5e-4) -> np.ndarray:
    """The kernel that whitens 2x2 patches (Jordan 2024, section 3.2), computed on the host.

    Args:
      images: float32 [n, h, w, c], normalised.
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


class Simple(nnx.Module):
    """Three 3x3 valid convolutions of w, 2w and 2w channels, 2x2 pooling after the first two, and 2w hidden units."""

    def __init__(self, style: Style, width: int, pool: Pool, image_shape: tuple[int, ...], num_classes: int):
        height, width_, channels = image_shape
        sizes = [((side - 2) // 2 - 2) // 2 - 2 for side in (height, width_)]
        self.pool = pool
        # Max pooling commutes with a bias and ReLU, so it goes before them: a quarter of the work.
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


class BasicBlock(nnx.Module):
    """He et al. 2016, figure 2: two 3x3 convolutions beside a shortcut, projected by 1x1 where the shape changes."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int):
        self.conv1, self.norm1 = style.conv(inputs, outputs, stride=stride), style.normalization(outputs)
        self.conv2, self.norm2 = style.conv(outputs, outputs), style.normalization(outputs)
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
    """Zagoruyko & Komodakis 2016: normalisation and ReLU before each convolution, dropout between the two."""

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
    """Residual groups, the later ones at half the resolution of the one before; global average; a linear classifier."""

    def __init__(
        self, style: Style, block: type, stem: int, groups: Sequence[tuple[int, int]], channels: int, classes: int
    ):
        """`groups` are (features, number of blocks)."""
        # A block that begins with a normalisation leaves one to be done at the end instead of the beginning.
        self.norm_last = block is WideBlock
        self.stem = style.conv(channels, stem)
        self.blocks = nnx.List([])
        inputs = stem
        for number, (features, count) in enumerate(groups):
            for i in range(count):
                self.blocks.append(block(style, inputs, features, 2 if i == 0 and number > 0 else 1))
                inputs = features
        self.norm = style.normalization(inputs if self.norm_last else stem)
        # A wide network drops out within its blocks.
        self.dropout = Dropout(0.0) if self.norm_last else style.dropout()
        self.logits = style.linear(inputs, classes)

    def __call__(self, images: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
        keys = [None] * (len(self.blocks) + 1) if key is None else list(jax.random.split(key, len(self.blocks) + 1))
        x = self.stem(images.astype(self.logits.dtype))
        if not self.norm_last:
            x = nnx.relu(self.norm(x, train=train))
        for block, block_key in zip(self.blocks, keys):
            x = block(x, train=train, key=block_key)
        if self.norm_last:
            x = nnx.relu(self.norm(x, train=train))
        x = self.dropout(x.mean((1, 2)), train=train, key=keys[-1])
        return self.logits(x).astype(jnp.float32)


def _dirac(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> jax.Array:
    """The identity in the first outputs, as many as there are inputs; the rest uniform (Jordan 2024, section 3.3)."""
    height, width, inputs, outputs = shape
    kernel = LECUN_THIRD(key, shape, dtype)
    same = min(inputs, outputs)
    identity = jnp.zeros((height, width, inputs, same), dtype)
    identity = identity.at[height // 2, width // 2].set(jnp.eye(inputs, same, dtype=dtype))
    return kernel.at[..., :same].set(identity)


class AirbenchGroup(nnx.Module):
    """Jordan 2024, section 3: convolutions, the first pooled; where there are three, the last adds what followed it."""

    def __init__(self, style: Style, inputs: int, outputs: int, depth: int):
        self.convs = nnx.List([style.conv(inputs if i == 0 else outputs, outputs) for i in range(depth)])
        self.norms = nnx.List([style.normalization(outputs) for _ in range(depth)])

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        first = x = nnx.gelu(self.norms[0](max_pool(self.convs[0](x), 2), train=train))
        for i in range(1, len(self.convs)):
            x = self.norms[i](self.convs[i](x), train=train)
            x = nnx.gelu(x + first if i == 2 else x)
        return x


class Airbench(nnx.Module):
    """Jordan 2024, section 3: a frozen whitening layer, three groups of convolutions, GELU, a scaled classifier."""

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
        features = [whitened, width, 4 * width, 4 * width]
        self.groups = nnx.List([AirbenchGroup(style, *pair, depth) for pair in itertools.pairwise(features)])
        self.dropout = style.dropout()
        sizes = [(side - 1) // 8 // 3 for side in image_shape[:2]]
        self.logits = style.linear(math.prod(sizes) * features[-1], num_classes, use_bias=False)

    def __call__(self, images: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
        x = images.astype(self.logits.dtype)
        x = nnx.gelu(self.bias(conv2d(x, self.whitening[...].astype(x.dtype), padding="VALID")))
        for group in self.groups:
            x = group(x, train=train)
        x = max_pool(x, 3).reshape(x.shape[0], -1)
        return self.logits(self.dropout(x, train=train, key=key)).astype(jnp.float32) / 9
