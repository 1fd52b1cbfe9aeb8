"""Pooling is that of `nnx`, which is `lax.reduce_window`; ties share the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from research.layers.pooling import avg_pool, max_pool

PEERS = {max_pool: nnx.max_pool, avg_pool: nnx.avg_pool}


def _value_and_gradient(function, x):
    y, vjp = jax.vjp(function, x)
    return y, vjp(jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), y.dtype))[0]


@settings(max_examples=50, deadline=None)
@given(
    pool=st.sampled_from([max_pool, avg_pool]),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    window=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    platform=st.sampled_from(["cpu", "default"]),
)
def test_value_and_gradient_are_those_of_nnx(pool, size, window, dtype, platform):
    # Distinct values, exact in bfloat16: without ties the maximum has one gradient.
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


@pytest.mark.parametrize("ties", [1, 2, 3, 4])
def test_ties_share_a_gradient_whose_sum_is_kept(ties):
    window = np.zeros(4, np.float32)
    window[:ties] = 1.0
    gradient = jax.grad(lambda x: max_pool(x, 2).sum())(jnp.asarray(window).reshape(1, 2, 2, 1)).ravel()
    assert gradient.sum() == 1.0
    assert (gradient[:ties] > 0).all()
    assert (gradient[ties:] == 0).all()


@pytest.mark.parametrize("pool", [max_pool, avg_pool])
def test_no_reduce_window_where_windows_tile(pool):
    text = str(jax.make_jaxpr(jax.grad(lambda x: pool(x, 2).sum()))(jnp.zeros((1, 5, 5, 2))))
    assert "reduce_window" not in text
    assert "select_and_scatter" not in text


def test_no_gradient_is_lost_where_the_input_is_computed_twice():
    """A normalisation before and a convolution after: XLA repeats the former, rounded differently."""
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
