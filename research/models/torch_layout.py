"""The layout of PyTorch's weights: converts arrays, and names them as torchvision and timm do."""

import numpy as np

# The arrays of a layer, by their names here.
CONV, LINEAR = ("kernel",), ("kernel", "bias")
NORM = {
    "batch": ("scale", "bias", "mean", "var"),
    "layer": ("scale", "bias"),
    "group": ("scale", "bias"),
    "none": ("bias",),
}
_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}  # HWIO -> OIHW; [in, out] -> [out, in]


def names(layer: str, arrays: tuple[str, ...], *torch_layers: str) -> dict[str, tuple[str, ...]]:
    """Returns the names in PyTorch of each of a layer's arrays.

    Args:
      layer: the layer's path, such as "blocks.0.conv1".
      arrays: `CONV`, `LINEAR`, or one of `NORM`.
      torch_layers: the layer's names in PyTorch, torchvision's first.

    Returns:
      Such as {"blocks.0.conv1.kernel": ("layer1.0.conv1.weight",)}.
    """
    return {f"{layer}.{name}": tuple(f"{peer}.{_NAMES.get(name, name)}" for peer in torch_layers) for name in arrays}


def to_torch(array: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Converts an array of a network to PyTorch's layout.

    Args:
      array: a kernel [h, w, in / groups, out] or [in, out], or a vector.
      shape: the shape in PyTorch, where it has further axes of size 1, such as those of ConvNeXt's layer scale.

    Returns:
      [out, in / groups, h, w], [out, in], or the vector; of the shape, if one is given.

    Raises:
      ValueError: the array does not have this shape.
    """
    converted = array.transpose(_AXES.get(array.ndim, range(array.ndim)))
    return _with_shape(converted, shape or converted.shape)


def from_torch(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Converts an array in PyTorch's layout to that of a network, the inverse of `to_torch`.

    Args:
      array: [out, in / groups, h, w], [out, in] or [out], with any number of further axes of size 1.
      shape: the shape in the network.

    Raises:
      ValueError: the array does not have this shape.
    """
    axes = _AXES.get(len(shape), tuple(range(len(shape))))
    transposed = tuple(shape[axis] for axis in axes)
    return _with_shape(array, transposed).transpose(np.argsort(axes))


def _with_shape(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Adds or removes last axes of size 1."""
    shorter = min(array.ndim, len(shape))
    extra = array.shape[shorter:] + tuple(shape)[shorter:]
    if array.shape[:shorter] != tuple(shape)[:shorter] or any(size != 1 for size in extra):
        raise ValueError(f"an array of shape {array.shape} does not fit {tuple(shape)}")
    return array.reshape(shape)
