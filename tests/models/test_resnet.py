"""ResNet-18 in training equals a reference in NumPy; initial values. test_image_networks.py tests evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.config import CNNConfig, ImageNetworkConfig
from research.models import cnn, image_networks

SHAPE = (64, 64, 3)


def _create(config: ImageNetworkConfig, image_shape=SHAPE, num_classes=10) -> nnx.Module:
    config = image_networks.resolve(config, image_shape)
    return image_networks.create(config, image_shape=image_shape, num_classes=num_classes, rngs=nnx.Rngs(0))


def _random(config: ImageNetworkConfig, image_shape=SHAPE) -> nnx.Module:
    """Returns a network in which every value is random, batch statistics and scales too."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _create(config, image_shape)))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if leaf.ndim > 1:
            values = rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif "scale" in str(path) or "var" in str(path):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _call(graphdef, state, images, key, train):
    model = nnx.merge(graphdef, state, copy=True)
    return model(images, train=train, key=key), nnx.state(model, nnx.BatchStat)


def _apply(model: nnx.Module, images, *, train: bool, key=None):
    """Returns the logits and the batch statistics after the call."""
    graphdef, state = nnx.split(model)
    return _call(graphdef, state, images, key, train)


def _images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


class Reference:
    """The network in training, in NumPy, in float64, with the values of a `resnet.ResNet`."""

    def __init__(self, model: nnx.Module):
        self.values = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))

    def conv(self, x, kernel, stride):
        side = len(kernel)
        x = np.pad(x, ((0, 0), (side // 2, side // 2), (side // 2, side // 2), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(x, (side, side), (1, 2))[:, ::stride, ::stride]
        return np.einsum("bhwcij,ijco->bhwo", patches, kernel, optimize=True)

    def norm(self, x, values):
        values = values["layer"]
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) / np.sqrt(var + 1e-5)
        values["mean"] = 0.9 * values["mean"] + 0.1 * mean
        values["var"] = 0.9 * values["var"] + 0.1 * var
        return x * values["scale"] + values["bias"]

    def block(self, x, values, stride):
        y = np.maximum(self.norm(self.conv(x, values["conv1"]["kernel"], stride), values["norm1"]), 0)
        y = self.norm(self.conv(y, values["conv2"]["kernel"], 1), values["norm2"])
        if "shortcut" in values:
            x = self.norm(self.conv(x, values["shortcut"]["kernel"], stride), values["shortcut_norm"])
        return np.maximum(x + y, 0)

    def __call__(self, images):
        values = self.values
        x = np.maximum(self.norm(self.conv(np.float64(images), values["stem"]["kernel"], 2), values["norm"]), 0)
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((-1, -2))
        first, previous = True, x.shape[-1]
        for _, block in sorted(values["blocks"].items()):
            features = block["conv1"]["kernel"].shape[-1]
            x = self.block(x, block, 1 if first or features == previous else 2)
            first, previous = False, features
        return x.mean((1, 2)) @ values["logits"]["kernel"] + values["logits"]["bias"]


def test_logits_and_batch_statistics_in_training_equal_a_reference_in_numpy():
    config, shape = ImageNetworkConfig(width=4), (65, 97, 3)
    model, images = _random(config, shape), _images(4, *shape)
    reference = Reference(model)
    expected = reference(images)
    logits, statistics = _apply(model, images, train=True)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    updated = nnx.to_pure_dict(statistics)
    assert len(jax.tree.leaves(updated)) == 2 * 20
    jax.tree.map_with_path(
        lambda path, value: np.testing.assert_allclose(
            value, functools.reduce(lambda tree, key: tree[key.key], path, reference.values), rtol=1e-3, atol=1e-4
        ),
        updated,
    )


def _initial(config, select):
    """Returns what `select` takes from a new network; the compiled program draws nothing else."""
    return jax.tree.map(np.asarray, jax.jit(lambda: select(_create(config)))())


def test_scales_of_last_normalizations_start_at_zero():
    def scales(model):
        return [(block.norm1.layer.scale[...], block.norm2.layer.scale[...]) for block in model.blocks]

    for first, last in _initial(ImageNetworkConfig(width=4), scales):
        assert np.all(first == 1)
        assert not np.any(last)


def test_a_block_starts_as_its_shortcut():
    x = jnp.asarray(_images(2, 5, 5, 4))
    y = _initial(ImageNetworkConfig(width=4), lambda model: model.blocks[0](x, train=True, key=None))
    np.testing.assert_array_equal(y, nnx.relu(x))


@pytest.mark.parametrize(("mup", "fan_axis"), [(False, 3), (True, 2)])
def test_kernels_have_he_initialization(mup, fan_axis):
    """By fan-out, with mup by fan-in."""

    def kernels(model):
        return [model.stem.kernel[...], model.blocks[-2].conv1.kernel[...]]

    config = ImageNetworkConfig(width=16, parametrization="mup" if mup else "standard", base_width=4)
    for kernel in _initial(config, kernels):
        fan = kernel.shape[0] * kernel.shape[1] * kernel.shape[fan_axis]
        np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / fan), rtol=0.05)
    classifier = _initial(config, lambda model: (model.logits.kernel[...], model.logits.bias[...]))
    assert 0.9 / np.sqrt(128) < np.abs(classifier[0]).max() <= 1 / np.sqrt(128)
    assert not np.any(classifier[1])


def test_networks_for_cifar_keep_their_initial_scales():
    config = cnn.resolve(CNNConfig(name="resnet", width=4), (32, 32, 3))

    def scales():
        model = cnn.create(config, image_shape=(32, 32, 3), num_classes=10, rngs=nnx.Rngs(0))
        return [block.norm2.layer.scale[...] for block in model.blocks]

    assert all(np.all(scale == 1) for scale in jax.jit(scales)())


@functools.cache
def _trained_logits(**fields):
    model = _random(ImageNetworkConfig(width=4, **fields), (32, 32, 3))
    return _apply(model, _images(2, 32, 32, 3), train=True, key=jax.random.key(0))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value"), [("norm", "group"), ("dtype", "bfloat16"), ("dropout", 0.5)])
def test_each_field_changes_the_output(field, value):
    changed = _trained_logits(**{field: value})
    assert changed.dtype == jnp.float32
    assert np.abs(_trained_logits() - changed).max() > 1e-4
