"""The networks for images of ImageNet's size, by name."""

from typing import Any

from flax import nnx

from research.config import ImageNetworkConfig
from research.model_config import CONVNEXTS
from research.models import convnext, resnet
from research.models.blocks import check_image_size

_SMALLEST_IMAGE = 32  # the resolution of the last blocks is 1/32


def _module(config: ImageNetworkConfig) -> Any:
    return convnext if config.name in CONVNEXTS else resnet


def resolve(config: ImageNetworkConfig, image_shape: tuple[int, ...]) -> ImageNetworkConfig:
    """Returns the config with the network's published values in the fields that are left open.

    Raises:
      UserError: the images (h, w, c) are too small.
    """
    check_image_size(config.name, image_shape, _SMALLEST_IMAGE)
    return _module(config).resolve(config)


def create(config: ImageNetworkConfig, *, image_shape: tuple[int, ...], num_classes: int, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a network with its initial parameters.

    It is called as `network(images, train=..., key=...)` with normalized images, float [b, h, w, c] of any size, and
    returns logits, float32 [b, classes]. `key` is for dropout and stochastic depth, and is needed in training only.

    Args:
      config: resolved (`resolve`).
      image_shape: (h, w, c).
      num_classes: the number of logits.
      rngs: for initialization.
    """
    return _module(config).create(config, channels=image_shape[-1], num_classes=num_classes, rngs=rngs)


def torch_names(config: ImageNetworkConfig) -> dict[str, tuple[str, ...]]:
    """Returns the names of every parameter and batch statistic in torchvision, then in timm where they differ.

    Args:
      config: resolved (`resolve`).

    Returns:
      Such as {"blocks.0.conv1.kernel": ("layer1.0.conv1.weight",)}. `research.models.torch_layout` converts the arrays.
    """
    return _module(config).torch_names(config)
