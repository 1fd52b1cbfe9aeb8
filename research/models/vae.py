"""Variational autoencoders for images; `create` builds the network of a `VAEConfig`.

| name | encoder | decoder |
| --- | --- | --- |
| dense | `depth` hidden layers of `width` units (Burda et al. 2016, arXiv 1509.00519: 2 of 200, tanh) | the same |
| conv | a 3x3 convolution of `width` channels, `depth` more of stride 2 that double the channels | its mirror image |
| hierarchical | groups of latents at several resolutions: `research.models.hierarchical_vae` | |

The encoder returns a diagonal Gaussian over one layer of latents; the decoder returns the parameters of each pixel's
likelihood: a logit (bernoulli), mean and log variance (gaussian), or those of `research.layers.logistic_mixture`.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.config import VAEConfig
from research.errors import UserError
from research.layers import logistic_mixture
from research.layers.bias import bias_add
from research.models.blocks import GLOROT, LECUN, Style

ACTIVATIONS = {"tanh": jnp.tanh, "relu": nnx.relu, "silu": nnx.silu, "gelu": nnx.gelu}


def check(config: VAEConfig, image_shape: tuple[int, ...]) -> None:
    """Raises `UserError` if images of `image_shape` (h, w, c) are too small for the network's depth."""
    if config.name == "conv" and 2**config.depth > min(image_shape[:2]):
        size = "x".join(map(str, image_shape[:2]))
        raise UserError(f"--config.model.depth={config.depth}: images of {size} cannot be halved that often; lower it")


def create(config: VAEConfig, *, mean: np.ndarray, rngs: nnx.Rngs) -> "VAE":
    """Builds a network with its initial parameters.

    Args:
      config: checked (`check`).
      mean: float [h, w, c], the training images' mean in 0..1; initializes the decoder's bias, as in Burda's code.
      rngs: for initialization.
    """
    init = LECUN if config.parametrization == "mup" else GLOROT
    return VAE(config, mean, Style(rngs, jnp.dtype(config.dtype), 0.0, "none", init, init))


def initial_bias(config: VAEConfig, mean: np.ndarray) -> np.ndarray:
    """Computes the bias for which the decoder outputs the mean image (gaussian: with variance 0.05), float32 [n]."""
    flat = np.clip(mean, 0.001, 0.999).ravel()
    if config.likelihood == "gaussian":
        return np.concatenate([flat, np.full(flat.size, math.log(0.05))]).astype(np.float32)
    if config.likelihood == "logistic":
        return logistic_mixture.initial_bias(mean).ravel()
    return np.log(flat / (1 - flat)).astype(np.float32)


def num_parameters(likelihood: str, channels: int) -> int:
    """Returns the number of parameters of the likelihood of a pixel."""
    match likelihood:
        case "gaussian":
            return 2 * channels
        case "logistic":
            return logistic_mixture.num_parameters(channels)
        case _:
            return channels


def flatten_parameters(likelihood: str, x: jax.Array) -> jax.Array:
    """Reorders parameters [b, h, w, `num_parameters`] as `VAE.decode` returns them, [b, n]."""
    # Gaussian: channels are grouped by parameter, all means before all log variances.
    x = x.reshape(*x.shape[:-1], 2 if likelihood == "gaussian" else 1, -1)
    return jnp.moveaxis(x, -2, 1).reshape(x.shape[0], -1)


