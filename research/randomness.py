"""Random streams: each purpose derives its own keys and generators, so that no two of them share a number.

A key is `fold_in(fold_in(key(seed), stream), n)`, never carried along: what is drawn depends on the seed, the purpose
and a counter (a step, an example) alone.
"""

import enum

import jax
import numpy as np

VERSION = 1  # raised where a seed's numbers change; a run is not resumed by a program that would draw others


class Stream(enum.IntEnum):
    """What random numbers are for. A number is never given to another purpose: results would change."""

    INITIALIZATION = 1
    STEP = 2  # augmentation, dropout and latents of a train step
    DATA_ORDER = 3
    HOLD_OUT = 4
    TRAIN_FRACTION = 5
    EVALUATION = 6
    PREDICTION = 7
    ALTERNATING_FLIP = 8
    FIXED_BITS = 9  # thresholds of training images that are binarized once
    PRIOR_SAMPLES = 10
    STATISTICS = 11  # of the averaged parameters: dropout while they are estimated


def key(stream: Stream, seed: jax.typing.ArrayLike = 0) -> jax.Array:
    """The key of one purpose; `seed` may be traced."""
    return jax.random.fold_in(jax.random.key(seed), int(stream))


def generator(stream: Stream, *counters: int) -> np.random.Generator:
    """NumPy's generator of one purpose, for counters of 32 bits each: a seed, an epoch."""
    # NumPy pads a short seed with zeros, so `default_rng(0)` is `default_rng((0, 0))`. No stream is 0, and it comes
    # first, so no two of these are the same.
    return np.random.default_rng((int(stream), *counters))
