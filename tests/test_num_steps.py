"""Training length in steps: a run may end within an epoch, like any other, and be extended from there."""

import json

import jax
import numpy as np
import pytest
from drawn import read_lines, run, same

from experiments import cifar_cnn, mnist_vae
from launch.plans import lowering
from launch.sweeps import search_space
from research import app, flags
from research.config import MeshConfig, OptimizerConfig
from research.data import sources
from research.errors import UserError
from research.training.population import Population

DIGITS = ["--config.dataset.name=digits", "--config.model.width=4", "--config.batch_size=128"]


def test_a_run_ends_within_an_epoch_with_evaluation_checkpoint_and_plots(tmp_path, capsys):
    """15 steps of epochs of 11: it trains as a run of two epochs, whose checkpoint of step 15 it has."""
    run(tmp_path / "epochs", checkpoint_every_steps=15, keep_checkpoints=9)
    state, summary = run(tmp_path / "steps", num_steps=15, plots=True)
    assert (summary["num_train_steps"], summary["num_epochs"], summary["num_steps"]) == (15, 2, 15)
    lines, whole = read_lines(tmp_path / "steps"), read_lines(tmp_path / "epochs")
    assert lines[:14] == whole[:14]
    assert lines[14]["loss"] == whole[14]["loss"]
    assert summary["train_loss"] == pytest.approx(np.mean([line["loss"] for line in lines[11:]]), rel=1e-6)
    assert {name: lines[14][name] for name in ("test_loss", "test_accuracy")} == {
        name: summary[name] for name in ("test_loss", "test_accuracy")
    }
    assert state.step == 15
    checksums = [
        json.loads((tmp_path / name / "checkpoints/15/record/metadata").read_text())["checksums"]
        for name in ("epochs", "steps")
    ]
    assert checksums[0] == checksums[1]
    assert (tmp_path / "steps/curves.png").exists()
    assert "epoch 2/2  train_accuracy" in capsys.readouterr().out


def test_the_schedule_spans_the_steps(tmp_path):
    run(tmp_path, num_steps=15, optimizer=OptimizerConfig(name="sgd", learning_rate=0.2, schedule="linear"))
    rates = [line["learning_rate"] for line in read_lines(tmp_path)]
    np.testing.assert_allclose(rates, 0.2 * (1 - np.arange(15) / 15), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [15, None, 17])
def test_a_run_that_ended_within_an_epoch_is_extended_exactly(stopped_at, stop, tmp_path):
    """The second epoch goes on where it was: its mean is over all of its steps, and it ends with an evaluation."""
    state, summary = run(tmp_path / "whole", num_steps=25)
    run(tmp_path / "parts", num_steps=15)
    if stopped_at:
        options = {"num_steps": 25, "steps_per_dispatch": 1}
        stop(max(stopped_at, 16), lambda signals: run(tmp_path / "parts", signals=signals, **options))
    resumed, extended = run(tmp_path / "parts", num_steps=25)
    same(resumed, state)
    assert extended.pop("extended") == [{"num_steps": 15, "step": 15}]
    results = {name: value for name, value in summary.items() if name.startswith(("test_", "num_"))}
    assert results.items() <= extended.items()
    lines, whole = read_lines(tmp_path / "parts"), read_lines(tmp_path / "whole")
    assert "test_loss" in lines[14]  # where the first part ended
    assert lines[:14] + lines[15:] == whole[:14] + whole[15:]


def _app(*args):
    return app.run(cifar_cnn.EXPERIMENT, args, devices=jax.devices()[:1])


@pytest.mark.slow
def test_the_command_resumes_to_more_steps_only(tmp_path, capsys):
    workdir = f"--workdir={tmp_path}/x"
    assert _app(*DIGITS, workdir, "--config.num_steps=3")["num_train_steps"] == 3
    assert _app(workdir)["step"] == 3
    assert "is finished: evaluating it; a larger --config.num_steps trains it further" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"num_steps=2: the run in .* has num_steps=3 \(3 steps\)"):
        _app(workdir, "--config.num_steps=2")
    with pytest.raises(UserError, match=r"num_epochs=4 has no effect, since --config\.num_steps=3 decides"):
        _app(workdir, "--config.num_epochs=4")
    extended = _app(workdir, "--config.num_epochs=1", "--config.num_steps=0")
    assert extended["extended"] == [{"num_steps": 3, "step": 3}]
    with pytest.raises(UserError, match=r"the schedules of num_steps=3 up to step 3, and then those of num_epochs=1"):
        flags.parse(cifar_cnn.EXPERIMENT, [f"--reproduce={tmp_path}/x/summary.json"])


def test_a_length_that_would_be_ignored_is_refused():
    with pytest.raises(UserError, match=r"num_epochs=3 has no effect, since --config\.num_steps=5 decides"):
        flags.parse(cifar_cnn.EXPERIMENT, ["--config.num_epochs=3", "--config.num_steps=5"])
    config = flags.parse(cifar_cnn.EXPERIMENT, ["--config.num_steps=5"]).config
    with pytest.raises(UserError, match=r"num_epochs has no effect with --config\.num_steps=5"):
        search_space.parse(["num_epochs=[1,2]"], config)
    with pytest.raises(UserError, match="vary the length of training by num_epochs"):
        search_space.parse(["num_steps=[1,2]"], config)


def _small(experiment):
    config = experiment.default_config
    config.dataset.name, config.dataset.validation_fraction, config.model.width = "digits", 0.1, 4
    config.num_steps, config.batch_size = 7, 256
    return config


@pytest.mark.slow
def test_a_population_trains_for_as_many_steps():
    config, dataset, task = app.load(cifar_cnn.EXPERIMENT, _small(cifar_cnn.EXPERIMENT))
    population = Population(config, task, dataset, jax.devices()[:1], 1)
    population.start(0, config)
    reports = [population.train_epoch()[0]]
    while not reports[-1].finished:
        reports.append(population.train_epoch()[0])
    assert [report.epoch for report in reports] == [1, 2]
    assert population._members[0].step == 7


def test_plans_and_annealing_span_the_steps():
    assert lowering.load(cifar_cnn.EXPERIMENT, _small(cifar_cnn.EXPERIMENT), MeshConfig(data=1)).num_train_steps == 7
    config = _small(mnist_vae.EXPERIMENT)
    config.beta_warmup = 1.0
    dataset = sources.load(config.dataset)
    task = mnist_vae.EXPERIMENT.build_task(mnist_vae.EXPERIMENT.resolve(config, dataset), dataset)
    assert task.warmup_steps == 7
