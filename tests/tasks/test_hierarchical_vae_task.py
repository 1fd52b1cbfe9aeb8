"""The hierarchical task against a linear hierarchy with known likelihood, and against the VAE with one layer."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from research import randomness
from research.config import VAEConfig
from research.data.batch import Batch
from research.models import hierarchical_vae
from research.randomness import Stream
from research.tasks.hierarchical_vae import HierarchicalVAE
from research.tasks.vae import VAE

SHAPE = (2, 3, 2)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, *SHAPE)).astype(np.uint8)
OFFSET, NOISE = 0.5, 0.1
# x = offset + top z1 + bottom z2 + noise with z2 = SLOPE z1 + SCALE u2 and standard normal z1 and u2.
TOP, BOTTOM, SLOPE, SCALE = RNG.normal(0, 0.1, 12), RNG.normal(0, 0.1, 12), 0.7, 0.6
LOADINGS = np.stack([TOP + SLOPE * BOTTOM, SCALE * BOTTOM])  # of (z1, u2)
POSTERIOR = np.linalg.inv(np.eye(2) + LOADINGS @ LOADINGS.T / NOISE**2)  # covariance of (z1, u2) given x
CONDITIONAL = POSTERIOR[1, 1] - POSTERIOR[0, 1] ** 2 / POSTERIOR[0, 0]  # variance of u2 given z1 and x
TASK = HierarchicalVAE(
    lambda _: None,  # pyright: ignore
    SHAPE,
    "gaussian",
    "",
    shapes=((1, 1, 1), (1, 1, 1)),
)

# Compiling random numbers would dominate the tests.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _linear(shift=0.0, spread=1.0):
    """Each group's q is its exact posterior given the groups above, with a shifted mean and a scaled deviation."""

    def bottom_up(x):
        return (x.reshape(len(x), -1) - OFFSET) @ (LOADINGS.T @ POSTERIOR / NOISE**2)  # E[z1, u2 | x]

    def infer(means, noise):
        variances = np.array([POSTERIOR[0, 0], CONDITIONAL])
        deviations = spread * np.sqrt(variances)
        mean1 = means[:, None, 0] + shift
        z1 = mean1 + deviations[0] * noise[..., 0]
        mean2 = means[:, None, 1] + POSTERIOR[0, 1] / POSTERIOR[0, 0] * (z1 - means[:, None, 0]) + shift
        u2 = mean2 + deviations[1] * noise[..., 1]
        x = OFFSET + z1[..., None] * LOADINGS[0] + u2[..., None] * LOADINGS[1]
        parameters = jnp.concatenate([x, jnp.full(x.shape, 2 * math.log(NOISE))], -1)
        mean = jnp.stack([jnp.broadcast_to(mean1, z1.shape), mean2], -1)
        logvar = jnp.broadcast_to(2 * np.log(deviations), mean.shape)
        return jnp.stack([z1, u2], -1), mean, logvar, parameters

    return SimpleNamespace(bottom_up=bottom_up, infer=infer)


def _batch(images=IMAGES, **more):
    return Batch({"image": jnp.asarray(images)}, jnp.arange(len(images), dtype=jnp.int32), **more)


def _exact(targets):
    """Computes log p(x) in float64, on the scale 0..256."""
    covariance = LOADINGS.T @ LOADINGS + NOISE**2 * np.eye(12)
    density = scipy.stats.multivariate_normal(np.full(12, OFFSET), covariance)  # pyright: ignore[reportArgumentType]
    return density.logpdf(np.asarray(targets, np.float64).reshape(len(targets), -1)) - 12 * math.log(256)


def _targets():
    return TASK.targets(jnp.asarray(IMAGES), jnp.arange(4), randomness.key(Stream.EVALUATION))


def _log_likelihood(model, samples):
    task = dataclasses.replace(TASK, final_samples=samples)
    return _jit(lambda batch: task.log_likelihood(model, batch, jax.random.key(0)))(_batch())


def _training(task, model, images=IMAGES, step=10):
    evaluate = _jit(lambda batch: task.evaluate(model, batch, key=jax.random.key(0), train=True))
    return evaluate(_batch(images, step=jnp.int32(step)))


def test_the_importance_estimate_is_the_likelihood():
    np.testing.assert_allclose(_log_likelihood(_linear(), 3), _exact(_targets()), rtol=1e-5)
    np.testing.assert_allclose(_log_likelihood(_linear(0.1, 1.2), 3000), _exact(_targets()), atol=0.1)


def test_the_bound_is_the_elbo_of_the_linear_hierarchy_and_rises_with_more_samples():
    shift, spread = 0.3, 1.3
    images, losses = np.repeat(IMAGES[:1], 3000, 0), []
    one = _targets()[:1]
    for samples in (1, 2, 16):
        task = dataclasses.replace(TASK, samples=samples)
        object.__setattr__(task, "targets", lambda image, index, key: jnp.repeat(one, len(index), 0))
        values = _training(task, _linear(shift, spread), images)
        losses.append(float(values["loss"].mean()))
    # -log p(x) + KL(q || posterior): the shift of z1 moves the posterior mean of u2 as well, and q's with it.
    variances = np.array([POSTERIOR[0, 0], CONDITIONAL])
    kl = 0.5 * (shift**2 / variances + spread**2 - 1 - 2 * math.log(spread)).sum()
    exact = -float(_exact(one))
    np.testing.assert_allclose(losses[0], exact + kl, atol=0.1)
    np.testing.assert_allclose(values["kl"], values["kl_group0"] + values["kl_group1"], rtol=1e-5)
    assert losses[0] > losses[1] + 0.05 > losses[2] + 0.1
    assert losses[2] > exact - 0.05


