"""Batch statistics for the averaged parameters, estimated before evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import outsider
import pytest
from drawn import DATASET

from research import optimizers, sharding
from research.config import MeshConfig
from research.data.pipeline import TrainBatches
from research.record.writer import Writer
from research.training import batch_statistics, evaluation, loop
from research.training.checkpoint import Checkpoints
from research.training.population import Population
from research.training.run import Training


def _config(**fields):
    config = dataclasses.replace(outsider.get_config(), num_epochs=1, batch_size=8, **fields)
    config.optimizer = dataclasses.replace(config.optimizer, ema_decay=0.9)
    config.optimizer = optimizers.resolve(config.optimizer)
    return config


def _training(config, dataset=DATASET):
    training = Training(
        config, outsider.make_task(config, dataset), dataset, sharding.make_mesh(config, jax.devices()[:1])
    )
    training.compile(train=True)
    return training


def _train(training):
    for _ in training.dispatches(training.epoch_end_steps[-1]):
        pass
    return training


def test_they_are_means_over_the_newest_batches():
    """Against NumPy; the momentum of the batch norm plays no part."""
    training = _train(_training(_config()))
    state = jax.tree.map(np.array, training.state)  # evaluation donates it
    training.evaluate()
    kernel, bias = (np.float64(state.ema_params["first"][name][...]) for name in ("kernel", "bias"))
    task, steps = training.task, training.epoch_end_steps[-1]
    assert steps < batch_statistics.NUM_STEPS
    batches = TrainBatches(DATASET.train, training.config, training.mesh, resident=True, capacity=1)
    mean, var = [], []
    for step in range(steps):
        images = DATASET.train["image"][batches.local_batch(step).index[0]]
        x = ((images / 255 - task.mean[0]) / task.std[0]).reshape(8, -1) @ kernel + bias
        mean.append(x.mean(0))
        var.append(x.var(0))
    own = training.state.eval_model_state["norm"]
    np.testing.assert_allclose(own["mean"][...], np.mean(mean, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(own["var"][...], np.mean(var, 0), rtol=1e-4)
    assert np.abs(own["var"][...] / state.model_state["norm"]["var"][...] - 1).max() > 0.01


@pytest.mark.slow
def test_training_does_not_use_them_and_a_checkpoint_holds_them(tmp_path):
    plain, evaluated = _train(_training(_config())), _training(_config())
    for _ in evaluated.dispatches(4):
        evaluated.evaluate()
    _train(evaluated)
    jax.tree.map(np.testing.assert_array_equal, evaluated.state.params, plain.state.params)
    jax.tree.map(np.testing.assert_array_equal, evaluated.state.model_state, plain.state.model_state)
    with Writer(tmp_path, 1, active=True) as writer, Checkpoints(tmp_path, keep=1, message=print) as saved:
        plain.progress.sums = {"loss": [1.0, 1], "accuracy": [0.5, 1]}
        loop.Loop("outsider", plain, writer, saved).finish_epoch()
        saved.wait()
        again = _training(_config())
        assert again.restore(saved)
    jax.tree.map(np.testing.assert_array_equal, again.state.eval_model_state, plain.state.eval_model_state)


def test_a_checkpoint_within_an_epoch_lacks_them_and_opening_it_estimates_them(tmp_path):
    """So that a run saves without delay when it is told to stop."""
    config, during = _config(), _training(_config())
    with Writer(tmp_path, 1, active=True) as writer, Checkpoints(tmp_path, keep=1, message=print) as saved:
        for _ in during.dispatches(4):
            pass
        loop.Loop("outsider", during, writer, saved).save()
    initial = _training(_config()).state.ema_model_state
    jax.tree.map(np.testing.assert_array_equal, during.state.ema_model_state, initial)
    expected = during.evaluate()
    opened = evaluation.restore(config, outsider.make_task(config, DATASET), DATASET, during.mesh, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, opened.state.ema_model_state, during.state.ema_model_state)
    assert evaluation.evaluate(opened) == pytest.approx(expected)


class Spoilt(outsider.Everything):
    """Returns NaN for black images in training."""

    def __call__(self, x, *, train, key=None):
        black = x.max((1, 2, 3), keepdims=True) < -1
        return super().__call__(jnp.where(black & train, jnp.nan, x), train=train, key=key)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"max_skipped_steps": 2}, {"max_rewinds": 2}], ids=str)
def test_batches_that_training_skips_are_left_out(fields, monkeypatch, tmp_path):
    monkeypatch.setitem(outsider.NETWORKS, "Everything", Spoilt)
    images = DATASET.train["image"].copy()
    images[40] = 0
    dataset = dataclasses.replace(DATASET, train=DATASET.train | {"image": images})
    config = _config(network="Everything", checkpoint_every_steps=2, **fields)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    task = outsider.make_task(config, dataset)
    run, summary = loop.train_and_evaluate("outsider", config, task, dataset, mesh, tmp_path)
    assert summary["skipped_steps" if "max_skipped_steps" in fields else "rewinds"] == 1
    assert np.isfinite(summary["test_loss"])
    for array in jax.tree.leaves(run.state.ema_model_state):
        assert np.isfinite(array).all()


@pytest.mark.slow
@pytest.mark.parametrize("network", ["Dropout", "Noise"])
def test_networks_without_batch_norm_have_none(network):
    assert _training(_config(network=network)).state.ema_model_state is None


@pytest.mark.slow
@pytest.mark.parametrize("network", ["BatchNorm", pytest.param("Everything", marks=pytest.mark.slow)])
@pytest.mark.parametrize("devices", [1, 2])
def test_population_members_have_them_too(devices, network):
    """A member has one device, so `reduce_dtype` has no effect."""
    dataset = dataclasses.replace(DATASET, validation=DATASET.test)
    configs = [_config(network=network, mesh=MeshConfig(reduce_dtype="bfloat16"), seed=seed) for seed in range(2)]
    members = Population(configs[0], outsider.make_task(configs[0], dataset), dataset, jax.devices()[:devices], 3)
    for slot, config in enumerate(configs):
        members.start(slot, config)
    reports = members.train_epoch()
    for slot, config in enumerate(configs):
        expected = _train(_training(config, dataset)).evaluate()
        assert reports[slot].metrics["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-4)
