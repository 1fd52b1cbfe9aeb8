"""Text networks with drawn parameters, and how tests call them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.models import text_networks

NUM_TOKENS = 11  # of the vocabulary


def filled(config):
    """Returns a network drawn by NumPy: compiling the initialization would dominate the tests."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: text_networks.create(config, NUM_TOKENS, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    scale = {1: 0.5, 2: config.width**-0.5}
    draw = jax.tree.map(lambda leaf: jnp.asarray(scale[leaf.ndim] * rng.standard_normal(leaf.shape), leaf.dtype), state)
    return nnx.merge(graphdef, draw)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _call(graphdef, state, tokens, carry, first, train, key):
    return nnx.merge(graphdef, state)(tokens, carry, first, train=train, key=key)


def apply(model, tokens, carry=(), first=None, *, train=False, key=None):
    """Calls a network in a compiled program; returns the logits and the carry."""
    first = np.zeros(len(tokens), bool) if first is None else np.asarray(first)
    return _call(*nnx.split(model), jnp.asarray(tokens), carry, first, train, key)


def draw_tokens(length=7, batch_size=3):
    """Draws tokens, int [batch_size, length]."""
    return np.random.default_rng(1).integers(0, NUM_TOKENS, (batch_size, length))
