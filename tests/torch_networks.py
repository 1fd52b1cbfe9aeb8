"""ResNet and ConvNeXt in evaluation mode, in NumPy: from the papers, with torchvision's names, layouts and defaults.

A network is called with its state, arrays by name, and images [b, c, h, w]; it returns logits [b, classes].
"""

import functools
import math

import numpy as np


def conv(state, name, x, stride=1, padding=0, groups=1):
    """A convolution, with bias if the state has one."""
    kernel = state[f"{name}.weight"]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    patches = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    if groups == 1:
        y = np.einsum("bchwij,ocij->bohw", patches, kernel, optimize=True)
    else:
        assert groups == len(kernel) == x.shape[1]
        y = np.einsum("bchwij,cij->bchw", patches, kernel[:, 0], optimize=True)
    bias = state.get(f"{name}.bias")
    return y if bias is None else y + bias[:, None, None]


def linear(state, name, x):
    """A dense layer of the last axis."""
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def batch_norm(state, name, x):
    """Normalization by the running statistics."""
    weight, bias, mean, var = (state[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var"))
    return ((x.swapaxes(1, -1) - mean) / np.sqrt(var + 1e-5) * weight + bias).swapaxes(1, -1)


def layer_norm(state, name, x):
    """Layer normalization of the last axis."""
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def relu(x):
    """The positive part."""
    return np.maximum(x, 0)


def _residual(state, name, x, stride):
    def conv_norm(number, x, **options):
        return batch_norm(state, f"{name}.bn{number}", conv(state, f"{name}.conv{number}", x, **options))

    if f"{name}.conv3.weight" in state:
        y = relu(conv_norm(1, x))
        y = relu(conv_norm(2, y, stride=stride, padding=1))
        y = conv_norm(3, y)
    else:
        y = conv_norm(2, relu(conv_norm(1, x, stride=stride, padding=1)), padding=1)
    if f"{name}.downsample.0.weight" in state:
        x = batch_norm(state, f"{name}.downsample.1", conv(state, f"{name}.downsample.0", x, stride=stride))
    return relu(x + y)


def resnet(blocks, state, x):
    """He et al. 2016, with the stride of a bottleneck in its 3x3 convolution."""
    x = relu(batch_norm(state, "bn1", conv(state, "conv1", x, stride=2, padding=3)))
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2].max((-1, -2))
    for group, count in enumerate(blocks):
        for i in range(count):
            x = _residual(state, f"layer{group + 1}.{i}", x, 2 if group and not i else 1)
    return linear(state, "fc", x.mean((2, 3)))


def convnext(blocks, state, x):
    """Liu et al. 2022; between normalizations and convolutions, channels move to the end and back."""
    to_last, to_first = functools.partial(np.moveaxis, source=1, destination=-1), np.moveaxis
    erf = np.vectorize(math.erf)
    for stage, count in enumerate(blocks):
        name = f"features.{2 * stage}"
        if stage == 0:
            x = layer_norm(state, f"{name}.1", to_last(conv(state, f"{name}.0", x, stride=4)))
        else:
            x = to_last(conv(state, f"{name}.1", to_first(layer_norm(state, f"{name}.0", to_last(x)), -1, 1), stride=2))
        x = to_first(x, -1, 1)
        for i in range(count):
            name = f"features.{2 * stage + 1}.{i}"
            y = to_last(conv(state, f"{name}.block.0", x, padding=3, groups=x.shape[1]))
            y = linear(state, f"{name}.block.3", layer_norm(state, f"{name}.block.2", y))
            y = linear(state, f"{name}.block.5", y * (1 + erf(y / math.sqrt(2))) / 2)
            x = x + to_first(y * state[f"{name}.layer_scale"].reshape(-1), -1, 1)
    return linear(state, "classifier.2", layer_norm(state, "classifier.0", x.mean((2, 3))))


NETWORKS = {
    "resnet18": functools.partial(resnet, (2, 2, 2, 2)),
    "resnet50": functools.partial(resnet, (3, 4, 6, 3)),
    "convnext_tiny": functools.partial(convnext, (3, 3, 9, 3)),
}
