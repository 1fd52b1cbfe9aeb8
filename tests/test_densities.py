"""The densities equal SciPy's, and the divergence equals its Monte Carlo estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from research.tasks import densities

RNG = np.random.default_rng(0)
X, MEAN, LOGVAR = RNG.standard_normal((3, 4, 6)).astype(np.float32)


def test_bernoulli():
    x = (X > 0).astype(np.float32)
    expected = scipy.stats.bernoulli.logpmf(x, scipy.special.expit(np.float64(MEAN))).sum(-1)
    np.testing.assert_allclose(densities.bernoulli(x, MEAN), expected, rtol=1e-5)
    logits = np.array([[200.0, -200.0, 30.0]], np.float32)  # no overflow, and small probabilities are kept
    np.testing.assert_allclose(densities.bernoulli(np.array([[0.0, 1.0, 0.0]]), logits), [-430.0], rtol=1e-6)


def test_gaussian():
    expected = scipy.stats.norm.logpdf(X, MEAN, np.exp(LOGVAR / 2)).sum(-1)
    np.testing.assert_allclose(densities.gaussian(X, MEAN, LOGVAR), expected, rtol=1e-4)


def test_log_ratio():
    latents = MEAN + np.exp(LOGVAR / 2) * X
    expected = scipy.stats.norm.logpdf(latents) - scipy.stats.norm.logpdf(latents, MEAN, np.exp(LOGVAR / 2))
    np.testing.assert_allclose(densities.log_ratio(X, latents, LOGVAR), expected.sum(-1), rtol=1e-4, atol=1e-5)


def test_kl_is_its_monte_carlo_estimate():
    mean, logvar = jnp.array([0.0, 1.5, -0.5]), jnp.array([0.0, -2.0, 1.0])
    noise = jax.random.normal(jax.random.key(0), (200_000, 3))
    latents = mean + jnp.exp(logvar / 2) * noise
    ratios = -densities.log_ratio(noise[..., None], latents[..., None], logvar[:, None])  # log q(z) - log p(z)
    error = ratios.std(0) / np.sqrt(len(noise))
    np.testing.assert_array_less(np.abs(ratios.mean(0) - densities.kl_to_standard(mean, logvar)), 5 * error + 1e-6)
