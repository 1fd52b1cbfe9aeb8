"""`--checkpoint`: evaluation, sampling and export of the best checkpoint or of a given step."""

from unittest import mock

import jax
import linear
import numpy as np
import pytest

import research
from launch import export
from launch.artifacts import artifact
from research import app, flags, sharding
from research.config import MeshConfig
from research.errors import UserError
from research.record.workdir import read_metrics
from research.training import loop
from research.training.checkpoint import Checkpoints

# The learning rate grows until it is too large: the newest epochs are not the best.
FLAGS = [
    *("--config.num_epochs=4", "--config.batch_size=96", "--config.dataset.validation_fraction=0.2"),
    *("--config.optimizer.learning_rate=30", "--config.optimizer.warmup=0.99", "--config.optimizer.clip_norm=0.1"),
    *("--config.keep_checkpoints=2", "--config.mesh.reduce_dtype=bfloat16"),
]


def _app(*args):
    with mock.patch.object(loop.Loop, "draw"):  # the plots take longer than training
        return app.run(linear.EXPERIMENT, args, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, its summary, and the lines of metrics.jsonl by step."""
    workdir = tmp_path_factory.mktemp("run")
    summary = _app(*FLAGS, f"--workdir={workdir}")
    return workdir, summary, {line["step"]: line for line in read_metrics(workdir)}


def _steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
def test_evaluation_of_each_checkpoint_gives_what_its_epoch_recorded(run):
    workdir, summary, lines = run
    best, newest = summary["best_step"], summary["num_train_steps"]
    assert best < _steps(workdir)[-2]  # neither the newest nor the one before
    for choice, step in (("best", best), ("newest", newest), (str(_steps(workdir)[-2]), _steps(workdir)[-2])):
        found = _app(f"--workdir={workdir}", "--mode=eval", f"--checkpoint={choice}")
        assert found["step"] == step
        for name in ("validation_loss", "test_loss", "test_accuracy"):
            assert found[name] == pytest.approx(lines[step][name])


@pytest.mark.slow
def test_a_run_that_sums_gradients_in_bfloat16_is_loaded_on_a_mesh_that_cannot(run):
    workdir, summary, _ = run
    loaded = research.load(linear.EXPERIMENT, workdir, "best", mesh=MeshConfig(data=2, fsdp=4))
    assert loaded.step == summary["best_step"]


def test_the_artifact_of_the_best_checkpoint_names_its_step(run, tmp_path):
    workdir, summary, lines = run
    args = ["linear", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--checkpoint=best"]
    assert export.run(args) == 0
    exported = artifact.read(tmp_path / "out")
    step = summary["best_step"]
    assert exported.manifest["step"] == step
    assert exported.manifest["results"]["test_loss"] == lines[step]["test_loss"]
    command = flags.parse(linear.EXPERIMENT, [f"--workdir={workdir}", "--mode=eval", f"--checkpoint={step}"])
    training = app.restored(linear.EXPERIMENT, command, sharding.make_mesh(command.config, jax.devices()[:1]))
    kernel = training.state.params["first"]["kernel"][...]
    np.testing.assert_array_equal(exported.weights["params.first.kernel"], kernel)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mode=eval", "--checkpoint=7"], "no checkpoint of step 7; the run has those of steps {}, {}, {}"),
        (["--mode=eval", "--checkpoint=last"], "--checkpoint=last: give newest, best or the number of a step"),
        (["--mode=eval", "--checkpoint=-1"], "--checkpoint=-1: give newest, best or the number of a step"),
        (["--checkpoint=best"], "--checkpoint=best is for evaluation, sampling and export: training resumes from"),
    ],
)
def test_bad_choices_name_what_is_right(run, args, words):
    with pytest.raises(UserError) as error:
        _app(f"--workdir={run[0]}", *args)
    assert words.format(*_steps(run[0])) in str(error.value)


def test_without_a_validation_loss_no_checkpoint_is_the_best(run, monkeypatch):
    read_record = Checkpoints.read_record

    def without_best(self, step):
        record = read_record(self, step)
        return record | {"progress": record["progress"] | {"best": None}}  # as a run without a validation split has it

    monkeypatch.setattr(Checkpoints, "read_record", without_best)
    with pytest.raises(UserError, match="the run has no validation loss to choose by; use newest or a step"):
        _app(f"--workdir={run[0]}", "--mode=eval", "--checkpoint=best")


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(run, monkeypatch):
    """It does not fall back to another checkpoint, as the newest does."""

    def read_record(self, step):
        raise ValueError("damaged here")

    monkeypatch.setattr(Checkpoints, "read_record", read_record)
    step = _steps(run[0])[-1]
    with pytest.raises(UserError, match=rf"checkpoint {step} in .* is damaged \(damaged here\): choose another"):
        _app(f"--workdir={run[0]}", "--mode=eval", f"--checkpoint={step}")
