"""Causal attention and its gradient equal the equations, for lengths of one block, of several and between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research import sharding
from research.config import Config, MeshConfig
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


def _gradients(attention, arrays):
    def loss(arrays):
        outputs = attention(*arrays, scale=SCALE)
        return (outputs * jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)).sum()

    return jax.jit(jax.grad(loss))(arrays)


def _by_jax(*arrays, scale):
    return jax.nn.dot_product_attention(*arrays, scale=scale, is_causal=True)


@pytest.mark.parametrize(
    ("length", "dtype", "tolerance"), [(1, "float32", 1e-5), (300, "float32", 1e-5), (150, "bfloat16", 3e-2)]
)
def test_gradients_equal_those_of_jax(length, dtype, tolerance):
    arrays = [x.astype(dtype) for x in _draw(length)]
    for mine, other in zip(_gradients(causal_attention, arrays), _gradients(_by_jax, arrays)):
        assert mine.dtype == dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (mine, other)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "model": 2}, {"data": 8}])
def test_gradients_of_several_blocks_are_those_of_one_device(axes):
    arrays = [np.concatenate([x] * 4 + [-x]).repeat(2, 2)[:8] for x in _draw(150)]  # 8 examples, 6 heads
    alone = _gradients(causal_attention, arrays)
    mesh = sharding.make_mesh(Config(batch_size=8, mesh=MeshConfig(**axes)))
    placed = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "model"))
    with jax.set_mesh(mesh):
        together = _gradients(causal_attention, [jax.device_put(x, placed) for x in arrays])
    for ours, theirs in zip(together, alone):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    query, key, value = _draw(70)
    outputs = causal_attention(1e4 * query, key, value, scale=SCALE)
    assert np.isfinite(outputs).all()
    np.testing.assert_allclose(outputs[:, 0], value[:, 0], rtol=1e-6)


def test_bfloat16_outputs_are_close_to_the_equations():
    arrays = [x.astype(jnp.bfloat16) for x in _draw(150)]
    outputs = causal_attention(*arrays, scale=SCALE)
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(outputs, np.float32), _equations(*arrays), rtol=2e-2, atol=1e-2)


@pytest.mark.slow
def test_vmap_equals_a_loop():
    arrays = [np.stack([x, x[::-1]]) for x in _draw(65)]
    gradient = jax.grad(lambda arrays: jnp.sin(causal_attention(*arrays, scale=SCALE)).sum())
    for ours, theirs in zip(jax.vmap(gradient)(arrays), jax.lax.map(gradient, arrays)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
