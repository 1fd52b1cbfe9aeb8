"""Bounds and estimates of the likelihood against models whose likelihood is known in closed form."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from research import randomness
from research.data.batch import Batch
from research.randomness import Stream
from research.tasks.vae import VAE

SHAPE = (2, 3, 2)
RNG = np.random.default_rng(0)
WEIGHTS = np.linalg.qr(RNG.standard_normal((12, 2)))[0].T * np.array([[0.3], [0.15]])  # the posterior is diagonal
OFFSET, NOISE = 0.5, 0.1
VARIANCE = 1 / (1 + (WEIGHTS**2).sum(1) / NOISE**2)  # of the posterior
IMAGES = RNG.integers(0, 256, (4, *SHAPE)).astype(np.uint8)
TASK = VAE(lambda _: None, SHAPE, "gaussian", "")  # pyright: ignore
BITS = VAE(lambda _: None, SHAPE, "bernoulli", "stochastic")  # pyright: ignore


# Compiling random numbers would dominate the tests.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _linear(shift=0.0, spread=1.0):
    """p(x|z) = N(z W + offset, noise^2); q is the posterior with a shifted mean and a scaled deviation."""

    def encode(x):
        mean = (x.reshape(len(x), -1) - OFFSET) @ (WEIGHTS.T * VARIANCE / NOISE**2)
        return mean + shift, jnp.broadcast_to(jnp.log(VARIANCE * spread**2), mean.shape)

    def decode(z):
        mean = z @ WEIGHTS + OFFSET
        return jnp.concatenate([mean, jnp.full(mean.shape, 2 * math.log(NOISE))], -1)

    return SimpleNamespace(encode=encode, decode=decode)


def _batch(images=IMAGES, start=0, **more):
    return Batch({"image": jnp.asarray(images)}, jnp.arange(start, start + len(images), dtype=jnp.int32), **more)


def _targets(task, batch, key):
    return task.targets(batch["image"], batch.index, key)


def _exact(targets):
    """Computes log p(x) of N(offset, W^T W + noise^2), on the scale 0..256."""
    covariance = WEIGHTS.T @ WEIGHTS + NOISE**2 * np.eye(12)
    flat = np.asarray(targets, np.float64).reshape(len(targets), -1)
    density = scipy.stats.multivariate_normal(np.full(12, OFFSET), covariance)
    return np.atleast_1d(density.logpdf(flat)) - 12 * math.log(256)


EVALUATION = randomness.key(Stream.EVALUATION)


def _log_likelihood(model, samples, batch=None):
    task = dataclasses.replace(TASK, final_samples=samples)
    return _jit(lambda batch: task.log_likelihood(model, batch, jax.random.key(1)))(batch or _batch())


def test_the_estimate_is_exact_with_the_exact_posterior():
    expected = _exact(_targets(TASK, _batch(), EVALUATION))
    np.testing.assert_allclose(_log_likelihood(_linear(), 7), expected, rtol=1e-5)


def test_the_estimate_approaches_the_likelihood_from_another_distribution():
    expected = _exact(_targets(TASK, _batch(), EVALUATION))
    model = _linear(shift=0.1, spread=1.3)
    np.testing.assert_allclose(_log_likelihood(model, 4000), expected, atol=0.05)
    assert np.abs(_log_likelihood(model, 1) - expected).max() > 0.1


def test_the_estimate_of_an_example_does_not_depend_on_its_batch():
    model = _linear(shift=0.1, spread=1.3)
    whole, part = _log_likelihood(model, 9), _log_likelihood(model, 9, _batch(IMAGES[2:3], start=2))
    np.testing.assert_allclose(whole[2], part[0], rtol=1e-6)


def _evaluate(task, model, batch, *, seed=0, train):
    return _jit(lambda batch, key: task.evaluate(model, batch, key=key, train=train))(batch, jax.random.key(seed))


def _mean_loss(samples, model):
    """Returns one example's mean training loss over many draws, its exact value, and all values."""
    task = dataclasses.replace(TASK, samples=samples)
    batch = _batch(np.repeat(IMAGES[:1], 4000, 0), step=jnp.int32(10))
    # The same dequantized values in every row, different latents.
    targets = _targets(TASK, _batch(IMAGES[:1]), jax.random.key(0))
    object.__setattr__(task, "targets", lambda image, index, key: jnp.repeat(targets, len(index), 0))
    values = _evaluate(task, model, batch, train=True)
    return float(values["loss"].mean()), -_exact(targets)[0], values


def test_the_bound_is_the_elbo_for_one_sample_and_tightens_with_more():
    shift, spread = 0.2, 1.4
    model = _linear(shift, spread)
    losses = []
    for samples in (1, 2, 32):
        loss, exact, values = _mean_loss(samples, model)
        losses.append(loss)
        assert loss > exact - 0.01
    # -log p(x) + KL(q || posterior), of two normals of 2 dimensions.
    expected = exact + 0.5 * (shift**2 / VARIANCE + spread**2 - 1 - 2 * math.log(spread)).sum()
    np.testing.assert_allclose(losses[0], expected, atol=0.1)
    np.testing.assert_allclose(values["elbo"].mean(), -expected, atol=0.1)  # of 32 samples too
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[1] > 0.1
    assert losses[-1] - exact < 0.1


