"""Random streams: each purpose has its own keys and generators, so that no two purposes share random numbers.

A key is `fold_in(fold_in(key(seed), stream), n)`, never carried along: the random numbers depend on the seed, the
purpose and a counter (a step, an example) only.
"""

import enum

import jax
import numpy as np

VERSION = 1  # raise it when a seed's random numbers change: runs are not resumed with another version

IMPLEMENTATION = "threefry2x32"  # independent of JAX's default


class Stream(enum.IntEnum):
    """The purposes of random numbers. A value is never reused for another purpose, which would change results."""

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
    STATISTICS = 11  # dropout while the batch statistics of averaged parameters are estimated
    HOLD_OUT_TEST = 12  # of the test split; HOLD_OUT is for validation
    CROP = 13  # of training images that are cropped on the host


def key(stream: Stream, seed: jax.typing.ArrayLike = 0) -> jax.Array:
    """Returns the key of one purpose; `seed` may be traced."""
    return jax.random.fold_in(jax.random.key(seed, impl=IMPLEMENTATION), int(stream))


def generator(stream: Stream, *counters: int) -> np.random.Generator:
    """Returns NumPy's generator of one purpose, for counters of 32 bits each: a seed, an epoch."""
    # NumPy pads a short seed with zeros: `default_rng(1)` is `default_rng((1, 0))`. The stream comes first and is never
    # 0, so different purposes never have the same seed.
    return np.random.default_rng((int(stream), *counters))


def example_generator(stream: Stream, seed: int, epoch: int, number: int) -> np.random.Generator:
    """Returns NumPy's generator for one example of an epoch; creating it is cheaper than `generator`."""
    # Philox is a function of a key and a counter, whose first number counts the draws (Salmon et al. 2011).
    return np.random.Generator(np.random.Philox(key=[int(stream), seed], counter=[0, number, epoch, 0]))
