"""The networks have the published shapes, and every field of their config has its effect."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.config import CNNConfig
from research.errors import UserError
from research.layers.dropout import Dropout
from research.layers.gelu import gelu
from research.models import airbench, cnn

CIFAR = (32, 32, 3)


def _config(**fields) -> CNNConfig:
    config = CNNConfig(**fields)
    config = cnn.resolve(config, CIFAR)
    return config


def _create(config: CNNConfig, image_shape=CIFAR, seed=0) -> nnx.Module:
    channels = image_shape[-1]
    whitening = np.random.default_rng(0).standard_normal((2, 2, channels, 8 * channels)).astype(np.float32)

    return cnn.create(config, image_shape=image_shape, num_classes=10, rngs=nnx.Rngs(seed), whitening=whitening)


def _filled(config: CNNConfig) -> nnx.Module:
    """Returns a network with kernels drawn by NumPy: compiling the initialization would dominate the tests."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _create(config)))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if leaf.ndim > 1:
            return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1]), leaf.dtype)
        return jnp.full(leaf.shape, "scale" in str(path) or "var" in str(path), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


def _apply(model: nnx.Module, x: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
    """Computes the model's output in one compiled program; training updates the batch statistics in place."""
    graphdef, state = nnx.split(model)
    logits, after = _call(graphdef, state, x, key, train)
    nnx.update(model, after)
    return logits


@functools.partial(jax.jit, static_argnums=(0, 4))
def _call(graphdef, state, x, key, train):
    model = nnx.merge(graphdef, state, copy=True)
    return model(x, train=train, key=key), nnx.state(model)


@functools.cache
def _images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def _num_params(config: CNNConfig) -> int:
    params = nnx.state(nnx.eval_shape(lambda: _create(config)), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _simple_params(w: int) -> int:
    convolutions = (9 * 3 + 1) * w + (9 * w + 1) * 2 * w + (9 * 2 * w + 1) * 2 * w
    return convolutions + (16 * 2 * w + 1) * 2 * w + (2 * w + 1) * 10


def _airbench_params(*channels: int, depth: int) -> int:
    """Counts airbench's parameters: groups of `depth` 3x3 convolutions without bias, with batch norms without scale."""
    whitened = 2 * 3 * 2 * 2
    params, inputs = whitened, whitened  # the bias after the frozen whitening
    for outputs in channels:
        params += 9 * inputs * outputs + (depth - 1) * 9 * outputs * outputs + depth * outputs
        inputs = outputs
    return params + inputs * 10


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "simple"}, 122_570),  # Keras's summary() of the tutorial's model
        ({"name": "simple", "width": 48}, _simple_params(48)),
        ({"name": "resnet"}, 11_173_962),  # kuangliu/pytorch-cifar's ResNet18
        ({"name": "resnet", "depth": 34}, 21_282_122),  # and ResNet34
        ({"name": "wide_resnet"}, 36_479_194),  # Zagoruyko & Komodakis 2016, table 5: 36.5M
        ({"name": "wide_resnet", "depth": 16, "width": 8}, 10_961_370),  # and 11.0M
        ({"name": "airbench"}, _airbench_params(64, 256, 256, depth=2)),  # airbench94_muon.py
        ({"name": "airbench", "width": 32}, _airbench_params(32, 128, 128, depth=2)),
        ({"name": "airbench", "depth": 3}, _airbench_params(128, 384, 512, depth=3)),  # airbench96_faster.py
        ({"name": "airbench", "depth": 3}, 9_915_416),
        ({"name": "airbench", "depth": 3, "width": 32}, _airbench_params(32, 96, 128, depth=3)),
    ],
)
def test_parameter_counts(fields, expected):
    assert _num_params(_config(**fields)) == expected


@pytest.mark.parametrize("name", ["simple", "resnet", "wide_resnet", "airbench"])
@pytest.mark.parametrize("norm", ["", "none", "batch", "layer", "group"])
@pytest.mark.parametrize(
    ("image_shape", "dtype"),
    [pytest.param((32, 32, 3), "bfloat16", marks=pytest.mark.slow), ((28, 28, 1), "float32")],
)
def test_every_network_and_norm_gives_float32_logits(name, norm, image_shape, dtype):
    config = _config(name=name, norm=norm, dtype=dtype, dropout=0.1)

    def logits(key):
        return _create(config, image_shape)(jnp.zeros((4, *image_shape)), train=True, key=key)

    shape = jax.eval_shape(logits, jax.random.key(0))
    assert shape.shape == (4, 10)
    assert shape.dtype == jnp.float32


