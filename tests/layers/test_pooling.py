"""Pooling equals that of `nnx` (`lax.reduce_window`); the first of equal maxima gets the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from research import sharding
from research.layers.pooling import avg_pool, max_pool

PEERS = {max_pool: nnx.max_pool, avg_pool: nnx.avg_pool}


def _value_and_gradient(function, x, dy=None):
    @jax.jit  # one compilation instead of one per operation
    def run(x):
        y, vjp = jax.vjp(function, x)
        return y, vjp(jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), y.dtype) if dy is None else dy)[0]

    return run(x)


@settings(max_examples=15, deadline=None)
@given(
    pool=st.sampled_from([max_pool, avg_pool]),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    window=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    platform=st.sampled_from(["cpu", "default"]),
)
def test_value_and_gradient_equal_those_of_nnx(pool, size, window, dtype, platform):
    # Distinct values, exact in bfloat16: without ties the gradient is unique.
    numbers = np.random.default_rng(0).permutation(2 * size[0] * size[1]).reshape(2, *size, 1) - 80
    x = jnp.asarray(numbers, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *arrays, **forms: forms[platform](*arrays))
        ours = _value_and_gradient(lambda x: pool(x, window), x)
    sides = (window, window)
    theirs = _value_and_gradient(lambda x: PEERS[pool](x, sides, sides, "VALID"), x)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=1e-6 if dtype == "float32" else 2e-2)


OVERLAPPING = [(3, 2, 1), (3, 2, 0), (3, 1, 1), (2, 1, 0), (5, 2, 2), (5, 3, 2)]  # window, stride, padding


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    shape=st.sampled_from(OVERLAPPING),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    platform=st.sampled_from(["cpu", "default"]),
    sharded=st.booleans(),
)
def test_overlapping_windows_equal_those_of_nnx(size, shape, dtype, platform, sharded):
    window, stride, padding = shape
    numbers = np.random.default_rng(0).permutation(2 * size[0] * size[1]).reshape(2, *size, 1) - 80
    x = jnp.asarray(numbers, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *arrays, **forms: forms[platform](*arrays))
        patch.setattr(sharding, "is_unsharded", lambda: not sharded)
        ours = _value_and_gradient(lambda x: max_pool(x, window, stride=stride, padding=padding), x)
    pads = [(padding, padding)] * 2
    theirs = _value_and_gradient(lambda x: nnx.max_pool(x, (window, window), (stride, stride), pads), x)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=1e-5 if dtype == "float32" else 0.1)


def _reference_gradient(x, dy, window, stride, padding):
    """The reference: the first maximum of each window in row-major order (`argmax`) gets the gradient."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = np.pad(x, pads, constant_values=-np.inf)
    dx = np.zeros(x.shape)
    for b, i, j, c in np.ndindex(dy.shape):
        top, left = i * stride, j * stride
        rows = x[b, top : top + window, left : left + window, c]
        row, column = np.unravel_index(rows.argmax(), rows.shape)
        dx[b, top + row, left + column, c] += dy[b, i, j, c]
    return dx[:, padding : x.shape[1] - padding, padding : x.shape[2] - padding]


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("values", [1, 2, 4])
@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 3, 0), (3, 2, 1), (3, 1, 0)])
def test_the_first_of_equal_maxima_has_the_gradient(window, stride, padding, values, dtype, platform, monkeypatch):
    """`values`: the number of different values; 1 makes all elements of every window equal."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **forms: forms[platform](*arrays))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, values, (2, 7, 8, 3)), dtype)
    sizes = [(size + 2 * padding - window) // stride + 1 for size in (7, 8)]
    dy = jnp.asarray(rng.integers(1, 12, (2, *sizes, 3)), dtype)  # their sums are exact in bfloat16
    ours = np.float64(_value_and_gradient(lambda x: max_pool(x, window, stride=stride, padding=padding), x, dy)[1])
    np.testing.assert_array_equal(ours, _reference_gradient(np.float64(x), np.float64(dy), window, stride, padding))
    sides, pads = ((window, window), (stride, stride)), [(padding, padding)] * 2
    theirs = _value_and_gradient(lambda x: nnx.max_pool(x, *sides, pads), x, dy)[1]
    np.testing.assert_array_equal(ours, np.float64(theirs))


@pytest.mark.parametrize("values", [1, 2, 4])
@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 3, 0), (3, 2, 1)])
def test_ties_agree_with_pytorch(window, stride, padding, values):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.integers(0, values, (2, 7, 8, 3)).astype(np.float32)
    sizes = [(size + 2 * padding - window) // stride + 1 for size in (7, 8)]
    dy = rng.integers(1, 100, (2, *sizes, 3)).astype(np.float32)
    pool = functools.partial(max_pool, window=window, stride=stride, padding=padding)
    ours = _value_and_gradient(pool, jnp.asarray(x), jnp.asarray(dy))[1]
    tensor = torch.tensor(x, requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(tensor.permute(0, 3, 1, 2), window, stride, padding)
    pooled.backward(torch.tensor(dy).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(ours, tensor.grad.numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_window_is_never_lost_or_doubled(dtype):
    """Each window's gradients add up to 1, even if XLA computes the input's fusion more than once."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 18, 18, 8)), dtype)

    @jax.jit
    def gradient(x):
        normalized = jnp.tanh((x - x.mean((0, 1, 2))) / x.std((0, 1, 2)))
        return jax.vjp(lambda x: max_pool(x, 3), normalized)[1](jnp.ones((16, 6, 6, 8), dtype))[0]

    shares = np.float64(gradient(x)).reshape(16, 6, 3, 6, 3, 8)
    assert set(np.unique(shares)) == {0.0, 1.0}
    np.testing.assert_array_equal(shares.sum((2, 4)), 1.0)


@pytest.mark.parametrize(
    "pool", [lambda x: max_pool(x, 2), lambda x: avg_pool(x, 2), lambda x: max_pool(x, 3, stride=2, padding=1)]
)
def test_no_reduce_window(pool):
    text = str(jax.make_jaxpr(jax.grad(lambda x: pool(x).sum()))(jnp.zeros((1, 5, 5, 2))))
    assert "reduce_window" not in text
    assert "select_and_scatter" not in text


def test_no_gradient_is_lost_where_the_input_is_computed_twice():
    """With a normalization before and a convolution after, XLA computes the former twice, rounded differently."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 18, 18, 8)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 8, 16)), jnp.float32)

    def gradient(pool):
        def loss(x):
            x = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
            y = jax.lax.conv_general_dilated(
                pool(x), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jnp.square(y).sum()

        return jax.jit(jax.grad(loss))(x)

    expected = gradient(lambda x: nnx.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_allclose(gradient(lambda x: max_pool(x, 2)), expected, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("manual", [False, True])
def test_overlapping_windows_of_a_sharded_batch(manual):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).integers(0, 9, (16, 7, 8, 3)), jnp.float32)

    def gradient(x):
        return jax.grad(lambda x: jnp.square(max_pool(x, 3, stride=2, padding=1)).sum())(x)

    expected, batch = jax.jit(gradient)(x), jax.P("data")
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=batch, out_specs=batch) if manual else gradient
    with jax.set_mesh(mesh):
        compiled = jax.jit(sharded).lower(jax.device_put(x, jax.NamedSharding(mesh, batch))).compile()
        np.testing.assert_array_equal(compiled(jax.device_put(x, jax.NamedSharding(mesh, batch))), expected)
    assert "all-gather" not in compiled.as_text()
