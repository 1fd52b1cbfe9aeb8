"""Causal attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1) that is fast on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_MAX_BLOCKS, _SMALLEST_BLOCK = 4, 64

_Residuals = tuple[jax.Array, ...]
_product = partial(jnp.matmul, preferred_element_type=jnp.float32)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array:
    """Computes `jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=True)`.

    Args:
      query, key, value: [b, T, heads, d] of one dtype.
      scale: factor of the logits.

    Returns:
      [b, T, heads, d]. Logits and softmax are float32.
    """
    by_jax = partial(jax.nn.dot_product_attention, scale=scale, is_causal=True)
    return lax.platform_dependent(query, key, value, cpu=partial(_by_blocks, scale=scale), default=by_jax)


def _by_blocks(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array:
    """Computes the attention of each block of queries to the keys up to its end, so fewer products are masked."""
    length = query.shape[1]
    size = max(_SMALLEST_BLOCK, -(-length // _MAX_BLOCKS))
    ends = [min(start + size, length) for start in range(0, length, size)]
    blocks = (
        _attention(query[:, start:end], key[:, :end], value[:, :end], scale)
        for start, end in zip(range(0, length, size), ends)
    )
    return jnp.concatenate(list(blocks), axis=1)


# XLA:CPU writes transposed copies of the weights for the gradient of JAX's function; this one multiplies by the weights
# as they are.
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    """Computes the attention of the last tokens, [b, n, heads, d], to all, [b, m, heads, d]."""
    return _forward(query, key, value, scale)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> tuple[jax.Array, _Residuals]:
    query, key, value = (x.swapaxes(1, 2) for x in (scale * query, key, value))
    logits = _product(query, key.mT)
    rows, columns = logits.shape[2:]
    logits = jnp.where(jnp.tri(rows, columns, columns - rows, dtype=bool), logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    outputs = _product(weights.astype(value.dtype), value) / total
    return outputs.astype(value.dtype).swapaxes(1, 2), (query, key, value, weights, total, outputs)


def _backward(scale: float, residuals: _Residuals, gradient: jax.Array) -> _Residuals:
    query, key, value, weights, total, outputs = residuals
    dtype = value.dtype
    gradient = gradient.swapaxes(1, 2) / total
    by_weight = _product(gradient.astype(dtype), value.mT) - (gradient * outputs).sum(-1, keepdims=True)
    by_logit = (weights * by_weight).astype(dtype)
    by_value = _product(weights.astype(dtype).mT, gradient.astype(dtype))
    gradients = scale * _product(by_logit, key), _product(by_logit.mT, query), by_value
    return tuple(x.astype(dtype).swapaxes(1, 2) for x in gradients)


_attention.defvjp(_forward, _backward)