@pytest.mark.parametrize(
    "name", ["simple", *(pytest.param(x, marks=pytest.mark.slow) for x in ("resnet", "wide_resnet")), "airbench"]
)
def test_dropout_acts_in_training_only_and_stores_no_random_state(name):
    small = {"simple": 4, "resnet": 4, "wide_resnet": 1, "airbench": 4}
    depth = 10 if name == "wide_resnet" else 0
    model = _filled(_config(name=name, dropout=0.5, norm="layer", width=small[name], depth=depth))
    x = _images(4, *CIFAR)
    evaluation = _apply(model, x, train=False, key=jax.random.key(0))
    np.testing.assert_array_equal(evaluation, _apply(model, x, train=False))
    one, other = (_apply(model, x, train=True, key=jax.random.key(seed)) for seed in (1, 2))
    assert not np.allclose(one, other)
    assert not np.allclose(one, evaluation)
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 8), ("pool", "average"), ("norm", "layer"), ("dtype", "bfloat16"), ("dropout", 0.5)],
)
def test_each_field_changes_the_output(field, value):
    plain, changed = (
        _apply(_filled(_config(**{"width": 4, **fields})), _images(2, *CIFAR), train=True, key=jax.random.key(0))
        for fields in ({}, {field: value})
    )
    assert np.abs(plain - changed).max() > 1e-4


def test_the_simple_network_is_the_tutorial_cnn():
    """Against plain lax in the tutorial's order: convolution, bias, ReLU, pooling."""
    model = _filled(_config(width=4))
    for norm in model.norms:
        norm.layer.bias[...] = jax.random.normal(jax.random.key(5), norm.layer.bias.shape)
    x = _images(3, *CIFAR)
    expected = x
    for i, (conv, norm) in enumerate(zip(model.convs, model.norms)):
        expected = jax.lax.conv_general_dilated(
            expected, conv.kernel[...], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        expected = jax.nn.relu(expected + norm.layer.bias[...])
        if i < 2:
            expected = nnx.max_pool(expected, (2, 2), (2, 2))
    hidden = jax.nn.relu(expected.reshape(3, -1) @ model.hidden.kernel[...] + model.hidden.bias[...])
    expected = hidden @ model.logits.kernel[...] + model.logits.bias[...]
    np.testing.assert_allclose(_apply(model, x, train=False), expected, atol=1e-5)


@pytest.mark.parametrize("depth", [2, 3])
def test_an_airbench_group_is_as_published(depth):
    """Against plain lax: pooling after the first convolution; with depth 3, a shortcut before the last exact GELU."""
    group = _filled(_config(name="airbench", width=4, depth=depth, norm="none")).groups[1]
    x = _images(3, 14, 14, 4)
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    plain = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    kernels = [conv.kernel[...] for conv in group.convs]
    assert len(kernels) == depth
    first = gelu(nnx.max_pool(plain(x, kernels[0]), (2, 2), (2, 2)))
    expected = gelu(plain(first, kernels[1]))
    if depth == 3:
        expected = gelu(plain(expected, kernels[2]) + first)
    np.testing.assert_allclose(group(x, train=False), expected, atol=2e-5)  # the tanh GELU is off by 5e-4


@pytest.mark.parametrize("name", ["resnet", "airbench"])
def test_batch_norm_learns_its_statistics_in_training_only(name):
    model = _filled(_config(name=name, width=4))

    def statistics(train):
        _apply(model, _images(4, *CIFAR), train=train, key=jax.random.key(0))
        return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.BatchStat))]

    before, after = statistics(train=False), statistics(train=True)
    assert all(np.isin(leaf, (0, 1)).all() for leaf in before)  # as initialized
    assert not any(np.allclose(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("momentum", [0.6, pytest.param(0.95, marks=pytest.mark.slow)])
def test_airbenchs_running_statistics_follow_the_momentum(momentum):
    images = _images(8, *CIFAR)
    whitening = np.random.default_rng(0).standard_normal((2, 2, 3, 24)).astype(np.float32)
    model: Any = cnn.create(
        _config(name="airbench", width=4),
        image_shape=CIFAR,
        num_classes=10,
        rngs=nnx.Rngs(0),
        whitening=whitening,
        norm_momentum=momentum,
    )
    _apply(model, images, train=True)
    after_one = np.asarray(model.groups[0].norms[0].layer.mean[...])
    assert np.abs(after_one).max() > 0
    _apply(model, images, train=True)  # the same batch again: mean = (1 - m) batch, then (1 - m^2) batch
    np.testing.assert_allclose(
        model.groups[0].norms[0].layer.mean[...], (1 + momentum) * after_one, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_airbenchs_gelu_and_its_gradient_are_exact(dtype, tolerance):
    x = np.linspace(-6, 6, 4001)
    density = np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi)
    below = np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)) / 2)(x)  # Phi(x)
    values, gradients = jax.vmap(jax.value_and_grad(gelu))(jnp.asarray(x, dtype))
    assert values.dtype == gradients.dtype == dtype
    np.testing.assert_allclose(np.float64(values), x * below, atol=tolerance)
    np.testing.assert_allclose(np.float64(gradients), below + x * density, atol=tolerance)


