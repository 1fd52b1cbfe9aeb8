"""Training losses of classification, for one label per image or two (MixUp, CutMix), with label smoothing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from research.config import is_on
from research.data.mixing import MixedLabels

Targets = jax.Array | MixedLabels  # labels int [b], or two for each image


def softmax(logits: jax.Array, targets: Targets, smoothing: jax.typing.ArrayLike) -> jax.Array:
    """Computes the softmax cross-entropy with smoothed targets, in nats.

    Args:
      logits: [b, classes].
      targets: the labels.
      smoothing: fraction of the target spread evenly over all classes.

    Returns:
      Float32 [b].
    """
    loss = _mixture(targets, lambda labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    uniform = -jax.nn.log_softmax(logits).mean(-1)
    return jnp.asarray((1 - smoothing) * loss + smoothing * uniform)


def sigmoid(logits: jax.Array, targets: Targets, smoothing: jax.typing.ArrayLike, threshold: float) -> jax.Array:
    """Computes the mean binary cross-entropy over the classes, in nats (Wightman et al. 2021, arXiv 2110.00476).

    Args:
      logits: [b, classes].
      targets: the labels.
      smoothing: fraction of the target spread evenly over all classes.
      threshold: if not 0, the targets above it become 1 and all others 0.

    Returns:
      Float32 [b].
    """
    classes = logits.shape[-1]
    target = _mixture(targets, lambda labels: jax.nn.one_hot(labels, classes))
    target = (1 - smoothing) * target + smoothing / classes
    if is_on(threshold):
        target = (target > threshold).astype(target.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, target).mean(-1)


def accuracy(logits: jax.Array, targets: Targets) -> jax.Array:
    """Returns the weight of the predicted class in each target, float32 [b]: 1 or 0 for an image that is not mixed."""
    predictions = logits.argmax(-1)
    return _mixture(targets, lambda labels: (predictions == labels).astype(jnp.float32))


def _mixture(targets: Targets, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the weighted mean of `function(labels)` over the two labels of each image."""
    if not isinstance(targets, MixedLabels):
        return function(targets)
    first, second = function(targets.first), function(targets.second)
    weight = targets.weight.reshape(-1, *[1] * (first.ndim - 1))
    return weight * first + (1 - weight) * second
