"""The gradient noise scale is that of a problem where it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import read_lines
from flax import nnx

from research import optimizers, sharding
from research.config import Config, OptimizerConfig
from research.data.sources import Dataset
from research.tasks.task import Task
from research.training import loop, noise_scale
from research.training.progress import Progress


class Point(nnx.Module):
    per_device_gradients = True

    def __init__(self, rngs):
        self.at = nnx.Param(jnp.array([1.0, -0.5, 0.25, 0.0]))


class Quadratic(Task):
    """|w - x|^2 / 2, whose gradient is w - x: G = w - E[x], and S is the covariance of x."""

    per_device_gradients = True

    def create_model(self, rngs):
        return Point(rngs)

    def evaluate(self, model, batch, *, key, train):
        return {"loss": 0.5 * jnp.square(model.at[...] - batch["x"]).sum(-1)}


def _trained(workdir, devices=1, **fields):
    x = np.random.default_rng(0).normal([0.0, 0.5, 0.0, 0.0], [1.0, 2.0, 0.5, 0.1], (4096, 4)).astype(np.float32)
    dataset = Dataset("drawn", (), {"x": x}, None, {"x": x[:64]})
    config = Config(num_epochs=4, batch_size=64, optimizer=OptimizerConfig(name="sgd", learning_rate=0.0), **fields)
    config.optimizer = optimizers.resolve(config.optimizer)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    workdir.mkdir()
    _, summary = loop.train_and_evaluate("quadratic", config, Quadratic(), dataset, mesh, workdir)
    gradients = np.array([1.0, -0.5, 0.25, 0.0]) - x.astype(np.float64)
    return summary, np.square(gradients.mean(0)).sum(), gradients.var(0).sum()


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "microbatch_size"), [(1, 8), (2, 16), (8, 0)])
def test_it_is_the_closed_form_and_is_recorded(tmp_path, devices, microbatch_size):
    summary, signal, noise = _trained(tmp_path / "x", devices, microbatch_size=microbatch_size)
    assert summary["critical_batch_size"] == pytest.approx(noise / signal, rel=0.1)
    lines = [line for line in read_lines(tmp_path / "x") if noise_scale.NOISE in line]
    assert np.mean([line[noise_scale.NOISE] for line in lines]) == pytest.approx(noise, rel=0.3)


def test_the_estimates_have_no_bias():
    """Over all pairs of halves: their means are the sample's own |G|^2 and tr(S), for samples of any mean."""
    rng = np.random.default_rng(0)
    signals, noises = [], []
    for _ in range(4000):
        gradients = rng.normal([1.0, 0.0], [2.0, 1.0], (8, 2))
        small = np.square(gradients.reshape(4, 2, 2).mean(1)).sum(-1).mean()
        large = np.square(gradients.mean(0)).sum()
        estimates = noise_scale.moments(small, large, 2, 8)
        signals.append(estimates[noise_scale.SIGNAL])
        noises.append(estimates[noise_scale.NOISE])
    assert np.mean(signals) == pytest.approx(1.0, abs=0.1)
    assert np.mean(noises) == pytest.approx(5.0, abs=0.1)


def test_an_epoch_that_measured_it_in_some_steps_reports_their_mean():
    """As if a run of several devices was resumed on one: only the first half of the epoch has moments."""
    progress = Progress()
    steps = {"loss": np.array([1.0, 2.0]), "grad_norm": np.ones(2)}
    progress.add(steps | {noise_scale.SIGNAL: np.array([2.0, 4.0]), noise_scale.NOISE: np.array([30.0, 60.0])})
    progress.add(steps)
    progress.sums["unmeasured"] = [0.0, 0]  # each step that would have measured it was skipped
    means = progress.means()
    assert means == {"loss": 1.5, "grad_norm": 1.0, noise_scale.SIGNAL: 3.0, noise_scale.NOISE: 45.0}
    assert noise_scale.critical_batch_size(means) == {"critical_batch_size": 15.0}


def test_of_one_gradient_there_is_none(tmp_path):
    assert "critical_batch_size" not in _trained(tmp_path / "x")[0]
    assert noise_scale.critical_batch_size({noise_scale.SIGNAL: -1.0, noise_scale.NOISE: 1.0}) == {}
