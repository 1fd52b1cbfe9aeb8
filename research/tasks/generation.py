"""Text drawn from a language model, character by character."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.config import option
from research.errors import UserError


@dataclasses.dataclass
class SampleOptions:
    """What `--mode=sample` of a language model can be told."""

    prompt: str = option("", "text that the samples go on from; empty: a new line")
    length: int = option(500, "characters a sample, after the prompt", minimum=1)
    num_samples: int = option(1, "texts", minimum=1)
    temperature: float = option(0.8, "divides the logits; 0: always the likeliest character", minimum=0)
    top_p: float = option(
        1.0, "draw from the likeliest characters that together have this probability", above=0, maximum=1
    )
    sample_seed: int = option(0, "seed of the draws", minimum=0, maximum=2**32 - 1)


def draw(logits: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751, section 3.1).

    Args:
      logits: float [n, characters].
      key: of the draw.
      temperature: divides the logits, before `top_p` looks at them; 0 takes the likeliest character.
      top_p: the draw is from the fewest likeliest characters whose probabilities sum to this or more.

    Returns:
      int32 [n].
    """
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits, characters = jax.lax.top_k(logits / temperature, logits.shape[-1])
    probabilities = jax.nn.softmax(logits)
    before = jnp.cumsum(probabilities, -1) - probabilities
    # The likeliest always stays, whatever rounding makes of the sum before it.
    in_nucleus = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)
    rank = jax.random.categorical(key, jnp.where(in_nucleus, logits, -jnp.inf))
    return jnp.take_along_axis(characters, rank[:, None], -1)[:, 0]


def generate(
    model: Any, prompt: jax.Array, carry: Any, key: jax.Array, *, length: int, temperature: float, top_p: float
) -> jax.Array:
    """Characters that go on from a prompt, all of them in one compiled loop.

    Args:
      model: `model(tokens, carry, first, train=False)` gives the logits [n, T, characters] and the carry.
      prompt: int [n, P], P at least 1; it is read at once.
      carry: the network's memory of nothing.
      key: of all draws.
      length: how many characters.
      temperature, top_p: of `draw`.

    Returns:
      int32 [n, length].
    """
    goes_on = jnp.zeros(len(prompt), bool)

    def step(state: tuple[jax.Array, Any], key: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        logits, carry = state
        tokens = draw(logits, key, temperature, top_p)
        logits, carry = model(tokens[:, None], carry, goes_on, train=False)
        return (logits[:, -1], carry), tokens

    logits, carry = model(prompt, carry, goes_on, train=False)
    _, tokens = jax.lax.scan(step, (logits[:, -1], carry), jax.random.split(key, length))
    return tokens.T


def encode(prompt: str, label_names: tuple[str, ...], dataset_name: str) -> np.ndarray:
    """The tokens of a prompt's bytes (UTF-8), int32 [P]; those of a new line where it is empty.

    Raises:
      UserError: a character does not occur in the data set.
    """
    numbers = {ord(name): number for number, name in enumerate(label_names)}
    for character in prompt or "\n":
        if not numbers.keys() >= set(character.encode("utf-8", "surrogateescape")):
            raise UserError(
                f"--prompt: the character {character!r} does not occur in {dataset_name}, so the network has never "
                "seen it: leave it out"
            )
    return np.array([numbers[byte] for byte in (prompt or "\n").encode("utf-8", "surrogateescape")], np.int32)


def decode(tokens: np.ndarray, label_names: tuple[str, ...]) -> str:
    """The text of tokens; bytes that are not UTF-8 become the replacement character."""
    return bytes(ord(label_names[token]) for token in tokens).decode(errors="replace")
