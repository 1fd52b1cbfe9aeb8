"""Layers for the networks; a `Style` builds all layers of one network with the same options."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from research import sharding
from research.errors import UserError
from research.layers.batch_norm import BatchNorm
from research.layers.bias import bias_add
from research.layers.convolution import conv_general_dilated
from research.layers.dropout import Dropout, DropPath

GLOROT = nnx.initializers.glorot_uniform()
HE = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, equation 14
HE_FAN_IN = nnx.initializers.he_normal()
LECUN = nnx.initializers.lecun_normal()
ONES = nnx.initializers.ones_init()
LECUN_THIRD = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default


def check_norm_group(norm: str, norm_group: int) -> None:
    """Raises `UserError` if batch norm's groups are set for another normalization."""
    if norm_group and norm != "batch":
        raise UserError(f"--config.model.norm_group={norm_group} is for batch norm, not for norm={norm}; leave it out")


def check_image_size(name: str, image_shape: tuple[int, ...], smallest: int) -> None:
    """Raises `UserError` if images (h, w, c) are too small for the network of that name."""
    if min(image_shape[:2]) < smallest:
        size = "x".join(map(str, image_shape[:2]))
        raise UserError(f"--config.model.name={name} needs images of {smallest}x{smallest} or more, not {size}")


class Bias(nnx.Module):
    """x + bias, in place of a normalization in a network without any."""

    def __init__(self, features: int):
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return bias_add(x, self.bias[...].astype(x.dtype))


def rows_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes x @ kernel, [..., inputs] by [inputs, outputs], with a kernel gradient that is faster on a CPU."""
    # A kernel's gradient sums over all axes of x but the last. If these are several, XLA:CPU first writes a transposed
    # copy of x: 118 ms instead of 64 for float32 [784, 32, 192] by [192, 768] on 2 x86 cores. Sharded axes must stay
    # apart: the partitioner cannot express the sharding of their product.
    if x.ndim == 2 or not sharding.is_unsharded():
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Linear):
    """`nnx.Linear` with faster gradients of kernel and bias."""

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, dtype = self.kernel[...], self.dtype or x.dtype
        y = rows_product(x.astype(dtype), kernel.astype(dtype))
        return y if self.bias is None else bias_add(y, self.bias[...].astype(dtype))


class Norm(nnx.Module):
    """Normalizes the last axis's features: batch, layer or group norm (at most 32 groups), or only a bias."""

    def __init__(self, style: "Style", features: int, scale_init: nnx.Initializer = ONES):
        options = {"use_scale": style.norm_scale, "epsilon": style.norm_epsilon, "dtype": style.dtype}
        options["scale_init"] = scale_init
        match style.norm:
            case "batch":
                self.layer = BatchNorm(features, momentum=style.norm_momentum, rngs=style.rngs, **options)
                self.layer.group_size = style.norm_group
            case "layer":
                self.layer = nnx.LayerNorm(features, use_fast_variance=False, rngs=style.rngs, **options)
            case "group":
                options |= {"num_groups": math.gcd(32, features), "use_fast_variance": False}
                self.layer = nnx.GroupNorm(features, rngs=style.rngs, **options)
            case _:
                self.layer = Bias(features)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if isinstance(self.layer, BatchNorm):
            if train:  # average the statistics over the devices where each computes its part of the batch on its own
                self.layer.axis_name = sharding.manual_batch_axes()  # pyright: ignore[reportAttributeAccessIssue]
            return self.layer(x, use_running_average=not train)
        return self.layer(x)


@dataclasses.dataclass(frozen=True)
class Style:
    """The options that all layers of one network share, and factories of these layers.

    Attributes:
      rngs: for initialization.
      dtype: of the computation; parameters are float32.
      dropout_rate: the rate of `dropout`.
      norm: "none", "batch", "layer" or "group".
      kernel_init, linear_init: initializers of convolutions and of dense layers.
      norm_scale: whether normalizations have a scale; all have a bias.
      norm_momentum: of batch norm's moving averages.
      norm_epsilon: added to the variance.
      norm_group: how many examples batch norm takes its statistics of, 0: all.
      last_scale_init: initializer of the scale of each residual block's last normalization.
      drop_path_rate: the rate of `drop_path` in the last block.
      depth: of the block that is built, from 0, the first, to 1, the last (`at_depth`).
    """

    rngs: nnx.Rngs
    dtype: jax.typing.DTypeLike
    dropout_rate: float
    norm: str
    kernel_init: nnx.Initializer
    linear_init: nnx.Initializer
    norm_scale: bool = True
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    norm_group: int = 0
    last_scale_init: nnx.Initializer = ONES
    drop_path_rate: float = 0.0
    depth: float = 0.0

    def at_depth(self, index: int, num_blocks: int) -> "Style":
        """Returns the style of one of the network's blocks."""
        return dataclasses.replace(self, depth=index / max(1, num_blocks - 1))

    def conv(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: str | None = None,
        groups: int = 1,
        use_bias: bool = False,
    ) -> nnx.Conv:
        """Builds a convolution; the default padding is `size // 2` on all sides, whatever the stride."""
        return nnx.Conv(
            inputs,
            outputs,
            (size, size),
            stride,
            padding=padding or size // 2,
            feature_group_count=groups,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            conv_general_dilated=conv_general_dilated,
            rngs=self.rngs,
        )

    def linear(self, inputs: int, outputs: int, *, use_bias: bool = True) -> Linear:
        """Builds a dense layer."""
        options = {"use_bias": use_bias, "dtype": self.dtype, "kernel_init": self.linear_init}
        return Linear(inputs, outputs, rngs=self.rngs, **options)

    def normalization(self, features: int) -> Norm:
        """Builds a normalization."""
        return Norm(self, features)

    def last_normalization(self, features: int) -> Norm:
        """Builds the normalization at the end of a residual block."""
        return Norm(self, features, self.last_scale_init)

    def dropout(self) -> Dropout:
        """Builds a dropout layer."""
        return Dropout(self.dropout_rate)

    def drop_path(self) -> DropPath:
        """Builds the stochastic depth of a residual block."""
        return DropPath(self.drop_path_rate, self.depth)
