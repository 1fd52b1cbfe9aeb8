"""Cross-entropy and accuracy of the next token, without ever holding the logits of all tokens of a large vocabulary.

The logits of T tokens are T times the vocabulary's size, by far the largest array of a small network: 8,192 tokens of a
vocabulary of 50,000 take 1.6 GB, and as much again for their gradient. So above a limit they are computed in chunks of
tokens, forward and, once more, backward: a fourth matrix product instead of three.

A network offers this by two methods, defined in its own class (a subclass may override the call):

    token_features(tokens, carry, first, train=..., key=...)    as a call, but returns features [b, T, width]
    logits(features)                                            float32 [..., vocabulary], of each token on its own
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research import sharding

MAX_LOGITS = 2**24  # of a chunk on each device: 64 MiB in float32

Losses = tuple[jax.Array, jax.Array]


def losses(model: Any, targets: jax.Array, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Calls a network, and computes the losses of its logits.

    Args:
      model: `model(*args, **kwargs)` returns logits [b, T, vocabulary] and a carry.
      targets: int [b, T].
      args, kwargs: for the network.

    Returns:
      Softmax cross-entropy in nats, float32 [b, T]; 1 where the target is the most likely token, else 0, float32 [b,
      T]; and the carry.
    """
    if not {"token_features", "logits"} <= vars(type(model)).keys():
        logits, carry = model(*args, **kwargs)
        return *of_logits(logits, targets), carry
    features, carry = model.token_features(*args, **kwargs)
    return *_in_chunks(model.logits, features, targets, _num_chunks(model.logits, features)), carry


def of_logits(logits: jax.Array, targets: jax.Array) -> Losses:
    """Returns cross-entropy and accuracy of logits [..., vocabulary], as `losses`."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return loss, (logits.argmax(-1) == targets).astype(jnp.float32)


def _num_chunks(logits: Callable[[jax.Array], jax.Array], features: jax.Array) -> int:
    """Returns a number of chunks that have at most `MAX_LOGITS` on each device, or the steps of a device if fewer."""
    # The axis `model` does not count: it does not split an odd vocabulary, or one whose kernel is the embedding's.
    replicas, shards = sharding.batch_shards(len(features)), sharding.time_shards(features.shape[1])
    total = math.prod(jax.eval_shape(logits, features).shape)
    steps = features.shape[1] // shards
    fewest = min(steps, -(-total // (MAX_LOGITS * replicas * shards)))
    # Padding a sharded time axis moves steps between devices. Up to twice as many chunks avoid it if they divide it.
    candidates = range(fewest, fewest + 1 if shards == 1 else 2 * fewest)
    return next((count for count in candidates if steps % count == 0), fewest)


def _in_chunks(logits: Callable[[jax.Array], jax.Array], features: jax.Array, targets: jax.Array, count: int) -> Losses:
    if count == 1:
        return of_logits(logits(features), targets)
    (batch, length), replicas = targets.shape, sharding.batch_shards(len(targets))
    shards = sharding.time_shards(length)
    steps = -(-length // (count * shards))  # of a chunk on each device

    # Chunk i has the time steps i, i + count, ..., as many of every device. The axes are [chunk, replica, time shard,
    # example, step, ...]: the second and third are sharded.
    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, shards * steps * count - length), *[(0, 0)] * (x.ndim - 2)])
        parts = padded.reshape(replicas, batch // replicas, shards, steps, count, *x.shape[2:])
        return jnp.moveaxis(parts, (4, 0, 2), (0, 1, 2))

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, (0, 1, 2), (4, 0, 2)).reshape(batch, -1)[:, :length]

    on_shards = _on_shards(logits, features[: batch // replicas, :steps], replicas, shards)
    chunk_losses = jax.checkpoint(lambda chunk: of_logits(on_shards(chunk[0]), chunk[1]))
    losses, hits = jax.lax.map(chunk_losses, (split(features), split(targets)))
    return joined(losses), joined(hits)


def _on_shards(
    logits: Callable[[jax.Array], jax.Array], shard: jax.Array, replicas: int, time_shards: int
) -> Callable[[jax.Array], jax.Array]:
    """Returns `logits` for features [replicas, time_shards, *shard.shape], whose first two axes are sharded.

    Each shard has a copy of the parameters as an array of its own. So a loop adds up their gradient without
    communication, and the sum over the shards comes after it; GSPMD would sum over them in every iteration.
    """
    if replicas * time_shards == 1:
        return lambda features: logits(features[0, 0])[None, None]
    function, parameters = jax.closure_convert(logits, shard)
    copies = [sharding.copy_to_shards(x, replicas, time_shards) for x in parameters]
    return lambda features: jax.vmap(jax.vmap(function))(features, *copies)