def test_the_bound_of_several_samples_is_their_log_mean_weight():
    """With beta 0 the bound is log mean p(x|z): compared with the same latents in NumPy."""
    latents = []
    model = _linear(0.2, 1.4)
    spy = SimpleNamespace(encode=model.encode, decode=lambda z: latents.append(z) or model.decode(z))
    task = dataclasses.replace(TASK, samples=3, beta=0.0)
    targets = _targets(task, _batch(), jax.random.key(3))
    loss = task.evaluate(spy, _batch(step=jnp.int32(0)), key=jax.random.key(3), train=True)["loss"]
    (z,) = latents
    flat = np.asarray(targets).reshape(4, 1, 12)
    log_prob = scipy.stats.norm.logpdf(flat, z @ WEIGHTS + OFFSET, NOISE).sum(-1) - 12 * math.log(256)
    np.testing.assert_allclose(loss, -np.log(np.exp(log_prob).mean(1)), rtol=1e-5)


@pytest.mark.slow
def test_a_gradient_by_few_samples_is_unbiased():
    """Its mean over many rows of one example equals the exact gradient within the standard error."""
    batch = _batch(np.repeat(IMAGES[:1], 4000, 0), step=jnp.int32(0))

    def gradients(**fields):
        task = dataclasses.replace(TASK, samples=4, **fields)

        def loss(shift):
            values = task.evaluate(_linear(shift, 1.4), batch, key=jax.random.key(0), train=True)["loss"]
            return values.sum(), values

        return _jit(jax.value_and_grad(loss, has_aux=True))(jnp.full((4000, 2), 0.2))

    (_, losses), exact = gradients()
    for count in (1, 3):
        (_, same), estimate = gradients(gradient_samples=count)
        np.testing.assert_allclose(same, losses, rtol=1e-5)  # the bound itself uses all samples
        differences = np.asarray(estimate - exact)
        error = differences.std(0) / np.sqrt(len(differences))
        assert (error > 0).all()
        np.testing.assert_array_less(np.abs(differences.mean(0)), 4 * error)


def test_warm_up_and_beta():
    task = dataclasses.replace(TASK, beta=2.0, warmup_steps=4)
    evaluate = _jit(lambda batch: task.evaluate(_linear(0.2), batch, key=jax.random.key(0), train=True))
    for step, weight in ((0, 0.5), (1, 1.0), (3, 2.0), (100, 2.0)):
        values = evaluate(_batch(step=jnp.int32(step)))
        np.testing.assert_allclose(values["loss"], values["reconstruction"] + weight * values["kl"], rtol=1e-5)
    evaluation = _evaluate(task, _linear(0.2), _batch(), train=False)
    np.testing.assert_allclose(evaluation["loss"], evaluation["reconstruction"] + evaluation["kl"], rtol=1e-6)
    np.testing.assert_array_equal(evaluation["loss"], -evaluation["elbo"])


def test_free_bits_hold_for_the_mean_over_the_batch():
    """Kingma et al. 2016, equation 15: value and gradient of the sum of max(limit, mean KL)."""
    limit, means = 0.5, jnp.array([[0.0, 0.5, 3.0], [0.2, 1.2, 0.0]])  # KL of means: mean^2 / 2

    def loss(means):
        model = SimpleNamespace(encode=lambda _: (means, jnp.zeros((2, 3))), decode=lambda z: jnp.zeros((2, 1, 24)))
        task = dataclasses.replace(TASK, free_bits=limit)
        values = task.evaluate(model, _batch(IMAGES[:2], step=jnp.int32(0)), key=jax.random.key(0), train=True)
        return (values["loss"] - values["reconstruction"]).mean()

    value, gradient = _jit(jax.value_and_grad(loss))(means)
    mean_kl = (np.asarray(means) ** 2 / 2).mean(0)
    np.testing.assert_allclose(mean_kl > limit, [False, False, True])
    np.testing.assert_allclose(value, np.maximum(mean_kl, limit).sum(), rtol=1e-4)
    np.testing.assert_allclose(gradient, np.asarray(means) / 2 * (mean_kl > limit), rtol=1e-5)


def test_stochastic_bits_have_the_probabilities_of_the_grays():
    grays = np.arange(12, dtype=np.uint8).reshape(SHAPE) * 23
    grays.flat[-1] = 255
    batch = _batch(np.repeat(grays[None], 4000, 0))
    drawn = _targets(BITS, batch, jax.random.key(0))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_allclose(drawn.mean(0), grays / 255, atol=0.04)
    np.testing.assert_array_equal(drawn.mean(0)[grays % 255 == 0], [0, 1])  # black and white are certain
    assert not np.array_equal(drawn, _targets(BITS, batch, jax.random.key(1)))


