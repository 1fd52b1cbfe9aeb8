"""Random streams: no two purposes share random numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from drawn import DATASET
from flax import nnx

from research import optimizers, randomness, sharding
from research.config import Config, DatasetConfig
from research.data import sources
from research.data.pipeline import TrainBatches, example_numbers
from research.randomness import Stream
from research.tasks.task import Task
from research.training import hyperparams
from research.training.state import create_state
from research.training.steps import Steps


def test_no_two_streams_share_a_key():
    keys = [
        tuple(np.asarray(jax.random.key_data(jax.random.fold_in(randomness.key(stream, seed), n))).tolist())
        for stream in Stream
        for seed in range(3)
        for n in range(8)
    ]
    assert len(set(keys)) == len(keys)


def test_no_two_streams_share_a_generator():
    """Even with fewer counters: NumPy pads a short seed with zeros."""
    assert np.random.default_rng(0).integers(2**62) == np.random.default_rng((0, 0)).integers(2**62)
    draws = [randomness.generator(stream, *counters).integers(2**62) for stream in Stream for counters in ((), (1, 2))]
    assert len(set(draws)) == len(draws)


class Keys(nnx.Module):
    """Stores the key of its initialization and that of the newest step."""

    def __init__(self, rngs):
        self.initial = nnx.BatchStat(jax.random.key_data(rngs.params()))
        self.newest = nnx.BatchStat(jnp.zeros(2, jnp.uint32))
        self.bias = nnx.Param(jnp.zeros(()))


class KeysTask(Task):
    """A task that only stores keys."""

    def create_model(self, rngs):
        """The network."""
        return Keys(rngs)

    def evaluate(self, model, batch, *, key, train):
        """Keeps the key."""
        model.newest[...] = jax.random.key_data(key)
        return {"loss": batch["label"] * model.bias[...]}


def test_steps_do_not_draw_what_initialization_drew():
    config = Config(batch_size=8)
    config.optimizer = optimizers.resolve(config.optimizer)
    mesh, hparams = sharding.make_mesh(config, jax.devices()[:1]), hyperparams.traced(config, 4)
    graphdef, state = create_state(KeysTask(), hyperparams.make_optimizer(config, hparams, None), config, mesh)
    batches = TrainBatches(DATASET.train, config, mesh, resident=True, capacity=1)
    train = Steps(KeysTask(), graphdef, config, mesh).jit_train(state)
    seen = [tuple(np.asarray(state.model_state["initial"][...]).tolist())]
    for _ in range(4):
        state, _ = train(state, batches.data, batches.take(1), np.int32(1), hparams)
        seen.append(tuple(np.asarray(state.model_state["newest"][...]).tolist()))
    assert len(set(seen)) == 5


def test_held_out_examples_are_not_the_first_of_the_first_epoch():
    digits = DatasetConfig(name="digits", validation_fraction=0.25)
    whole = sources.load(dataclasses.replace(digits, validation_fraction=0.0)).train["image"]
    held_out = sources.load(digits).validation["image"]
    first = whole[np.sort(example_numbers(0, len(whole), 0, len(held_out))[0])]
    assert (held_out != first).any((1, 2, 3)).mean() > 0.5
