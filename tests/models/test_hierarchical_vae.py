"""The hierarchical network: sizes, the prior and the posterior of its groups, initialization, and every field."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changes import assert_changed
from flax import nnx

from research.config import VAEConfig
from research.errors import UserError
from research.models import hierarchical_vae
from research.models.vae import num_parameters

TINY = {"name": "hierarchical", "groups": "1,1,0", "latents": 2, "width": 4, "depth": 1, "activation": "silu"}


def _create(config, image_shape):
    return hierarchical_vae.create(config, mean=np.full(image_shape, 0.3), rngs=nnx.Rngs(0))


def _drawn(config, image_shape):
    """Returns a network with parameters drawn by NumPy: compiling the initialization would dominate the tests."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _create(config, image_shape)))
    rng = np.random.default_rng(0)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype), state))


def _infer(model, images, noise):
    return jax.jit(lambda images, noise: model.infer(model.bottom_up(images), noise))(images, noise)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "logistic"])
@pytest.mark.parametrize(
    ("image_shape", "groups", "sizes"),
    [
        ((28, 28, 1), "1,2,0,0", [(4, 4), (7, 7), (7, 7)]),
        ((9, 13, 3), "1,0,2", [(3, 4), (9, 13), (9, 13)]),
        pytest.param((8, 8, 3), "1,1,1,0", [(1, 1), (2, 2), (4, 4)], marks=pytest.mark.slow),
        pytest.param((5, 6, 1), "2", [(5, 6), (5, 6)], marks=pytest.mark.slow),
    ],
)
def test_shapes_for_any_image_and_number_of_samples(likelihood, image_shape, groups, sizes):
    config = VAEConfig(**{**TINY, "groups": groups, "likelihood": likelihood, "dtype": "bfloat16"})
    hierarchical_vae.check(config, image_shape)
    shapes = hierarchical_vae.group_shapes(config, image_shape)
    assert [shape[:2] for shape in shapes] == sizes
    latents = sum(np.prod(shape) for shape in hierarchical_vae.group_shapes(config, image_shape))

    def apply():
        model = _create(config, image_shape)
        features = model.bottom_up(jnp.zeros((5, *image_shape)))
        return model.infer(features, jnp.zeros((5, 3, latents))), model.decode(jnp.zeros((5, 3, latents)))

    (*drawn, parameters), decoded = jax.eval_shape(apply)
    assert {x.shape for x in drawn} == {(5, 3, latents)}
    size = image_shape[0] * image_shape[1] * num_parameters(likelihood, image_shape[-1])
    assert parameters.shape == decoded.shape == (5, 3, size)
    assert {x.dtype for x in (*drawn, parameters, decoded)} == {jnp.dtype("float32")}


def test_the_posterior_reaches_the_image_only_through_the_latents():
    """Decoding the drawn latents gives their parameters, and the latents are the mean plus the scaled noise."""
    model = _drawn(VAEConfig(**TINY), (4, 4, 1))
    rng = np.random.default_rng(1)
    images, noise = rng.random((2, 4, 4, 1), np.float32), rng.standard_normal((2, 3, 10)).astype(np.float32)
    latents, mean, logvar, parameters = _infer(model, images, noise)
    np.testing.assert_allclose(latents, mean + np.exp(logvar / 2) * noise, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(model.decode)(latents), parameters, rtol=1e-4, atol=1e-4)
    encoded = jax.jit(model.encode)(images)
    at_means = _infer(model, images, 0 * noise)
    np.testing.assert_allclose(encoded[0], at_means[1][:, 0], rtol=1e-5, atol=1e-6)
    # The first group's posterior depends on the image only; the second's also on the first group's latents.
    assert np.abs(mean[:, 0, :2] - mean[:, 1, :2]).max() < 1e-5
    assert np.abs(mean[:, 0, 2:] - mean[:, 1, 2:]).max() > 1e-3


def test_the_prior_of_a_group_depends_on_the_groups_above():
    """z = m(h) + s(h) u by hand, and the second group adds nothing but W z and its blocks."""
    model = _drawn(VAEConfig(**TINY), (4, 4, 1))
    group = model.groups[1]
    h, u = jnp.asarray(np.random.default_rng(2).standard_normal((2, 2, 2, 4)), jnp.float32), jnp.ones((2, 2, 2, 2))
    group.blocks = nnx.List([])
    assert group.prior is not None
    assert group.prior_head is not None
    assert group.project.bias is not None
    after, *_ = group(h, None, u)
    before = group.prior(h)
    shift, log_scale = np.split(np.asarray(group.prior_head(nnx.silu(before))), 2, -1)
    z = shift + np.exp(5 * np.tanh(log_scale / 5))
    expected = np.asarray(before) + z @ np.asarray(group.project.kernel[...]) + np.asarray(group.project.bias[...])
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(shift[0] - shift[1]).max() > 1e-3
    assert model.groups[0].prior is None  # standard normal


@pytest.mark.slow
def test_the_initial_variance_does_not_depend_on_the_depth():
    deviations, divergences = [], []
    for groups, depth in (("1,1,0", 1), ("4,12,0", 3)):
        config = VAEConfig(**{**TINY, "groups": groups, "depth": depth, "width": 16, "likelihood": "logistic"})
        model = _create(config, (8, 8, 1))
        noise = np.random.default_rng(3).standard_normal((4, 1, model.num_latents)).astype(np.float32)
        images = np.random.default_rng(4).random((4, 8, 8, 1), np.float32)
        _, mean, logvar, parameters = _infer(model, images, noise)
        deviations.append(float(np.std(parameters - model.bias[...])))
        divergences.append(float(0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean()))
    assert 0.5 < deviations[1] / deviations[0] < 2
    assert 0.1 < deviations[0] < 2
    assert max(divergences) < 0.1


@functools.cache
def _outputs(**fields):
    config = VAEConfig(**(TINY | fields))
    images = np.random.default_rng(0).random((2, 4, 4, 1), np.float32)
    model = _drawn(config, (4, 4, 1))
    noise = np.random.default_rng(1).standard_normal((2, 1, model.num_latents)).astype(np.float32)
    return [np.asarray(x) for x in _infer(model, images, noise)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("groups", "2,1,0"),
        ("latents", 3),
        ("width", 6),
        ("depth", 2),
        ("activation", "relu"),
        ("likelihood", "gaussian"),
        ("dtype", "bfloat16"),
    ],
)
def test_each_field_changes_the_outputs(field, value):
    assert_changed(_outputs(), _outputs(**{field: value}))


@pytest.mark.parametrize("groups", ["x", "1,,2", "0,1", "1,-1", " "])
def test_groups_are_counts(groups):
    with pytest.raises(UserError, match=r"give the number of groups at each resolution"):
        hierarchical_vae.check(VAEConfig(name="hierarchical", groups=groups), (8, 8, 1))


def test_images_too_small_to_be_halved_are_an_error():
    hierarchical_vae.check(VAEConfig(name="hierarchical", groups="1,1,1,1"), (8, 12, 1))
    with pytest.raises(UserError, match=r"groups=1,1,1,1,1: images of 8x12 cannot be halved 4 times"):
        hierarchical_vae.check(VAEConfig(name="hierarchical", groups="1,1,1,1,1"), (8, 12, 1))
