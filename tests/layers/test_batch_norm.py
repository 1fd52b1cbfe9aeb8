"""Batch norm's statistics and gradients equal those of float64, also for a large mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import AS_USERS
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research import sharding
from research.config import Config, MeshConfig
from research.models.blocks import Norm, Style

FEATURES, EPSILON, MOMENTUM = 4, 1e-5, 0.9
SHAPES = [(16, 6, 5, FEATURES), (16, FEATURES)]

_compiled = functools.partial(jax.jit, compiler_options=AS_USERS)


def _norm(dtype, **options) -> Norm:
    """Returns a batch norm whose scale and bias differ between features."""
    init = nnx.initializers.zeros_init()
    norm = Norm(Style(nnx.Rngs(0), jnp.dtype(dtype), 0.0, "batch", init, init, **options), FEATURES)
    if norm.layer.scale is not None:
        norm.layer.scale[...] = jnp.arange(1.0, FEATURES + 1) / 4
    norm.layer.bias[...] = jnp.arange(FEATURES) / 8
    return norm


def _trained(norm, x, dy):
    """Returns y, running mean, running variance, and the gradients of x, scale and bias, of one training call."""
    graphdef, params, statistics = nnx.split(norm, nnx.Param, nnx.BatchStat)

    def call(params, x):
        merged = nnx.merge(graphdef, params, statistics, copy=True)
        return merged(x, train=True), (merged.layer.mean[...], merged.layer.var[...])

    y, vjp, (mean, variance) = jax.vjp(call, params, x, has_aux=True)
    d_params, d_x = vjp(dy)
    return y, mean, variance, d_x, d_params["layer"]["scale"][...], d_params["layer"]["bias"][...]


def _reference(norm, x, dy):
    x, dy = np.float64(x), np.float64(dy)
    scale, bias = np.float64(norm.layer.scale[...]), np.float64(norm.layer.bias[...])
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes), x.var(axes)
    inverse = 1 / np.sqrt(variance + EPSILON)
    unit = (x - mean) * inverse
    d_bias, d_scale = dy.sum(axes), (dy * unit).sum(axes)
    count = x.size / x.shape[-1]
    d_x = scale * inverse * (dy - d_bias / count - unit * d_scale / count)
    running = (1 - MOMENTUM) * mean, MOMENTUM + (1 - MOMENTUM) * variance
    return unit * scale + bias, *running, d_x, d_scale, d_bias


def _draw(shape, mean, dtype):
    rng = np.random.default_rng(0)
    # In bfloat16, numbers near 10,000 are 64 apart.
    deviation = max(1.0, mean / 100) if dtype == "bfloat16" else 1.0
    x, dy = mean + deviation * rng.standard_normal(shape), rng.standard_normal(shape)
    return jnp.asarray(x, dtype), jnp.asarray(dy, dtype)


def _agree(ours, theirs, dtype, tolerance_of_float32=1e-5):
    for name, one, other in zip(("y", "mean", "variance", "d_x", "d_scale", "d_bias"), ours, theirs, strict=True):
        tolerance = 1e-2 if dtype == "bfloat16" and name in ("y", "d_x") else tolerance_of_float32
        np.testing.assert_allclose(
            np.float64(one), other, rtol=tolerance, atol=tolerance * np.abs(other).max(), err_msg=name
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_agrees_with_float64(shape, mean, dtype):
    norm, (x, dy) = _norm(dtype), _draw(shape, mean, dtype)
    ours = _compiled(lambda x, dy: _trained(norm, x, dy))(x, dy)
    assert ours[0].dtype == ours[3].dtype == x.dtype
    _agree(ours, _reference(norm, x, dy), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_group_has_its_own_statistics(shape):
    norm, (x, dy) = _norm("float32", norm_group=4), _draw(shape, 1e3, "float32")
    x = x + jnp.arange(len(x)).reshape(-1, *[1] * (len(shape) - 1))
    ours = _compiled(lambda x, dy: _trained(norm, x, dy))(x, dy)
    groups = [_reference(norm, x[i : i + 4], dy[i : i + 4]) for i in range(0, len(x), 4)]
    y, mean, variance, d_x, d_scale, d_bias = zip(*groups)
    together = np.concatenate(y), np.mean(mean, 0), np.mean(variance, 0), np.concatenate(d_x)
    _agree(ours, (*together, np.sum(d_scale, 0), np.sum(d_bias, 0)), "float32", 5e-5)


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
def test_four_devices_have_the_statistics_of_the_whole_batch(mean, dtype, manual):
    """Both within `jax.shard_map` (manual) and with arrays sharded by GSPMD."""
    mesh = sharding.make_mesh(Config(batch_size=16, mesh=MeshConfig(data=2, fsdp=2)), jax.devices()[:4])
    norm, (x, dy) = _norm(dtype), _draw(SHAPES[0], mean, dtype)
    # Each device's part has a different mean.
    x = (x + jnp.repeat(jnp.arange(4), 4)[:, None, None, None]).astype(dtype)
    rows = P(sharding.BATCH_AXES)

    def call(x, dy):
        return _trained(norm, x, dy)

    with jax.set_mesh(mesh):
        if manual:
            outputs = (rows, P(), P(), rows, P(), P())
            call = jax.shard_map(call, in_specs=(rows, rows), out_specs=outputs)
        ours = _compiled(call)(*(jax.device_put(array, NamedSharding(mesh, rows)) for array in (x, dy)))
    _agree(ours, _reference(norm, x, dy), dtype)


def test_the_middle_row_may_be_far_from_the_mean():
    """The variance is computed around the mean of the middle row, here 1,000 deviations away from the other rows."""
    x, dy = _draw(SHAPES[0], 1e3, "float32")
    x = x.at[:, 3].add(1e3)
    norm = _norm("float32")
    _agree(_compiled(lambda x, dy: _trained(norm, x, dy))(x, dy), _reference(norm, x, dy), "float32", 2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_uses_the_running_averages_in_float32(dtype):
    norm, x = _norm(dtype), jnp.asarray(_draw(SHAPES[0], 1e3, "float32")[0], dtype)
    mean, variance = 1000 + np.arange(FEATURES) / 3, np.arange(1.0, FEATURES + 1)
    norm.layer.mean[...], norm.layer.var[...] = jnp.asarray(mean, jnp.float32), jnp.asarray(variance, jnp.float32)
    expected = (np.float64(x) - mean) / np.sqrt(variance + EPSILON) * np.float64(norm.layer.scale[...])
    expected += np.float64(norm.layer.bias[...])
    y = norm(x, train=False)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(np.float64(y), expected, atol=1e-2 if dtype == "bfloat16" else 1e-4, rtol=1e-2)
    np.testing.assert_array_equal(norm.layer.mean[...], np.float32(mean))  # unchanged


@pytest.mark.parametrize("train", [True, False])
def test_without_a_scale_it_equals_nnx_batch_norm(train):
    """For a small mean, where `nnx.BatchNorm` is accurate; the state has the same structure."""
    x = _draw(SHAPES[0], 0.0, "float32")[0]
    ours = _norm("float32", norm_scale=False, norm_momentum=0.6, norm_epsilon=1e-3).layer
    theirs = nnx.BatchNorm(FEATURES, momentum=0.6, epsilon=1e-3, use_scale=False, rngs=nnx.Rngs(0))
    theirs.bias[...] = ours.bias[...]
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    np.testing.assert_allclose(ours(x, not train), theirs(x, use_running_average=not train), atol=1e-5)
    for one, other in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(theirs)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_constant_features_become_the_bias():
    norm, x = _norm("float32"), jnp.full(SHAPES[0], 1234.5)
    ours = _compiled(lambda x: _trained(norm, x, jnp.ones_like(x)))(x)
    np.testing.assert_allclose(ours[0], jnp.broadcast_to(norm.layer.bias[...], x.shape), atol=1e-6)
    assert all(np.isfinite(array).all() for array in ours)


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_layer_and_group_norm_do_not_cancel_either(kind):
    """Against float64, at a mean of 10,000; four features make four groups."""
    init = nnx.initializers.zeros_init()
    norm = Norm(Style(nnx.Rngs(0), jnp.dtype(jnp.float32), 0.0, kind, init, init), FEATURES)
    x = (1e4 + np.random.default_rng(0).standard_normal((3, 5, 5, FEATURES))).astype(np.float32)
    axes, exact = ((-1,) if kind == "layer" else (1, 2)), np.float64(x)
    expected = (exact - exact.mean(axes, keepdims=True)) / np.sqrt(exact.var(axes, keepdims=True) + EPSILON)
    # The mean itself is rounded to float32; with E[x^2] - E[x]^2 these are off by hundreds.
    np.testing.assert_allclose(norm(jnp.asarray(x), train=True), expected, atol=0.05)
