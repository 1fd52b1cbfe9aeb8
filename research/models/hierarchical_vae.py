"""Hierarchical variational autoencoders: groups of latents at several resolutions, drawn from the top down.

The structure is that of Sønderby et al. 2016 (arXiv 1602.02282) and of Child 2021 (arXiv 2011.10650). A bottom-up path
of residual blocks computes features of the image at every resolution. The top-down path begins with a learned state h
of the lowest resolution. Each group updates it:

    h <- h + a residual branch of h
    prior      z ~ N(m(h), s(h)^2)
    posterior  z = m + s u with u ~ N(mean(h, features), exp(logvar(h, features))): relative to the prior, as in Vahdat
               & Kautz 2020 (arXiv 2007.03898, section 3.2)
    h <- h + W z, and `depth` residual blocks

The latents that this module returns and takes are the u: under the prior all are standard normal and independent, so
the KL and the weights of importance samples are those of a VAE with one layer of latents. That VAE is the case of one
group: the prior of the first is N(0, 1).

Initialization: the last layer of each of the n residual branches, and W of each group, is divided by sqrt(n). So the
variance of the states does not depend on the depth; mean and logvar are near 0, and so is the KL.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.config import VAEConfig
from research.errors import UserError
from research.layers.bias import bias_add
from research.models.blocks import LECUN, Bias, Style
from research.models.vae import ACTIVATIONS, flatten_parameters, initial_bias, num_parameters

DEFAULT_GROUPS = "1,2,3,0"
_MAX_GROUPS = 1000  # far beyond any published; many more only exhaust memory
_MAX_LOG_SCALE = 5.0  # of a prior: its tanh keeps exp finite in the first steps

Size = tuple[int, int]


def check(config: VAEConfig, image_shape: tuple[int, ...]) -> None:
    """Raises `UserError` if `config.groups` is not a list of counts, has too many groups, or is too long for images."""
    flag = f"--config.model.groups={config.groups}"
    counts = config.groups.split(",")
    if not all(count.isascii() and count.isdigit() and len(count) < 10 for count in counts) or int(counts[0]) < 1:
        raise UserError(
            f"{flag}: give the number of groups at each resolution from the lowest to the image's, the first at least "
            f"1, as in {DEFAULT_GROUPS}"
        )
    if sum(map(int, counts)) > _MAX_GROUPS:
        raise UserError(f"{flag}: give at most {_MAX_GROUPS:,} groups")
    if 2 ** (len(counts) - 1) > min(image_shape[:2]):
        size = "x".join(map(str, image_shape[:2]))
        raise UserError(f"{flag}: images of {size} cannot be halved {len(counts) - 1} times; give fewer numbers")


def resolutions(config: VAEConfig, image_shape: tuple[int, ...]) -> list[tuple[Size, int]]:
    """Returns (height, width) and the number of groups of each resolution, from the lowest to the highest used."""
    counts = [int(count) for count in config.groups.split(",")]
    sizes = [tuple(-(-side // 2**i) for side in image_shape[:2]) for i in reversed(range(len(counts)))]
    used = max(i for i, count in enumerate(counts) if count) + 1
    return [((height, width), count) for (height, width), count in zip(sizes[:used], counts)]


def group_shapes(config: VAEConfig, image_shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Returns (height, width, channels) of each group of latents, in the order in which they are drawn."""
    return [(*size, config.latents) for size, count in resolutions(config, image_shape) for _ in range(count)]


def create(config: VAEConfig, *, mean: np.ndarray, rngs: nnx.Rngs) -> "HierarchicalVAE":
    """Builds a network with its initial parameters; arguments as those of `research.models.vae.create`."""
    return HierarchicalVAE(config, mean, Style(rngs, jnp.dtype(config.dtype), 0.0, "none", LECUN, LECUN))


