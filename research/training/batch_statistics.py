"""Batch statistics for averaged (EMA) parameters, which the running statistics of the newest parameters do not fit.

Before an evaluation they are recomputed, as means over the newest training batches (Izmailov et al. 2018,
arXiv 1803.05407, section 3.2). Test loss and accuracy of the tutorial CNN with batch norm on the digits, with
an EMA decay of 0.998, means of 3 seeds:

| epoch | running statistics of the newest parameters | means over the newest batches |
| --- | --- | --- |
| 1 | 1.452, 63.0% | **0.732, 83.4%** |
| 2 | 0.316, 94.1% | **0.289, 94.6%** |
| 4 | 0.194, 97.4% | **0.193, 97.5%** |
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import randomness
from research.data.batch import Batch
from research.data.pipeline import TrainBatches
from research.network import split_frozen
from research.randomness import Stream
from research.training.hyperparams import SEED, HParams
from research.training.state import TrainState, is_finite

NUM_STEPS = 32  # how many of the newest steps' batches the means are over


def estimate(
    model_state_after: Callable[..., Any], state: TrainState, batch: Batch, count: jax.Array, hparams: HParams
) -> tuple[TrainState, jax.Array]:
    """Includes the batch of one training step in the batch statistics of the averaged parameters.

    A microbatch whose statistics are not finite changes nothing: training skipped it or left it out, too.

    Args:
      model_state_after: (params, model_state, carry, microbatch, key, momentum) -> the model_state after this
        microbatch, with this momentum in every batch norm; both without the frozen parameters.
      state: the train state of a network with batch statistics.
      batch: the batch of one training step, leaves [m, b, ...].
      count: int32 scalar, the number of microbatches that the means cover so far; 0 starts from the newest parameters'
        model_state, and -1 changes nothing.
      hparams: the traced hyperparameters of the step.

    Returns:
      The state, and the new count.
    """
    carry = jax.tree.map(lambda x: x[0], state.carry)
    key = randomness.key(Stream.STATISTICS, hparams[SEED])
    newest = split_frozen(state.model_state)[1]
    start = jax.tree.map(lambda x, own: jnp.where(count == 0, x, own), newest, state.ema_model_state)

    def body(i: jax.Array, carried: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        model_state, count = carried
        microbatch = jax.tree.map(lambda x: x[i], batch)
        arrays = state.ema_params, model_state, carry, microbatch, jax.random.fold_in(key, count)
        # With momentum count / (count + 1) the running statistics are the mean over all microbatches.
        after = model_state_after(*arrays, count / (count + 1))
        finite = is_finite(after)
        return jax.tree.map(lambda x, before: jnp.where(finite, x, before), after, model_state), count + finite

    moved, new_count = jax.lax.fori_loop(0, len(batch.index), body, (start, jnp.maximum(count, 0)))
    kept = jax.tree.map(lambda x, own: jnp.where(count < 0, own, x), moved, state.ema_model_state)
    return dataclasses.replace(state, ema_model_state=kept), jnp.where(count < 0, count, new_count)


def estimate_from_newest(
    program: Callable[..., Any], state: TrainState, batches: TrainBatches, end: int, hparams: HParams
) -> TrainState:
    """Estimates the statistics from the batches of the newest steps before step `end`.

    Args:
      program: `estimate`, compiled (`Steps.jit_estimate`).
      state: the train state, which is donated.
      batches: of training.
      end: the number of batches that training has consumed.
      hparams: the traced hyperparameters.
    """
    count = np.int32(0)
    for step in range(max(end - NUM_STEPS, 0), end):
        state, count = program(state, batches.data, batches.batch(step), count, hparams)
    return state
