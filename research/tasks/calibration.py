"""Calibration: whether a classifier is right as often as its probabilities say (Guo et al. 2017, arXiv 1706.04599)."""

import jax
import jax.numpy as jnp

NUM_BINS = 15  # of equal width; bin i has the confidences above i / 15 and up to (i + 1) / 15


def excess_confidence(confidences: jax.Array, correct: jax.Array) -> jax.Array:
    """Returns confidence - correct in each example's bin, and 0 in the others.

    The expected calibration error is the sum of the absolute values of its mean over all examples, since the bins are
    weighted by their numbers of examples. So it is exact for any batches and devices.

    Args:
      confidences: float32 [b], the probabilities of the predictions.
      correct: [b], 1 or True for correct predictions.

    Returns:
      Float32 [b, 15].
    """
    bins = jnp.clip(jnp.ceil(confidences * NUM_BINS).astype(jnp.int32) - 1, 0, NUM_BINS - 1)
    return jax.nn.one_hot(bins, NUM_BINS) * (confidences - correct)[:, None]