class HierarchicalVAE(nnx.Module):
    """A bottom-up path, and a top-down path of groups of latents."""

    per_device_gradients = True

    def __init__(self, config: VAEConfig, mean: np.ndarray, style: Style):
        stages = resolutions(config, mean.shape)
        self.shapes = tuple(group_shapes(config, mean.shape))
        self.image_size = mean.shape[:2]
        self.likelihood = config.likelihood
        self.activation = ACTIVATIONS[config.activation]
        # The stride of the first convolution, and the pixels along a side that the last one returns at each position.
        self.patch = 2 ** (config.groups.count(",") + 1 - len(stages))
        branches = sum(count * (config.depth + 2) for _, count in stages)
        last = dataclasses.replace(style, linear_init=_scaled(LECUN, 1 / math.sqrt(branches)))
        width = config.width
        self.stem = style.conv(mean.shape[-1], width, max(3, self.patch), stride=self.patch, padding="SAME")
        self.stem_bias = Bias(width)
        self.bottom_up_blocks = nnx.List(
            [_Block(config, width, width, style, last) for _, count in stages for _ in range(max(count, 1))]
        )
        self.bottom_up_counts = tuple(max(count, 1) for _, count in stages)
        self.start = nnx.Param(jnp.zeros((*stages[0][0], width)))
        self.groups = nnx.List([Group(config, i == 0, style, last) for i in range(len(self.shapes))])
        outputs = self.patch**2 * num_parameters(config.likelihood, mean.shape[-1])
        self.out = style.linear(width, outputs, use_bias=False)
        self.bias = nnx.Param(jnp.asarray(initial_bias(config, mean)))

    @property
    def num_latents(self) -> int:
        """The number of latents of all groups."""
        return sum(map(math.prod, self.shapes))

    def bottom_up(self, images: jax.Array) -> dict[Size, jax.Array]:
        """Computes features of images, float [b, h, w, c] in 0..1: [b, height, width, features] by resolution."""
        x = self.stem_bias(self.stem((2 * images - 1).astype(self.out.dtype)))
        features, blocks = {}, list(self.bottom_up_blocks)
        for count in reversed(self.bottom_up_counts):
            if features:
                x = _halve(x)
            for _ in range(count):
                x = blocks.pop()(x)
            features[x.shape[1], x.shape[2]] = x
        return features

    def infer(
        self, features: dict[Size, jax.Array], noise: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Draws latents from the posterior: u = mean + exp(logvar / 2) noise, group after group.

        Args:
          features: of `bottom_up`, [b, ...].
          noise: float32 [b, k, latents].

        Returns:
          u, mean and logvar, float32 [b, k, latents], and the parameters of p(image | latents), as `decode`.
        """
        count, samples = noise.shape[:2]
        features = {size: jnp.repeat(x, samples, 0) if samples > 1 else x for size, x in features.items()}
        outputs = self._top_down(noise.reshape(count * samples, -1), features)
        latents, mean, logvar, parameters = (x.reshape(count, samples, -1) for x in outputs)
        return latents, mean, logvar, parameters

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes mean and logvar, float32 [b, latents], of each group where those above it are at their means."""
        noise = jnp.zeros((images.shape[0], 1, self.num_latents))
        _, mean, logvar, _ = self.infer(self.bottom_up(images), noise)
        return mean[:, 0], logvar[:, 0]

    def decode(self, latents: jax.Array) -> jax.Array:
        """Computes the parameters of p(image | u), of float32 u [..., latents], as `research.models.vae.VAE.decode`."""
        parameters = self._top_down(latents.reshape(-1, latents.shape[-1]), None)[-1]
        return parameters.reshape(*latents.shape[:-1], -1)

    def _top_down(self, values: jax.Array, features: dict[Size, jax.Array] | None) -> list[jax.Array]:
        """Computes u, mean, logvar and the likelihood's parameters, [b, n] each; without features `values` are u."""
        h = jnp.broadcast_to(self.start[...], (values.shape[0], *self.start.shape)).astype(self.out.dtype)
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        groups = []
        for group, shape, flat in zip(self.groups, self.shapes, jnp.split(values, ends[:-1], axis=-1)):
            h = _grow(h, shape[:2])
            h, *drawn = group(h, features and features[shape[:2]], flat.reshape(-1, *shape))
            groups.append([x.reshape(values.shape[0], -1) for x in drawn])
        return [*(jnp.concatenate(parts, -1) for parts in zip(*groups)), self._parameters(h)]

    def _parameters(self, h: jax.Array) -> jax.Array:
        x = self.out(self.activation(h))
        count, height, width, patch = *x.shape[:3], self.patch
        x = x.reshape(count, height, width, patch, patch, -1).swapaxes(2, 3)
        x = x.reshape(count, height * patch, width * patch, -1)[:, : self.image_size[0], : self.image_size[1]]
        return bias_add(flatten_parameters(self.likelihood, x).astype(jnp.float32), self.bias[...])


class Group(nnx.Module):
    """A group of latents of the top-down path, and the residual blocks after it."""

    def __init__(self, config: VAEConfig, is_first: bool, style: Style, last: Style):
        width, self.channels = config.width, config.latents
        self.activation = ACTIVATIONS[config.activation]
        self.prior = None if is_first else _Block(config, width, width, style, last)
        self.prior_head = None if is_first else last.linear(width, 2 * self.channels)
        self.posterior = _Block(config, 2 * width, 2 * self.channels, style, last)
        self.project = last.linear(self.channels, width)
        self.blocks = nnx.List([_Block(config, width, width, style, last) for _ in range(config.depth)])

    def __call__(
        self, h: jax.Array, features: jax.Array | None, values: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Computes the next state, u, mean and logvar; `values` are noise, or without features u itself."""
        latents = mean = logvar = values
        shift, scale = 0.0, 1.0
        if self.prior is not None and self.prior_head is not None:
            h = self.prior(h)
            shift, log_scale = jnp.split(self.prior_head(self.activation(h)).astype(jnp.float32), 2, -1)
            scale = jnp.exp(_MAX_LOG_SCALE * jnp.tanh(log_scale / _MAX_LOG_SCALE))
        if features is not None:
            mean, logvar = jnp.split(self.posterior(jnp.concatenate([h, features], -1)).astype(jnp.float32), 2, -1)
            latents = mean + jnp.exp(logvar / 2) * values
        h = h + self.project((shift + scale * latents).astype(h.dtype))
        for block in self.blocks:
            h = block(h)
        return h, latents, mean, logvar


class _Block(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, each after an activation, with half the width between; residual if sizes agree."""

    def __init__(self, config: VAEConfig, inputs: int, outputs: int, style: Style, last: Style):
        self.activation = ACTIVATIONS[config.activation]
        middle = -(-config.width // 2)
        # Dense layers are 1x1 convolutions, and compile faster.
        self.reduce = style.linear(inputs, middle)
        self.conv, self.bias = style.conv(middle, middle), Bias(middle)
        self.expand = last.linear(middle, outputs)
        self.is_residual = inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.bias(self.conv(self.activation(self.reduce(self.activation(x)))))
        y = self.expand(self.activation(y))
        return x + y if self.is_residual else y


def _scaled(init: nnx.Initializer, factor: float) -> nnx.Initializer:
    return lambda *args, **kwargs: factor * init(*args, **kwargs)


def _halve(x: jax.Array) -> jax.Array:
    """Averages 2x2 pixels; a last odd row or column has fewer."""
    height, width = (-(-side // 2) for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (0, 2 * height - x.shape[1]), (0, 2 * width - x.shape[2]), (0, 0)), mode="edge")
    return x.reshape(x.shape[0], height, 2, width, 2, -1).mean((2, 4))


def _grow(x: jax.Array, size: Size) -> jax.Array:
    """Repeats pixels up to the next resolutions, until the size is (height, width)."""
    while x.shape[1] < size[0]:
        x = x.repeat(2, 1).repeat(2, 2)
    return x[:, : size[0], : size[1]]