def _network(groups="1,0"):
    """A network with drawn parameters: two groups of different resolutions, or one."""
    config = VAEConfig(name="hierarchical", groups=groups, latents=2, width=4, depth=1, activation="silu")
    mean = np.full((4, 4, 1), 0.4)
    model = nnx.eval_shape(lambda: hierarchical_vae.create(config, mean=mean, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), jnp.float32), state)
    return nnx.merge(graphdef, drawn), tuple(hierarchical_vae.group_shapes(config, mean.shape))


@pytest.mark.slow
def test_one_group_is_the_vae_with_one_layer():
    """The same network and random numbers give the same bound, gradient estimate and likelihood in either task."""
    model, shapes = _network()
    fields = {"samples": 3, "gradient_samples": 2, "final_samples": 4}
    flat = VAE(lambda _: model, (4, 4, 1), "bernoulli", "stochastic", **fields)
    grouped = HierarchicalVAE(lambda _: model, (4, 4, 1), "bernoulli", "stochastic", **fields, shapes=shapes)
    images = RNG.integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
    first, second = (
        _jit(
            lambda batch, task=task: (
                task.evaluate(model, batch, key=jax.random.key(0), train=True),
                task.evaluate(model, batch, key=jax.random.key(0), train=False),
                task.log_likelihood(model, batch, jax.random.key(0)),
            )
        )(_batch(images, step=jnp.int32(0)))
        for task in (flat, grouped)
    )
    for values, others in zip(first[:2], second[:2]):
        for name in ("loss", "kl", "elbo", "reconstruction"):
            np.testing.assert_allclose(values[name], others[name], rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(others["kl_group0"], others["kl"])
    np.testing.assert_allclose(first[2], second[2], rtol=1e-5)


def test_free_bits_and_balance_of_the_groups():
    """The limit is for a group's mean KL; in warm-up, groups of many positions and much KL count more."""
    plain = _training(TASK, _linear(0.3))
    groups = np.stack([plain["kl_group0"], plain["kl_group1"]], -1)
    limit = float(np.sort(groups.mean(0)).mean())
    limited = _training(dataclasses.replace(TASK, free_bits=limit), _linear(0.3))
    expected = np.where(groups.mean(0) < limit, limit, groups).sum(-1)
    np.testing.assert_allclose(limited["loss"] - limited["reconstruction"], expected, rtol=1e-4, atol=1e-4)
    task = dataclasses.replace(TASK, warmup_steps=100, shapes=((1, 1, 1), (2, 2, 1)))
    kl = jnp.asarray(groups)
    weights = np.array([1, 4]) * groups.mean(0)
    weights /= weights.mean()
    np.testing.assert_allclose(task._training_kl(kl, jnp.int32(50)), groups * weights, rtol=1e-4)
    np.testing.assert_array_equal(task._training_kl(kl, jnp.int32(100)), groups)


@pytest.mark.slow
def test_plots_and_exported_functions():
    model, shapes = _network("1,1,0")
    task = HierarchicalVAE(lambda _: model, (4, 4, 1), "bernoulli", "stochastic", shapes=shapes)
    images = RNG.integers(0, 256, (5, 4, 4, 1)).astype(np.uint8)

    def predict(function, arrays, **_):
        batch = _batch(arrays["image"]) if "image" in arrays else Batch(dict(arrays), None)
        return jax.tree.map(np.asarray, _jit(lambda batch: function(model, batch, jax.random.key(0)))(batch))

    plots = task.plots(predict, SimpleNamespace(test={"image": images}))  # pyright: ignore
    assert set(plots) == {"reconstructions", "interpolations", "samples", "groups"}
    bars = plots["groups"]().axes[0]
    assert len(bars.patches) == 2
    kl = predict(task.group_kl, {"image": images}).mean(0)
    np.testing.assert_allclose([bar.get_height() for bar in bars.patches], kl, rtol=1e-5)
    shown = plots["interpolations"]().axes[0].images[0].get_array()
    reconstructed = plots["reconstructions"]().axes[0].images[0].get_array()
    np.testing.assert_allclose(shown[:4, :4], reconstructed[:4, 5:9], atol=1e-5)  # the first image's
    np.testing.assert_allclose(shown[:4, 45:49], reconstructed[:4, 15:19], atol=1e-5)  # the second's
    functions = task.functions(model, SimpleNamespace())  # pyright: ignore
    inputs = {"seed": jnp.uint32(1), "index": jnp.arange(3)}
    drawn = _jit(lambda inputs: functions["sample"].call(model, inputs))(inputs)["image"]
    assert drawn.shape == (3, 4, 4, 1)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    encoded = functions["encode"].call(model, {"image": jnp.asarray(images), "index": jnp.arange(5)})
    decoded = functions["decode"].call(model, {"latents": encoded["mean"]})["image"]
    np.testing.assert_allclose(decoded[0, ..., 0], reconstructed[:4, 5:9], atol=1e-4)
    # `launch.export` compiles them for any number of images.
    (count,) = jax.export.symbolic_shape("b")
    image, index = jax.ShapeDtypeStruct((count, 4, 4, 1), np.uint8), jax.ShapeDtypeStruct((count,), np.int32)
    for name, inputs in {
        "encode": {"image": image, "index": index},
        "decode": {"latents": jax.ShapeDtypeStruct((count, 10), np.float32)},
        "sample": {"seed": jax.ShapeDtypeStruct((), np.uint32), "index": index},
    }.items():
        jax.export.export(jax.jit(functools.partial(functions[name].call, model)))(inputs)
