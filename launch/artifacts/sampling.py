"""Samples from the logits of a language model, on the host."""

import numpy as np

from launch.artifacts.probabilities import softmax


def draw(logits: np.ndarray, rng: np.random.Generator, temperature: float, top_p: float) -> np.ndarray:
    """Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751, section 3.1).

    Args:
      logits: float [n, characters].
      rng: draws one number per row.
      temperature: divides the logits, before `top_p` is applied; 0 is greedy decoding.
      top_p: samples from the smallest set of most likely characters whose probabilities sum to this or more.

    Returns:
      int32 [n].
    """
    if temperature == 0:
        return logits.argmax(-1).astype(np.int32)
    order = np.argsort(-logits, axis=-1, kind="stable")
    probabilities = softmax(np.take_along_axis(logits, order, -1) / temperature)
    sums = np.cumsum(probabilities, -1)
    outside = sums - probabilities >= top_p
    outside[:, 0] = False  # the most likely one stays, even if top_p is 0
    sums = np.cumsum(np.where(outside, 0, probabilities), -1)
    rank = (sums <= rng.random((len(logits), 1)) * sums[:, -1:]).sum(-1)
    return np.take_along_axis(order, rank[:, None], -1)[:, 0].astype(np.int32)
