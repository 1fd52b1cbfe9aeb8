"""Sampling text from a language model: temperature and nucleus (top-p) sampling, one token at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.config import option


@dataclasses.dataclass
class SampleOptions:
    """The options of `--mode=sample` of a language model."""

    prompt: str = option("", "text that the samples continue; empty: a newline")
    length: int = option(500, "tokens of each sample, without the prompt", minimum=1)
    num_samples: int = option(1, "number of samples", minimum=1)
    temperature: float = option(0.8, "divides the logits; 0: always the most likely token", minimum=0)
    top_p: float = option(1.0, "sample from the fewest tokens whose probabilities sum to this", above=0, maximum=1)
    sample_seed: int = option(0, "random seed of the samples", minimum=0, maximum=2**32 - 1)


def draw(logits: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """Draws tokens by nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751, section 3.1).

    Args:
      logits: float [n, vocabulary].
      key: the random key.
      temperature: divides the logits before `top_p` is applied; 0 takes the most likely token.
      top_p: only the fewest, most likely tokens whose probabilities sum to this or more are drawn from.

    Returns:
      int32 [n].
    """
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits, tokens = jax.lax.top_k(logits / temperature, logits.shape[-1])
    probabilities = jax.nn.softmax(logits)
    before = jnp.cumsum(probabilities, -1) - probabilities
    # The most likely token always stays, even if rounding makes the (empty) sum before it exceed top_p.
    in_nucleus = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)
    rank = jax.random.categorical(key, jnp.where(in_nucleus, logits, -jnp.inf))
    return jnp.take_along_axis(tokens, rank[:, None], -1)[:, 0]


def generate(
    model: Any, prompt: jax.Array, carry: Any, key: jax.Array, *, length: int, temperature: float, top_p: float
) -> jax.Array:
    """Generates the tokens that continue a prompt, in one compiled loop.

    Args:
      model: `model(tokens, carry, first, train=False)` returns logits [n, T, vocabulary] and the carry.
      prompt: int [n, P], P at least 1; processed in one call.
      carry: the network's initial state.
      key: the random key.
      length: the number of tokens.
      temperature, top_p: see `draw`.

    Returns:
      int32 [n, length].
    """
    no_reset = jnp.zeros(len(prompt), bool)

    def step(state: tuple[jax.Array, Any], key: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        logits, carry = state
        tokens = draw(logits, key, temperature, top_p)
        logits, carry = model(tokens[:, None], carry, no_reset, train=False)
        return (logits[:, -1], carry), tokens

    logits, carry = model(prompt, carry, no_reset, train=False)
    _, tokens = jax.lax.scan(step, (logits[:, -1], carry), jax.random.split(key, length))
    return tokens.T
