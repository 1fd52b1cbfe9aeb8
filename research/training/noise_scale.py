"""The gradient noise scale, which predicts the critical batch size (McCandlish et al. 2018, arXiv 1812.06162).

The noise scale is tr(S) / |G|^2, where G is the true gradient and S the covariance of the per-example gradients. At
larger batch sizes, doubling the batch no longer halves the number of steps (equations 2.8 and 2.9). Both parts are
estimated from the squared norms of the gradients of the batch and of its microbatches (appendix A.1).
"""

from collections.abc import Mapping

import jax

SIGNAL, NOISE = "grad_signal", "grad_noise"


def moments(small_square: jax.Array, large_square: jax.Array, small_size: int, large_size: int) -> dict[str, jax.Array]:
    """Unbiased estimates of |G|^2 ("grad_signal", which may be negative) and tr(S) ("grad_noise"), equations A.2, A.3.

    Args:
      small_square: the squared norm of a microbatch's gradient, mean over the microbatches, float32 scalar.
      large_square: the squared norm of the batch's gradient.
      small_size, large_size: the number of examples in a microbatch and in the batch, which must differ.
    """
    signal = (large_size * large_square - small_size * small_square) / (large_size - small_size)
    noise = (small_square - large_square) / (1 / small_size - 1 / large_size)
    return {SIGNAL: signal, NOISE: noise}


def critical_batch_size(means: Mapping[str, float]) -> dict[str, float]:
    """Returns {"critical_batch_size": the noise scale}; `means` are those of `moments` over many steps.

    Returns {} if `moments` were not measured, or if the estimate of |G|^2 is not positive.
    """
    if means.get(SIGNAL, 0.0) <= 0:
        return {}
    return {"critical_batch_size": max(means[NOISE], 0.0) / means[SIGNAL]}
