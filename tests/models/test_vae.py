"""The autoencoders have the right sizes for every image shape, and every field of their config has its effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changes import assert_changed
from flax import nnx

from research.config import VAEConfig
from research.errors import UserError
from research.models import vae


def _create(config, image_shape):
    return vae.create(config, mean=np.full(image_shape, 0.2), rngs=nnx.Rngs(0))


def _filled(config, image_shape, mean=0.2):
    """Returns a network with kernels drawn by NumPy: compiling the initialization would dominate the tests."""
    mean = np.broadcast_to(mean, image_shape)
    model = nnx.eval_shape(lambda: vae.create(config, mean=mean, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)
    filled = nnx.merge(graphdef, jax.tree.map(lambda leaf: np.float32(0.3 * rng.standard_normal(leaf.shape)), state))
    filled.bias = nnx.Param(jnp.asarray(vae.initial_bias(config, mean)))
    return filled


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(graphdef, method, state, x):
    return getattr(nnx.merge(graphdef, state), method)(x)


def _apply(model, method, x):
    """Calls a method in one compiled program."""
    graphdef, state = nnx.split(model)
    return _call(graphdef, method, state, x)


def _num_params(config, image_shape):
    params = nnx.state(nnx.eval_shape(lambda: _create(config, image_shape)), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _dense_params(d, w, z, p):
    """Counts the parameters of the dense network with two hidden layers on either side."""
    return (d + 1) * w + (w + 1) * w + (w + 1) * 2 * z + (z + 1) * w + (w + 1) * w + (w + 1) * p * d


def _conv_params(side, c, w, z, p):
    """Counts the parameters of the convolutional network with depth 2."""
    flat = 4 * w * (side // 4) ** 2
    encoder = (9 * c + 1) * w + (9 * w + 1) * 2 * w + (18 * w + 1) * 4 * w + (flat + 1) * 2 * z
    return encoder + (z + 1) * flat + (36 * w + 1) * 2 * w + (18 * w + 1) * w + 9 * w * c * p + side**2 * c * p


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("image_shape", [(28, 28, 1), (32, 32, 3)])
def test_parameter_counts(image_shape, likelihood):
    side, _, c = image_shape
    p = 2 if likelihood == "gaussian" else 1
    dense = VAEConfig(likelihood=likelihood)
    assert _num_params(dense, image_shape) == _dense_params(side**2 * c, 200, 50, p)
    conv = VAEConfig(name="conv", width=8, latents=10, likelihood=likelihood)
    assert _num_params(conv, image_shape) == _conv_params(side, c, 8, 10, p)


def test_the_network_of_burda_et_al_has_its_published_layers():
    # 784-200-200-(50, 50) and 50-200-200-784, each with biases.
    assert _num_params(VAEConfig(), (28, 28, 1)) == 157_000 + 40_200 + 20_100 + 10_200 + 40_200 + 157_584


@pytest.mark.parametrize("name", ["dense", "conv"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("image_shape", [(28, 28, 1), (32, 32, 3), (9, 13, 1)])
def test_shapes_for_any_image_and_any_leading_axes(name, likelihood, image_shape):
    config = VAEConfig(name=name, width=4, latents=3, likelihood=likelihood, dtype="bfloat16")
    vae.check(config, image_shape)

    def apply():
        model = _create(config, image_shape)
        return model.encode(jnp.zeros((5, *image_shape))), model.decode(jnp.zeros((5, 2, 3)))

    (mean, logvar), parameters = jax.eval_shape(apply)
    size = np.prod(image_shape) * (2 if likelihood == "gaussian" else 1)
    assert (mean.shape, logvar.shape, parameters.shape) == ((5, 3), (5, 3), (5, 2, size))
    assert mean.dtype == logvar.dtype == parameters.dtype == jnp.float32


@functools.cache
def _outputs(**fields):
    config = VAEConfig(**{"name": "conv", "width": 2, "latents": 3, "depth": 1, **fields})
    images = np.random.default_rng(0).random((2, 4, 4, 1), np.float32)
    latents = np.random.default_rng(1).standard_normal((2, config.latents)).astype(np.float32)
    model = _filled(config, images.shape[1:])
    return [*_apply(model, "encode", images), _apply(model, "decode", latents)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "dense"),
        ("latents", 4),
        ("width", 3),
        ("depth", 2),
        ("activation", "relu"),
        ("activation", "silu"),
        ("activation", "gelu"),
        ("likelihood", "gaussian"),
        ("dtype", "bfloat16"),
    ],
)
def test_each_field_changes_the_outputs(field, value):
    assert_changed(_outputs(), _outputs(**{field: value}))


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_leading_axes_do_not_change_what_is_decoded(name):
    model = _filled(VAEConfig(name=name, width=4, latents=3, depth=1), (4, 6, 2))
    latents = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    flat = _apply(model, "decode", latents.reshape(10, 3))
    np.testing.assert_allclose(_apply(model, "decode", latents), flat.reshape(2, 5, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_decoder_starts_at_the_mean_image(likelihood):
    """A convolutional decoder also separates means and log variances, six channels of its last layer."""
    mean = np.random.default_rng(0).random((4, 6, 3))
    config = VAEConfig(name="conv", width=2, latents=3, depth=1, likelihood=likelihood)
    model = _filled(config, mean.shape, mean)
    latents = np.ones((1, 3), np.float32)
    drawn = _apply(model, "decode", latents)[0]
    kernel = model.decoder.out.kernel
    kernel[...] = kernel[...] * (np.arange(kernel[...].shape[-1]) >= 3)  # zeros for the means or logits
    parameters = _apply(model, "decode", latents)[0]
    means = parameters[: mean.size]
    shown = 1 / (1 + np.exp(-means)) if likelihood == "bernoulli" else means
    np.testing.assert_allclose(shown.reshape(mean.shape), mean, rtol=1e-4)
    np.testing.assert_allclose(parameters[mean.size :], drawn[mean.size :], rtol=1e-6)
    assert not np.allclose(drawn[: mean.size], means)


def test_images_too_small_to_be_halved_are_an_error():
    vae.check(VAEConfig(name="conv", depth=4), (16, 20, 1))
    vae.check(VAEConfig(name="dense", depth=5), (16, 20, 1))
    with pytest.raises(UserError, match=r"depth=5: images of 16x20"):
        vae.check(VAEConfig(name="conv", depth=5), (16, 20, 1))