def test_whitening_makes_patches_white():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((50, 33, 33, 3)).astype(np.float32)
    images = noise[:, 1:, 1:] + noise[:, :-1, 1:] + 0.5 * noise[:, 1:, :-1]  # neighbors are correlated
    kernel = airbench.whitening_kernel(images, epsilon=0.0)
    assert kernel.shape == (2, 2, 3, 24)
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
    out = jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    rows = np.float64(out[..., :12].reshape(-1, 12))
    np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(12), atol=1e-3)


def test_airbench_is_initialized_as_published():
    model = _create(_config(name="airbench", width=32))
    for conv in [conv for group in model.groups for conv in group.convs]:
        kernel = np.asarray(conv.kernel[...])
        inputs, outputs = kernel.shape[2:]
        same = min(inputs, outputs)
        np.testing.assert_array_equal(kernel[1, 1, :, :same], np.eye(inputs, same))
        assert np.abs(kernel[..., :same]).sum() == same
        if outputs > same:
            bound = 1 / np.sqrt(9 * inputs)  # PyTorch's default for a convolution
            assert 0.9 * bound < np.abs(kernel[..., same:]).max() <= bound
    frozen = nnx.state(model, airbench.Frozen)
    assert len(jax.tree.leaves(frozen)) == 1


@pytest.mark.parametrize(
    ("fields", "image_shape", "words"),
    [
        ({"name": "simple", "depth": 3}, CIFAR, "depth=3"),
        ({"name": "airbench", "depth": 4}, CIFAR, "2 or 3 convolutions"),
        ({"name": "resnet", "depth": 20}, CIFAR, "18 or 34"),
        ({"name": "wide_resnet", "depth": 17}, CIFAR, "10, 16, 22, 28"),
        ({"name": "resnet", "pool": "average"}, CIFAR, "pool=average"),
        ({"name": "simple"}, (17, 32, 3), "18x18"),
        ({"name": "airbench"}, (24, 24, 1), "25x25"),
    ],
)
def test_unsupported_configs_are_an_error(fields, image_shape, words):
    with pytest.raises(UserError, match=words):
        cnn.resolve(CNNConfig(**fields), image_shape)


@pytest.mark.parametrize(("name", "side"), [("simple", 18), ("airbench", 25), ("resnet", 8), ("wide_resnet", 4)])
@pytest.mark.parametrize("more", [0, 1, 23])
def test_the_smallest_images_and_larger_ones_work(name, side, more):
    config = _config(name=name, width=4)
    shape = (side + more, side + more, 1)
    assert jax.eval_shape(lambda: _create(config, shape)(jnp.zeros((2, *shape)), train=False)).shape == (2, 10)


@pytest.mark.parametrize("rate", [0.5, jnp.float32(0.5)])
def test_dropout_keeps_the_dtype(rate):
    x = jnp.ones((2, 8), jnp.bfloat16)
    assert Dropout(rate)(x, train=True, key=jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["simple", "resnet"])
def test_only_batch_norm_has_groups(name):
    config = CNNConfig(name=name, norm="layer", norm_group=8)
    with pytest.raises(UserError, match=r"norm_group=8 is for batch norm, not for norm=layer"):
        cnn.resolve(config, (32, 32, 3))
