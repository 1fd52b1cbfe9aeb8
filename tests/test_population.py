"""Each member of a population matches a single run of its config; all share one compilation."""

import copy
import dataclasses

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from linear import LinearConfig, ModelConfig, make_task

from research import optimizers, sharding
from research.config import OptimizerConfig
from research.data.sources import Dataset
from research.layers.dropout import Dropout
from research.training import hyperparams, population, population_devices
from research.training.population import Population
from research.training.run import Training
from research.training.steps import Steps


def _dataset():
    rng = np.random.default_rng(0)

    def split(count):
        label = rng.integers(0, 3, count).astype(np.int32)
        images = rng.integers(0, 160, (count, 4, 4, 1)) + 40 * label[:, None, None, None]
        return {"image": images.astype(np.uint8), "label": label}

    return Dataset("drawn", ("a", "b", "c"), split(70), split(20), split(5))


DATASET = _dataset()
BASE = LinearConfig(
    num_epochs=2,
    batch_size=16,  # does not divide the splits: 8 steps in 2 epochs, and a padded last evaluation batch
    label_smoothing=0.1,
    model=ModelConfig(dropout=0.2),
    optimizer=OptimizerConfig(name="momentum", learning_rate=0.05, schedule="cosine", warmup=0.2),
)
BASE.optimizer = optimizers.resolve(BASE.optimizer)


def _config(rate, seed, warmup=0.2, smoothing=0.1, dropout=0.2):
    config = copy.deepcopy(BASE)
    config.seed, config.label_smoothing, config.model.dropout = seed, smoothing, dropout
    config.optimizer.learning_rate, config.optimizer.warmup = rate, warmup
    return config


CONFIGS = [_config(0.05, 0), _config(0.2, 1, warmup=0.5, smoothing=0.3), _config(0.02, 2, dropout=0.6), _config(0.1, 3)]


def _make(devices=1, size=4):
    return Population(BASE, make_task(BASE, DATASET), DATASET, jax.devices()[:devices], size)


@pytest.fixture(scope="module")
def single_runs():
    """The results of a single run of each config."""
    found = []
    for config in CONFIGS:
        mesh = sharding.make_mesh(config, jax.devices()[:1])
        with jax.set_mesh(mesh):
            training = Training(config, make_task(config, DATASET), DATASET, mesh)
            training.compile(train=True)
            for _ in training.dispatches(training.epoch_end_steps[-1]):
                pass
            found.append(training.evaluate())
    return found


def _agree(report, expected):
    assert report.finished
    assert report.metrics["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-4)
    assert report.metrics["validation_accuracy"] == pytest.approx(expected["validation_accuracy"])


@pytest.mark.parametrize(
    ("devices", "at_once"), [(1, 4), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((2, 1), (1, 1), (1, 3)))]
)
def test_a_member_matches_a_single_run(devices, at_once, single_runs, monkeypatch):
    """One after another, on two devices, and batched as on an accelerator: all at once, or three and one."""
    monkeypatch.setattr(population_devices, "at_once", lambda *_: at_once)
    members = _make(devices)
    for slot, config in enumerate(CONFIGS):
        members.start(slot, config)
    assert {report.epoch for report in members.train_epoch().values()} == {1}
    reports = members.train_epoch()
    for slot, expected in enumerate(single_runs):
        _agree(reports[slot], expected)
    assert len({report.metrics["validation_loss"] for report in reports.values()}) == 4


def test_slots_are_filled_evenly_over_the_devices():
    members = _make(devices=2, size=5)  # rounded up to 3 on each
    assert members.free == [0, 3, 1, 4, 2, 5]
    for slot in (0, 3, 1):
        members.start(slot, CONFIGS[0])
    assert members.free == [4, 2, 5]


def test_a_slot_is_refilled_without_compiling(single_runs):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    members = _make()
    assert "validation_loss" in members.metric_names()
    members.start(0, _config(0.3, 9))
    members.start(2, CONFIGS[2])
    members.train_epoch()
    members.stop(0)
    members.start(0, CONFIGS[0])
    assert compiled
    compiled.clear()
    _agree(members.train_epoch()[2], single_runs[2])
    members.stop(2)
    members.start(3, CONFIGS[3])  # a seed, a learning rate and a slot new to this program
    _agree(members.train_epoch()[0], single_runs[0])
    members.stop(0)
    _agree(members.train_epoch()[3], single_runs[3])
    jax.monitoring.clear_event_listeners()
    assert compiled == []
    assert members.num_compilations == 1


def test_metric_names_allocate_no_states(monkeypatch):
    members = _make()
    monkeypatch.delattr(Population, "_all_states")
    assert set(members.metric_names()) >= {"validation_loss", "validation_accuracy"}


def test_a_diverged_member_does_not_affect_the_others(single_runs):
    members = _make()
    members.start(0, CONFIGS[0])
    members.start(1, _config(1e30, 1))
    first = members.train_epoch()
    assert first[1].finished
    assert first[1].metrics == {}
    assert 1 < first[1].diverged_at <= 4
    assert not first[0].finished
    members.stop(1)
    _agree(members.train_epoch()[0], single_runs[0])


def test_a_non_finite_gradient_ends_a_member_as_it_ends_a_run(monkeypatch):
    """Even with a finite loss: a single run would stop here, so the trial must not get a result."""
    train_step = Steps.train_step

    def step_with_infinite_gradient(self, state, *args):
        new, metrics = train_step(self, state, *args)
        return new, metrics | {"grad_norm": jnp.where(state.step == 2, jnp.inf, metrics["grad_norm"])}

    monkeypatch.setattr(Steps, "train_step", step_with_infinite_gradient)
    members = _make(size=1)
    members.start(0, CONFIGS[0])
    assert members.train_epoch()[0] == population.Report(0, {}, 3, finished=True)


def test_only_fields_that_are_not_step_inputs_change_the_signature():
    same = [*CONFIGS, dataclasses.replace(BASE, seed=7)]
    assert len({hyperparams.signature(config) for config in same}) == 1
    others = [
        _config(0.05, 0, dropout=0.0),  # off, so not an argument
        dataclasses.replace(BASE, batch_size=8),
        dataclasses.replace(BASE, model=ModelConfig(width=4, dropout=0.2)),
        dataclasses.replace(BASE, optimizer=dataclasses.replace(BASE.optimizer, name="nesterov")),
        dataclasses.replace(BASE, optimizer=dataclasses.replace(BASE.optimizer, clip_norm=1.0)),
    ]
    assert len({hyperparams.signature(config) for config in [BASE, *others]}) == 6


@pytest.mark.parametrize("rate", [0.25, 0.7])
def test_dropout_drops_at_the_traced_rate_and_keeps_the_mean(rate):
    @jax.jit
    def drop(rate, x):
        return Dropout(rate)(x, train=True, key=jax.random.key(0))

    dropped = drop(jnp.float32(rate), jnp.ones(20_000))
    assert float((dropped == 0).mean()) == pytest.approx(rate, abs=0.015)
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=1e-6)
