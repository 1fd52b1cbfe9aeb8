"""A tiny experiment for tests of the training loop: softmax regression on random images."""

import json
from unittest import mock

import jax
import numpy as np
from flax import nnx

from experiments.cifar_cnn import CifarConfig
from research import optimizers, sharding
from research.config import AugmentConfig, DatasetConfig, OptimizerConfig
from research.data.batch import Batch
from research.data.sources import Dataset
from research.tasks.classification import Classification
from research.training import loop

SHAPE = (6, 6, 1)


class Linear(nnx.Module):
    """Softmax regression, quick to compile."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, images, *, train, key=None):
        return self.linear(images.reshape(len(images), -1))


def split(seed, count):
    """Random images, brighter for higher labels."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, count).astype(np.int32)
    images = rng.integers(0, 100, (count, *SHAPE)) + 50 * label[:, None, None, None]
    return {"image": images.astype(np.uint8), "label": label}


DATASET = Dataset("drawn", ("a", "b", "c"), split(0, 90), None, split(1, 33))


def run(
    workdir,
    devices=1,
    dataset=DATASET,
    rate=0.1,
    max_device_gib=2.0,
    signals=None,
    plots=False,
    callbacks=(),
    trackers=(),
    **fields,
):
    """Trains for 2 epochs of 11 steps; returns the state and the summary.

    Drawing plots takes longer than training, so only tests of the plots ask for them.
    """
    config = CifarConfig(**{"num_epochs": 2, "batch_size": 8, "log_every_steps": 1, **fields})
    config.dataset = DatasetConfig(max_device_gib=max_device_gib)
    if "optimizer" not in fields:
        config.optimizer = OptimizerConfig(name="sgd", learning_rate=rate)
    config.optimizer = optimizers.resolve(config.optimizer)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    task = Classification(Linear, (0.5,), (0.25,), AugmentConfig(), 0.1)
    workdir.mkdir(exist_ok=True)
    draw = loop.Loop.draw if plots else lambda _: None
    with mock.patch.object(loop.Loop, "draw", draw):
        run, summary = loop.train_and_evaluate(
            "drawn_linear", config, task, dataset, mesh, workdir, signals, callbacks, trackers
        )
    return run.state, summary


def read_lines(workdir):
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(one, other):
    """Asserts that two pytrees are bit-identical."""
    jax.tree.map(np.testing.assert_array_equal, one, other)


def loss_jaxpr(task, dataset, create_model):
    """Returns the jaxpr, as text, of the metrics of 8 training examples of a data set."""
    features = {name: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype) for name, x in dataset.train.items()}
    index, step = jax.ShapeDtypeStruct((8,), np.int32), jax.ShapeDtypeStruct((), np.int32)

    def evaluate(batch, key):
        return task.evaluate(create_model(), batch, key=key, train=True)

    return str(jax.make_jaxpr(evaluate)(Batch(features, index, step=step), jax.random.key(0)))
