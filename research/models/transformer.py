"""A decoder-only Transformer over tokens (Vaswani et al. 2017, arXiv 1706.03762), with a key-value cache.

Each block adds Attention(norm x) to x, then SwiGLU(norm x):

| part | source |
| --- | --- |
| normalization before each sublayer | Xiong et al. 2020, arXiv 2002.04745; RMSNorm: arXiv 1910.07467 |
| rotary positions, of features i and i + d/2 of a head's d | Su et al. 2021, arXiv 2104.09864, section 3.2.2 |
| W (silu(G x) * U x), of 8/3 of the width | Shazeer 2020, arXiv 2002.05202, section 2 |
| residual kernels divided by sqrt(2 * layers) | Radford et al. 2019 (GPT-2), section 2.3 |
| mup: logits of attention divided by d, not by sqrt(d) | Yang et al. 2022, arXiv 2203.03466, definition 4.1 |

No layer has a bias. Dropout acts on the residuals.

Training and evaluation attend within a chunk of text only: the carry is empty, and a chunk's first predictions have
little context. Generation carries a cache of the last `context` tokens' keys and values, which every further token
attends to: a text may be of any length, and what is further back is forgotten.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research import sharding
from research.config import RNNConfig
from research.errors import UserError
from research.layers.attention import causal_attention
from research.layers.dropout import Dropout
from research.models.blocks import LECUN, Linear, rows_product

_HEAD_SIZE = 64  # of the default number of heads
_BASE = 10_000.0  # rotary wavelengths are 2 pi to 2 pi * _BASE tokens


class LayerCache(NamedTuple):
    """A layer's keys, already rotated, and values: [b, context, heads, d] each, token t at index t % context."""

    keys: jax.Array
    values: jax.Array


class Cache(NamedTuple):
    """The state of generation: how many tokens each row has read, int32 [b], and the cache of each layer."""

    count: jax.Array
    layers: tuple[LayerCache, ...]


Carry = Cache | tuple[()]
_Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, float32 [b or 1, T, 1, d / 2]


