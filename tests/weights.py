"""Runs of a linear network, to start others from."""

import dataclasses
import json

import jax
import linear
import numpy as np
from linear import LinearConfig, ModelConfig

from research import optimizers, parameter_groups, sharding
from research.config import InitConfig, OptimizerConfig
from research.data.sources import Dataset
from research.training.checkpoint import Checkpoints, checksums_of
from research.training.run import Training


def drawn_dataset(classes=3, side=4, channels=1):
    def split(count):
        rng = np.random.default_rng(count)
        label = np.arange(count, dtype=np.int32) % classes
        images = rng.integers(0, 160, (count, side, side, channels)) + 20 * label[:, None, None, None]
        return {"image": images.astype(np.uint8), "label": label}

    return Dataset("drawn", tuple("abcdefgh"[:classes]), split(48), split(20), split(16))


DATASET = drawn_dataset()


def linear_config(path="", reset="", **fields):
    config = LinearConfig(num_epochs=1, batch_size=16, model=ModelConfig(width=8), init=InitConfig(str(path), reset))
    config.optimizer = optimizers.resolve(OptimizerConfig(name="sgd", learning_rate=0.5))
    return dataclasses.replace(config, **fields)


def create_run(config, dataset=DATASET, make_task=linear.make_task, devices=1):
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    return Training(config, make_task(config, dataset), dataset, mesh)


def save_run(run, workdir, step=0, best=None):
    """Saves a checkpoint of a run without training it; returns the workdir."""
    run.state = dataclasses.replace(run.state, step=np.int32(step) + run.state.step)
    progress = dataclasses.asdict(run.progress) | {"best": best}
    with jax.set_mesh(run.mesh), Checkpoints(workdir, keep=9, message=print) as checkpoints:
        checkpoints.save(run.state, checksums_of(run.state), progress, None)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(run.config)))
    return workdir


def arrays_of(*trees):
    return {n: np.asarray(x) for t in trees for n, x in zip(parameter_groups.names(t), jax.tree.leaves(t), strict=True)}


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
