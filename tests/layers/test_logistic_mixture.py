"""The discretized mixture of logistics against NumPy in float64: probabilities, samples and expected values."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from research.layers import logistic_mixture

K = logistic_mixture.MIXTURES
VALUES = np.arange(256) / 255


def _parameters(channels, seed=0, scale=1.5):
    """One pixel's parameters; the scales are small, so that probabilities in the tails are tiny."""
    rng = np.random.default_rng(seed)
    parameters = rng.normal(0, scale, logistic_mixture.num_parameters(channels))
    scales = slice((1 + channels) * K, (1 + 2 * channels) * K)
    parameters[scales] = parameters[scales] / 3 - 2.5
    return parameters.astype(np.float32)


def _reference(x, parameters):
    """Computes log p of one pixel x [c] by equation 2, from differences of the distribution function in float64."""
    c = len(x)
    rows = np.float64(parameters).reshape(-1, K)
    weights, means, log_scales = rows[0], rows[1 : 1 + c].copy(), np.maximum(rows[1 + c : 1 + 2 * c], -7)
    pairs = [(i, j) for i, j in itertools.product(range(c), repeat=2) if j < i]
    for (i, j), row in zip(pairs, rows[1 + 2 * c :]):
        means[i] += np.tanh(row) * (2 * x[j] - 1)
    total = weights - np.logaddexp.reduce(weights)
    for i in range(c):
        low, high = (2 * x[i] - 1 - 1 / 255 - means[i]), (2 * x[i] - 1 + 1 / 255 - means[i])
        low, high = low / np.exp(log_scales[i]), high / np.exp(log_scales[i])
        low, high = (-np.inf if x[i] == 0 else low), (np.inf if x[i] == 1 else high)
        # Of the two equal differences, the one without cancellation.
        mass = np.where(low + high > 0, expit(-low) - expit(-high), expit(high) - expit(low))
        total = total + np.log(mass)
    return np.logaddexp.reduce(total)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _log_probs(x, parameters):
    """Computes log p of pixels [n, c] under one pixel's parameters."""
    return logistic_mixture.log_prob(x[:, None, None], parameters)


def _probabilities(x, parameters):
    return np.exp(np.asarray(_log_probs(x.astype(np.float32), parameters), np.float64))


@pytest.mark.parametrize("channels", [1, 3])
def test_log_probabilities_equal_the_formula(channels):
    x = VALUES[np.random.default_rng(1).integers(0, 256, (200, channels))]
    x[:3] = [[0.0], [1.0], [0.5]] if channels == 1 else [[0, 1, 0], [1, 0, 1], [1, 1, 1]]
    x = np.round(x * 255) / 255
    parameters = _parameters(channels)
    expected = [_reference(row, parameters) for row in x]
    np.testing.assert_allclose(_log_probs(np.float32(x), parameters), expected, rtol=2e-4)


@pytest.mark.parametrize("offset", [-9.0, 0.0, 9.0])
def test_probabilities_sum_to_one_for_every_channel(offset):
    """Also with means far outside of the values, and with scales far below and above the distance of two values."""
    for scale in (-9.0, -2.0, 3.0):
        gray = _parameters(1)
        gray[K : 2 * K] += offset
        gray[2 * K :] = scale
        np.testing.assert_allclose(_probabilities(VALUES[:, None], gray).sum(), 1, rtol=2e-5)
    color = _parameters(3)
    color[K : 4 * K] += offset
    # The last channel's 256 values, given the others: they sum to the probability of the others.
    total = _probabilities(np.array([[0.2, 0.4, value] for value in VALUES]), color).sum()
    marginal = color.reshape(-1, K)[[0, 1, 2, 4, 5, 7]].ravel()  # of the first two channels
    exact = np.exp(_reference(np.array([0.2, 0.4]), marginal))
    np.testing.assert_allclose(total, exact, rtol=1e-3)


@pytest.mark.slow
def test_small_probabilities_have_finite_values_and_gradients():
    parameters = _parameters(3)
    parameters[4 * K : 7 * K] = -20.0  # below the smallest scale
    x = jnp.array([[[0.0, 1.0, 0.0]], [[1.0, 0.0, 1.0]]])[:, :, None]
    value, gradient = jax.value_and_grad(lambda p: logistic_mixture.log_prob(x, p).sum())(jnp.asarray(parameters))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_samples_have_the_probabilities():
    parameters = _parameters(3, scale=0.5)
    parameters[4 * K : 7 * K] = 0.3  # wide: many samples lie in the tails
    draw = jax.jit(lambda key: logistic_mixture.sample(key, jnp.tile(parameters, (400, 100, 1)), 3))
    drawn = np.asarray(draw(jax.random.key(0))).reshape(-1, 3)
    np.testing.assert_allclose(drawn * 255, np.round(drawn * 255), atol=1e-4)
    assert drawn.min() == 0
    assert drawn.max() == 1
    for corner in itertools.product((0.0, 1.0), repeat=3):
        probability = np.exp(_reference(np.array(corner), parameters))
        frequency = (drawn == corner).all(1).mean()
        assert abs(frequency - probability) < 5 * np.sqrt(probability / len(drawn)), corner


def test_temperature_and_expected_value():
    parameters = _parameters(1, scale=0.3)
    many = jnp.tile(parameters, (100, 100, 1))
    warm, cool, cold = (
        np.asarray(logistic_mixture.sample(jax.random.key(0), many, 1, temperature)) for temperature in (1.0, 0.3, 0.0)
    )
    assert warm.std() > cool.std() > cold.std() == 0
    rows = parameters.reshape(3, K)
    np.testing.assert_allclose(2 * cold[0, 0, 0] - 1, rows[1, rows[0].argmax()], atol=1 / 255)
    probabilities = _probabilities(VALUES[:, None], parameters)
    mean = logistic_mixture.expected(jnp.asarray(parameters[None, None]), 1)
    np.testing.assert_allclose(mean.ravel(), probabilities @ VALUES, atol=0.01)


def test_the_initial_parameters_are_centered_at_the_mean_image():
    mean = np.random.default_rng(0).uniform(0.2, 0.8, (2, 3, 3))
    parameters = logistic_mixture.initial_bias(mean)
    assert parameters.shape == (2, 3, 50)
    np.testing.assert_allclose(logistic_mixture.expected(jnp.asarray(parameters), 3), mean, atol=1e-6)