def num_heads(config: RNNConfig, width: int) -> int:
    """Returns the heads of a network of this width: by default of 64 features or more, as evenly as they divide it."""
    fitting = (n for n in range(max(1, width // _HEAD_SIZE), 0, -1) if width % (2 * n) == 0)
    return config.heads or next(fitting, 1)


def check(config: RNNConfig) -> None:
    """Raises `UserError` if the width, or mup's base width, cannot be split into the heads."""
    for field in ("width", "base_width"):
        width = getattr(config, field)
        heads = num_heads(config, width)
        if width % (2 * heads):
            raise UserError(
                f"--config.model.{field}={width} cannot be split into {heads} heads (--config.model.heads) of an even "
                f"number of features: use a multiple of {2 * heads}, or another number of heads"
            )


def empty_cache(config: RNNConfig, context: int, batch_size: int) -> Cache:
    """Returns the cache before the first token, for the last `context` tokens: zeros, in the dtype of the products."""
    heads = num_heads(config, config.width)
    zeros = jnp.zeros((batch_size, context, heads, config.width // heads), config.dtype)
    return Cache(jnp.zeros(batch_size, jnp.int32), (LayerCache(zeros, zeros),) * config.layers)


class Transformer(nnx.Module):
    """Embedding, blocks, normalization, and logits of the next token.

    Args:
      config: the layers.
      vocabulary_size: the number of tokens.
      rngs: for initialization.
    """

    per_device_gradients = True

    def __init__(self, config: RNNConfig, vocabulary_size: int, rngs: nnx.Rngs):
        width, self.dtype = config.width, jnp.dtype(config.dtype)
        # As in `rnn.RNN`: a tied kernel must give small logits; under muP the residual stream must not vanish.
        embedding_init = nnx.initializers.normal(1.0 if config.parametrization == "mup" else width**-0.5)
        self.head_size = width // num_heads(config, width)
        self.embedding = nnx.Embed(vocabulary_size, width, embedding_init=embedding_init, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.kernel = None if config.tied else nnx.Param(LECUN(rngs.params(), (width, vocabulary_size)))

    def __call__(
        self, tokens: jax.Array, carry: Carry, first: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """Computes the logits after each token.

        Args:
          tokens: int [b, T].
          carry: (): tokens attend to those of this call only. With a cache (`empty_cache`, or what an earlier call
            returned) each attends to itself and the `context` - 1 tokens before it, earlier calls included.
          first: bool [b], whether a row forgets its cache.
          train: whether dropout is active.
          key: for dropout.

        Returns:
          Float32 [b, T, vocabulary_size], and the carry.
        """
        features, carry = self.token_features(tokens, carry, first, train=train, key=key)
        return self.logits(features), carry

    def token_features(
        self, tokens: jax.Array, carry: Carry, first: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """As a call, but returns what `logits` is applied to (`research.tasks.token_loss`), [b, T, width]."""
        keys = [None] * len(self.blocks) if key is None else list(jax.random.split(key, len(self.blocks)))
        steps = jnp.arange(tokens.shape[1])
        count = jnp.where(first, 0, carry.count) if isinstance(carry, Cache) else None
        rotation = _rotation(steps[None] if count is None else count[:, None] + steps, self.head_size)
        x, caches = self.embedding.embedding[...][tokens], []
        for i, (block, block_key) in enumerate(zip(self.blocks, keys)):
            cache = carry.layers[i] if isinstance(carry, Cache) else None
            x, cache = block(x, rotation, cache, count, train=train, key=block_key)
            caches.append(cache)
        return self.norm(x), () if count is None else Cache(count + tokens.shape[1], tuple(caches))

    def logits(self, features: jax.Array) -> jax.Array:
        """Computes the logits of features [..., width]: float32 [..., vocabulary_size]."""
        kernel = self.embedding.embedding[...].T if self.kernel is None else self.kernel[...]
        return rows_product(features.astype(self.dtype), kernel.astype(self.dtype)).astype(jnp.float32)


class Block(nnx.Module):
    """Attention, then SwiGLU."""

    def __init__(self, config: RNNConfig, rngs: nnx.Rngs):
        width, hidden = config.width, 8 * math.ceil(config.width / 3)
        self.heads, self.dtype = num_heads(config, width), jnp.dtype(config.dtype)
        self.scale = (width // self.heads) ** -0.5
        if config.parametrization == "mup":  # as without it at the base width
            base_size = config.base_width // num_heads(config, config.base_width)
            self.scale = base_size**0.5 / (width // self.heads)
        residual_init = nnx.initializers.variance_scaling(1 / (2 * config.layers), "fan_in", "normal")

        def linear(inputs: int, outputs: int, kernel_init: nnx.Initializer = LECUN) -> Linear:
            return Linear(inputs, outputs, use_bias=False, dtype=self.dtype, kernel_init=kernel_init, rngs=rngs)

        self.norm, self.mlp_norm = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.outputs = linear(width, width, residual_init)
        self.gate, self.expand = linear(width, hidden), linear(width, hidden)
        self.contract = linear(hidden, width, residual_init)
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        x: jax.Array,
        rotation: _Rotation,
        cache: LayerCache | None,
        count: jax.Array | None,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Computes the block's output [b, T, width], and the cache; `count` is that of the tokens before this call."""
        keys = (None, None) if key is None else jax.random.split(key)
        y, cache = self._attention(self.norm(x), rotation, cache, count)
        x = x + self.dropout(self.outputs(y), train=train, key=keys[0])
        y = self.mlp_norm(x)
        gate, y = _products(y, self.gate, self.expand)
        y = self.contract(nnx.silu(gate) * y)
        return x + self.dropout(y, train=train, key=keys[1]), cache

    def _attention(
        self, x: jax.Array, rotation: _Rotation, cache: LayerCache | None, count: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        products = _products(x, self.query, self.key, self.value)
        query, key, value = (y.reshape(*x.shape[:2], self.heads, -1) for y in products)
        query, key = _rotated(query, rotation), _rotated(key, rotation)
        if cache is None or count is None:
            y = causal_attention(query, key, value, scale=self.scale)
        else:
            known, mask, cache = _with_cache(LayerCache(key, value), cache, count)
            y = jax.nn.dot_product_attention(query, *known, scale=self.scale, mask=mask[:, None])
        return y.reshape(x.shape), cache


def _products(x: jax.Array, *layers: Linear) -> list[jax.Array]:
    """Applies layers to the same input [b, T, width]."""
    # One large product takes 0.8 of the time of two on a CPU. Joined kernels would have to be resharded, though, and
    # for a single token, copying them takes longer than the product.
    if not sharding.is_unsharded() or x.shape[1] == 1:
        return [layer(x) for layer in layers]
    kernels = [layer.kernel[...] for layer in layers]
    joined = rows_product(x.astype(layers[0].dtype), jnp.concatenate(kernels, axis=1).astype(layers[0].dtype))
    return jnp.split(joined, np.cumsum([kernel.shape[1] for kernel in kernels])[:-1], axis=-1)


def _rotation(positions: jax.Array, size: int) -> _Rotation:
    """Returns the rotations of heads of `size` features at int positions [b or 1, T]."""
    frequencies = _BASE ** (-jnp.arange(size // 2) / (size // 2))
    angles = positions[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _rotated(x: jax.Array, rotation: _Rotation) -> jax.Array:
    (cos, sin), (a, b) = rotation, jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def _with_cache(new: LayerCache, cache: LayerCache, count: jax.Array) -> tuple[LayerCache, jax.Array, LayerCache]:
    """Adds T tokens to a cache.

    Args:
      new: of the tokens, [b, T, heads, d].
      cache: of the tokens before.
      count: int32 [b], how many these are.

    Returns:
      The keys and values [b, S, heads, d] that the tokens attend to, which of them each attends to, bool [b, T, S], and
      the new cache.
    """
    context, length = cache.keys.shape[1], new.keys.shape[1]
    queries = count[:, None] + jnp.arange(length)
    kept = queries[:, -context:]
    rows = jnp.arange(count.shape[0])[:, None]
    updated = LayerCache(*(old.at[rows, kept % context].set(x[:, -context:]) for old, x in zip(cache, new)))
    # A single token replaces the one that it no longer attends to. Of several, the first still attend to what the last
    # replace.
    if length == 1:
        known, positions = updated, _positions(count + 1, context)
    else:
        known = LayerCache(*(jnp.concatenate(pair, axis=1) for pair in zip(cache, new)))
        positions = jnp.concatenate([_positions(count, context), queries], axis=1)
    age = queries[:, :, None] - positions[:, None]
    return known, (age >= 0) & (age < context) & (positions[:, None] >= 0), updated


def _positions(count: jax.Array, context: int) -> jax.Array:
    """Returns the position of the token at each index of a cache, int32 [b, context]; negative: none yet."""
    last = count[:, None] - 1
    return last - (last - jnp.arange(context)) % context