def test_fixed_bits_stay_and_a_training_image_shares_none_with_a_test_image():
    """Compares the bits that the network gets."""
    grays = np.full((2000, *SHAPE), 128, np.uint8)
    seen = []

    def encode(bits):
        seen.append(np.asarray(bits))
        return jnp.zeros((len(bits), 2)), jnp.zeros((len(bits), 2))

    model = SimpleNamespace(encode=encode, decode=lambda z: jnp.zeros((*z.shape[:-1], 12)))
    task = dataclasses.replace(BITS, binarize="fixed")
    for seed, train in ((0, True), (1, True), (0, False), (1, False)):
        task.evaluate(model, _batch(grays, step=jnp.int32(0)), key=jax.random.key(seed), train=train)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[2], seen[3])
    assert abs((seen[0] == seen[2]).mean() - 0.5) < 0.02
    np.testing.assert_allclose(seen[0].mean(0), 128 / 255, atol=0.06)


def test_values_are_dequantized_within_their_step():
    batch = _batch(np.repeat(IMAGES[:1], 1000, 0))
    values = np.asarray(_targets(TASK, batch, jax.random.key(0))) * 256 - np.float32(IMAGES[0])
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() <= 1
    np.testing.assert_allclose(values.mean(), 0.5, atol=0.01)


def test_evaluation_depends_on_the_examples_only():
    model = _linear(0.2, 1.4)
    one = _evaluate(TASK, model, _batch(), train=False)
    other = _evaluate(TASK, model, _batch(IMAGES[1:], start=1), seed=7, train=False)
    for name in ("loss", "reconstruction", "kl"):
        np.testing.assert_allclose(one[name][1:], other[name], rtol=1e-5)
    batch = _batch(step=jnp.int32(0))
    assert not np.allclose(
        *(_evaluate(TASK, model, batch, seed=seed, train=True)["loss"] for seed in (0, 7))
    )  # in training the draws differ


def test_active_units_are_those_whose_mean_varies():
    means = np.array([[1.0, 0.0, 0.0], [1.0, 0.15, 0.25]])  # variances 0, 0.0056, 0.0156
    model = SimpleNamespace(
        encode=lambda _: (jnp.asarray(means), jnp.zeros((2, 3))), decode=lambda z: jnp.zeros((2, 1, 24))
    )
    values = _evaluate(TASK, model, _batch(IMAGES[:2]), train=False)
    figures = TASK.summarize({name: np.asarray(value).mean(0) for name, value in values.items()})
    assert figures["active_units"] == 1
    np.testing.assert_allclose(figures["bits_per_dim"], figures["loss"] / 12 / math.log(2), rtol=1e-6)
    assert set(figures) == {"loss", "reconstruction", "kl", "elbo", "bits_per_dim", "active_units"}


def test_gaussian_bits_per_dimension_of_noise_are_eight():
    """Uniform 8-bit noise, under a density that is nearly flat, costs about 8 bits, and never less."""
    model = SimpleNamespace(
        encode=lambda x: (jnp.zeros((len(x), 2)), jnp.zeros((len(x), 2))),
        decode=lambda z: jnp.broadcast_to(jnp.repeat(jnp.array([0.5, math.log(1 / 12)]), 12), (*z.shape[:-1], 24)),
    )
    images = np.random.default_rng(1).integers(0, 256, (2000, *SHAPE)).astype(np.uint8)
    values = _evaluate(TASK, model, _batch(images), train=False)
    bits = TASK.summarize({name: np.asarray(value).mean(0) for name, value in values.items()})["bits_per_dim"]
    flat_cost = 0.5 * math.log2(2 * math.pi * math.e / 12)  # bits lost by a normal of the uniform's variance
    np.testing.assert_allclose(bits, 8 + flat_cost, atol=0.01)


def _predict(model):
    def predict(function, arrays, **_):
        batch = _batch(arrays["image"]) if "image" in arrays else Batch(dict(arrays), None)
        return jax.tree.map(np.asarray, function(model, batch, jax.random.key(0)))

    return predict


def test_the_final_metric_is_the_mean_over_the_test_set():
    task = dataclasses.replace(TASK, final_samples=3)
    figures = task.final_metrics(_predict(_linear(0.1)), SimpleNamespace(test={"image": IMAGES}))  # pyright: ignore
    np.testing.assert_allclose(figures["test_nll"], -np.mean(_log_likelihood(_linear(0.1), 3)), rtol=1e-6)
    np.testing.assert_allclose(figures["test_nll_bits_per_dim"] * 12 * math.log(2), figures["test_nll"], rtol=1e-6)
    assert TASK.final_metrics(_predict(_linear()), SimpleNamespace(test={"image": IMAGES})) == {}  # pyright: ignore
