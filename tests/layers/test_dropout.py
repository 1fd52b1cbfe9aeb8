"""Stochastic depth equals a reference in NumPy, for each example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.config import ImageNetworkConfig
from research.layers.dropout import DropPath, drop_path_rate_of
from research.models import image_networks

RESIDUAL = np.random.default_rng(0).standard_normal((4000, 2, 3)).astype(np.float32)


def _applied(rate, depth, train=True):
    return np.asarray(DropPath(rate, depth)(jnp.asarray(RESIDUAL), train=train, key=jax.random.key(0)))


def test_an_example_is_dropped_as_a_whole_or_scaled():
    dropped = _applied(0.5, 0.8)  # with probability 0.4
    kept = dropped.reshape(len(dropped), -1).any(1)
    np.testing.assert_allclose(dropped, np.where(kept[:, None, None], RESIDUAL / np.float32(0.6), 0), rtol=1e-6)
    assert kept.mean() == pytest.approx(0.6, abs=4 * (0.6 * 0.4 / 4000) ** 0.5)


def test_the_expectation_is_the_residual():
    ones = DropPath(0.5, 0.8)(jnp.ones((20_000, 1)), train=True, key=jax.random.key(1))
    assert float(ones.mean()) == pytest.approx(1, abs=4 * (0.4 / 0.6 / 20_000) ** 0.5)


@pytest.mark.parametrize(("rate", "depth", "train"), [(0.0, 1.0, True), (0.5, 0.0, True), (0.5, 1.0, False)])
def test_where_nothing_is_dropped_the_bits_are_unchanged(rate, depth, train):
    np.testing.assert_array_equal(_applied(rate, depth, train), RESIDUAL)


def _program(drop_path):
    """Returns the rates of ResNet-18's blocks, and its traced forward pass."""
    config = image_networks.resolve(ImageNetworkConfig(width=4, drop_path=drop_path), (32, 32, 3))
    create = functools.partial(image_networks.create, config, image_shape=(32, 32, 3), num_classes=2)
    model = nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)

    def run(state, images, key):
        return nnx.merge(graphdef, state, copy=True)(images, train=True, key=key)

    jaxpr = jax.make_jaxpr(run)(state, jnp.zeros((2, 32, 32, 3)), jax.random.key(0))
    return [block.drop_path.rate * block.drop_path.depth for block in model.blocks], str(jaxpr)


def test_a_network_drops_blocks_linearly_in_their_depth():
    rates, program = _program(0.7)
    np.testing.assert_allclose(rates, np.linspace(0, 0.7, 8))
    assert "random_bits" in program


def test_with_a_rate_of_zero_the_program_has_no_random_numbers():
    assert "random_bits" not in _program(0.0)[1]


def test_the_rate_can_be_traced():
    @jax.jit
    def run(rate):
        layer = DropPath(0.5, 0.8)
        with drop_path_rate_of(layer, rate):
            return layer(jnp.asarray(RESIDUAL), train=True, key=jax.random.key(0))

    np.testing.assert_allclose(run(0.5), _applied(0.5, 0.8), rtol=1e-6)
    assert (np.asarray(run(0.1)) == 0).mean() < 0.12


def test_without_a_key_training_is_an_error():
    with pytest.raises(ValueError, match="stochastic depth needs a key"):
        DropPath(0.5, 1.0)(jnp.ones((2, 3)), train=True, key=None)
