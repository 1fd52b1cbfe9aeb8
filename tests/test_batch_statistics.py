"""Averaged parameters are evaluated with batch statistics of their own."""

import copy
import dataclasses

import jax
import numpy as np
import outsider
import pytest
from drawn import DATASET

from research import batch_statistics, optimizers, sharding
from research.checkpoint import Checkpoints
from research.data.pipeline import TrainBatches
from research.population import Population
from research.training import Training
from research.writer import Writer


def _config(**fields):
    config = dataclasses.replace(outsider.get_config(), num_epochs=1, batch_size=8, **fields)
    config.optimizer = dataclasses.replace(config.optimizer, ema_decay=0.9)
    optimizers.resolve(config.optimizer)
    return config


def _training(config, dataset=DATASET):
    training = Training(
        config, outsider.make_task(config, dataset), dataset, sharding.make_mesh(config, jax.devices()[:1])
    )
    training.compile(train=True)
    return training


def _train(training):
    for _ in training.dispatches(training.ends[-1]):
        pass
    return training


def test_they_are_those_of_the_newest_batches_and_the_average():
    """Against NumPy: from the newest parameters' statistics on, one update of the moving averages a batch."""
    training = _train(_training(_config()))
    state = jax.tree.map(np.array, training.state)  # evaluation donates it
    training.evaluate()
    mean, var = (np.float64(state.model_state["norm"][name][...]) for name in ("mean", "var"))
    kernel, bias = (np.float64(state.ema_params["first"][name][...]) for name in ("kernel", "bias"))
    task, steps = training.task, training.ends[-1]
    assert steps < batch_statistics.NUM_STEPS
    batches = TrainBatches(DATASET.train, training.config, training.mesh, resident=True, capacity=1)
    for step in range(steps):
        images = DATASET.train["image"][batches.step_inputs(step)["index"][0]]
        x = ((images / 255 - task.mean[0]) / task.std[0]).reshape(8, -1) @ kernel + bias
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    own = training.state.eval_model_state["norm"]
    np.testing.assert_allclose(own["mean"][...], mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(own["var"][...], var, rtol=1e-3)
    assert np.abs(own["var"][...] / state.model_state["norm"]["var"][...] - 1).max() > 0.01


def test_training_does_not_see_them_and_a_checkpoint_has_them(tmp_path):
    plain, looked_at = _train(_training(_config())), _training(_config())
    for _ in looked_at.dispatches(4):
        looked_at.evaluate()
    _train(looked_at)
    jax.tree.map(np.testing.assert_array_equal, looked_at.state.params, plain.state.params)
    jax.tree.map(np.testing.assert_array_equal, looked_at.state.model_state, plain.state.model_state)
    with Writer(tmp_path, 1, active=True) as writer, Checkpoints(tmp_path, keep=1, message=print) as saved:
        plain.finish_epoch({"loss": 1.0, "accuracy": 0.5}, writer, saved)
        saved.wait()
        again = _training(_config())
        assert again.restore(saved)
    jax.tree.map(np.testing.assert_array_equal, again.state.eval_model_state, plain.state.eval_model_state)


@pytest.mark.parametrize("network", ["Dropout", "Noise"])
def test_without_batch_statistics_there_are_none(network):
    assert _training(_config(network=network)).state.ema_model_state is None


def test_a_member_of_a_population_has_them_too():
    dataset = dataclasses.replace(DATASET, validation=DATASET.test)
    configs = [_config(), copy.deepcopy(_config(seed=1))]
    members = Population(configs[0], outsider.make_task(configs[0], dataset), dataset, jax.devices()[:1], 3)
    for slot, config in enumerate(configs):
        members.start(slot, config)
    reports = members.train_epoch()
    for slot, config in enumerate(configs):
        expected = _train(_training(config, dataset)).evaluate()
        assert reports[slot].figures["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-4)
