"""Causal attention and its gradient equal the equations, for lengths of one block, of several and between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.attention import causal_attention

SCALE = 0.3


def _draw(length, dtype=np.float32):
    rng = np.random.default_rng(length)
    return [rng.standard_normal((2, length, 3, 8)).astype(dtype) for _ in range(3)]


def _equations(query, key, value):
    """The attention in float64, query by query."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    outputs = np.empty_like(query)
    for t in range(query.shape[1]):
        logits = SCALE * np.einsum("bhd,bshd->bsh", query[:, t], key[:, : t + 1])
        weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        outputs[:, t] = np.einsum("bsh,bshd->bhd", weights, value[:, : t + 1])
    return outputs


@pytest.mark.parametrize("length", [1, 64, 65, 150, 300])
def test_outputs_equal_the_equations_in_float64(length):
    arrays = _draw(length)
    outputs = jax.jit(lambda *arrays: causal_attention(*arrays, scale=SCALE))(*arrays)
    np.testing.assert_allclose(outputs, _equations(*arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 65, 300])
def test_gradients_equal_those_of_jax(length):
    arrays = _draw(length)

    def loss(attention, arrays):
        outputs = attention(*arrays, scale=SCALE)
        return (outputs * jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)).sum()

    def by_jax(*arrays, scale):
        return jax.nn.dot_product_attention(*arrays, scale=scale, is_causal=True)

    ours, theirs = (jax.jit(jax.grad(lambda x, f=f: loss(f, x)))(arrays) for f in (causal_attention, by_jax))
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    query, key, value = _draw(70)
    outputs = causal_attention(1e4 * query, key, value, scale=SCALE)
    assert np.isfinite(outputs).all()
    np.testing.assert_allclose(outputs[:, 0], value[:, 0], rtol=1e-6)


def test_bfloat16_is_rounded_in_the_products_only():
    arrays = [x.astype(jnp.bfloat16) for x in _draw(150)]
    outputs = causal_attention(*arrays, scale=SCALE)
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(outputs, np.float32), _equations(*arrays), rtol=2e-2, atol=1e-2)


def test_vmap_is_a_loop_over_networks():
    arrays = [np.stack([x, x[::-1]]) for x in _draw(65)]
    gradient = jax.grad(lambda arrays: jnp.sin(causal_attention(*arrays, scale=SCALE)).sum())
    for ours, theirs in zip(jax.vmap(gradient)(arrays), jax.lax.map(gradient, arrays)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
