"""Gradient accumulation: the means over the microbatches of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.data.batch import Batch


def mean_over_microbatches(
    function: Callable[..., tuple[Any, Any, Any]], model_state: Any, carry: Any, batch: Batch
) -> tuple[Any, Any, Any]:
    """Runs `function` on one microbatch after another, in one `lax.scan`, and averages its values.

    Args:
      function: (model_state, carry, microbatch, number: int32 scalar) -> (model_state, carry, values).
      model_state: passed from each microbatch to the next.
      carry: leaves [m, ...]; every microbatch has its own.
      batch: the batch, leaves [m, b, ...].

    Returns:
      The last model_state, the new carry [m, ...], and the means of the values.
    """
    function = jax.jit(function, inline=True)  # traced once, for its shapes and in the loop
    count = len(batch.index)
    first_carry, first_microbatch = jax.tree.map(lambda x: x[0], (carry, batch))
    if count == 1:
        model_state, carry, means = function(model_state, first_carry, first_microbatch, jnp.int32(0))
        return model_state, jax.tree.map(lambda x: x[None], carry), means

    def accumulate(scanned: Any, xs: Any) -> tuple[Any, Any]:
        model_state, sums = scanned
        number, carry, microbatch = xs
        model_state, carry, values = function(model_state, carry, microbatch, number)
        return (model_state, jax.tree.map(jnp.add, sums, values)), carry

    shapes = jax.eval_shape(function, model_state, first_carry, first_microbatch, jnp.int32(0))[2]
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    (model_state, sums), carry = jax.lax.scan(accumulate, (model_state, zeros), (jnp.arange(count), carry, batch))
    return model_state, carry, jax.tree.map(lambda x: x / count, sums)