class VAE(nnx.Module):
    """An encoder and a decoder around one layer of Gaussian latents."""

    per_device_gradients = True

    def __init__(self, config: VAEConfig, mean: np.ndarray, style: Style):
        self.encoder = (_DenseEncoder if config.name == "dense" else _ConvEncoder)(config, mean.shape, style)
        self.decoder = (_DenseDecoder if config.name == "dense" else _ConvDecoder)(config, mean.shape, style)
        self.bias = nnx.Param(jnp.asarray(initial_bias(config, mean)))

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes mean and log variance, float32 [b, latents], of q(latents | image), float [b, h, w, c] in 0..1."""
        mean, logvar = jnp.split(self.encoder(images).astype(jnp.float32), 2, axis=-1)
        return mean, logvar

    def decode(self, latents: jax.Array) -> jax.Array:
        """Computes the parameters of p(image | latents): float32 [..., latents] to float32 [..., h*w*c] logits.

        For a gaussian likelihood [..., 2*h*w*c]: all means, of pixels in 0..1, then all log variances. For a logistic
        one, [..., h*w*p]: each pixel's parameters in turn.
        """
        flat = self.decoder(latents.reshape(-1, latents.shape[-1]))
        return bias_add(flat.reshape(*latents.shape[:-1], -1).astype(jnp.float32), self.bias[...])


class _DenseEncoder(nnx.Module):
    """Images [b, h, w, c] to [b, 2 * latents]."""

    def __init__(self, config: VAEConfig, image_shape: tuple[int, ...], style: Style):
        self.activation = ACTIVATIONS[config.activation]
        widths = [math.prod(image_shape), *[config.width] * config.depth]
        self.hidden = nnx.List([style.linear(*pair) for pair in itertools.pairwise(widths)])
        self.out = style.linear(config.width, 2 * config.latents)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for layer in self.hidden:
            x = self.activation(layer(x))
        return self.out(x)


class _DenseDecoder(nnx.Module):
    """Latents [b, latents] to the likelihood's parameters, without the bias: [b, parameters * h*w*c]."""

    def __init__(self, config: VAEConfig, image_shape: tuple[int, ...], style: Style):
        self.activation = ACTIVATIONS[config.activation]
        widths = [config.latents, *[config.width] * config.depth]
        self.hidden = nnx.List([style.linear(*pair) for pair in itertools.pairwise(widths)])
        outputs = math.prod(image_shape[:2]) * num_parameters(config.likelihood, image_shape[-1])
        self.out = style.linear(config.width, outputs, use_bias=False)

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = latents
        for layer in self.hidden:
            x = self.activation(layer(x))
        return self.out(x)


def _sizes(config: VAEConfig, image_shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Returns (height, width, channels) at each resolution, from the image's to the lowest."""
    height, width = image_shape[:2]
    return tuple((-(-height // 2**i), -(-width // 2**i), config.width * 2**i) for i in range(config.depth + 1))


class _ConvEncoder(nnx.Module):
    """Images [b, h, w, c] to [b, 2 * latents]."""

    def __init__(self, config: VAEConfig, image_shape: tuple[int, ...], style: Style):
        self.activation = ACTIVATIONS[config.activation]
        sizes = _sizes(config, image_shape)
        features = [image_shape[-1], *[channels for _, _, channels in sizes]]
        self.convs = nnx.List(
            [style.conv(*pair, stride=min(i, 1) + 1) for i, pair in enumerate(itertools.pairwise(features))]
        )
        self.norms = nnx.List([style.normalization(channels) for channels in features[1:]])
        self.out = style.linear(math.prod(sizes[-1]), 2 * config.latents)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.astype(self.out.dtype)
        for conv, norm in zip(self.convs, self.norms):
            x = self.activation(norm(conv(x), train=False))
        return self.out(x.reshape(x.shape[0], -1))


class _ConvDecoder(nnx.Module):
    """Latents [b, latents] to the likelihood's parameters, without the bias: [b, parameters * h*w*c].

    Nearest-neighbor upsampling is followed by a convolution (Odena et al. 2016, "Deconvolution and checkerboard
    artifacts").
    """

    def __init__(self, config: VAEConfig, image_shape: tuple[int, ...], style: Style):
        self.activation = ACTIVATIONS[config.activation]
        self.sizes = _sizes(config, image_shape)[::-1]
        self.likelihood = config.likelihood
        features = [channels for _, _, channels in self.sizes]
        self.hidden = style.linear(config.latents, math.prod(self.sizes[0]))
        self.convs = nnx.List([style.conv(*pair) for pair in itertools.pairwise(features)])
        self.norms = nnx.List([style.normalization(channels) for channels in features[1:]])
        self.out = style.conv(features[-1], num_parameters(config.likelihood, image_shape[-1]))

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = self.activation(self.hidden(latents)).reshape(-1, *self.sizes[0])
        for conv, norm, (height, width, _) in zip(self.convs, self.norms, self.sizes[1:]):
            x = x.repeat(2, 1).repeat(2, 2)[:, :height, :width]
            x = self.activation(norm(conv(x), train=False))
        return flatten_parameters(self.likelihood, self.out(x))
