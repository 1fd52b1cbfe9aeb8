"""Configs are resolved once, by a pure function; nothing changes one afterwards."""

import copy
import dataclasses

import jax
import pytest

from experiments import char_rnn, cifar_cnn, cifar_speedrun, mnist_vae
from research import app, optimizers
from research.config import DatasetConfig
from research.data import sources
from research.experiment import Experiment

EXPERIMENTS = (cifar_cnn, mnist_vae, cifar_speedrun)


def _frozen(config):
    """The same config, of classes that refuse to be changed; what is made of it by `dataclasses.replace` is not."""

    def refuse(self, name, value):
        assert not vars(self).get("frozen"), f"{name} was set to {value!r}"
        object.__setattr__(self, name, value)

    for value in vars(config).values():
        if dataclasses.is_dataclass(value):
            _frozen(value)
    config.__class__ = type(type(config).__name__, (type(config),), {"__setattr__": refuse})
    vars(config)["frozen"] = True
    return config


@pytest.mark.parametrize("experiment", [module.EXPERIMENT for module in EXPERIMENTS], ids=lambda e: e.name)
def test_it_is_pure_and_idempotent(experiment):
    dataset = sources.load(DatasetConfig(name="digits"))
    for make_config in experiment.presets.values():
        config = make_config()
        before = copy.deepcopy(config)
        resolved = experiment.resolve(config, dataset)
        assert config == before
        assert resolved.dataset.name == "digits"
        left_open = {name for name, value in vars(resolved.optimizer).items() if value is None}
        defaults = optimizers.DEFAULTS[resolved.optimizer.name]._asdict()
        assert left_open == {name for name, value in defaults.items() if value is None}  # the rule has no such number
        assert experiment.resolve(resolved, dataset) == resolved
        experiment.make_task(_frozen(resolved), dataset)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "args"),
    [
        (cifar_cnn, ["--config.dataset.name=digits", "--config.model.width=4", "--config.optimizer.ema_decay=0.9"]),
        pytest.param(
            mnist_vae,
            ["--config.dataset.name=digits", "--config.model.width=8", "--config.final_samples=2"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            char_rnn,
            ["--config.dataset.name=pydoc", "--config.model.width=8", "--config.sequence_length=16"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else "",
)
def test_a_run_changes_nothing_in_it(module, args, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    resolve, calls = Experiment.resolve, []

    def frozen(self, config, dataset):
        calls.append(config)
        return _frozen(resolve(self, config, dataset))

    monkeypatch.setattr(Experiment, "resolve", frozen)
    pauses = ["--config.eval_every_steps=2", "--config.checkpoint_every_minutes=1"]
    flags = [*args, *pauses, "--config.num_steps=3", "--config.batch_size=128", f"--workdir={tmp_path}"]
    app.run(module.EXPERIMENT, flags, devices=jax.devices()[:1])
    assert len(calls) == 1
    app.run(module.EXPERIMENT, [f"--workdir={tmp_path}", "--mode=eval"], devices=jax.devices()[:1])
