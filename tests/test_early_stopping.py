"""Early stopping: where it stops, that a resumed run stops at the same step, and how to train further."""

import dataclasses

import jax
import linear
import pytest
from command import read_summary
from drawn import DATASET, read_lines, run, same, split

from launch.sweeps.options import SweepOptions, check_search
from research import app
from research.config import Config
from research.errors import UserError
from research.training import early_stopping, loop
from research.training.progress import Progress

VALIDATED = dataclasses.replace(DATASET, validation=split(2, 20))
# The learning rate is too high, so the validation loss goes up and down.
OPTIONS = {"dataset": VALIDATED, "rate": 1.0, "num_epochs": 12, "log_every_steps": 50}
ENDS = [11, 22, 33, 44]


def _reason(step, epoch, best, epochs=2, **progress):
    config = Config(early_stopping_epochs=epochs)
    return early_stopping.reason(config, Progress(step=step, epoch=epoch, best=best, **progress), ENDS)


def test_it_counts_the_epochs_since_the_one_of_the_best_evaluation():
    assert _reason(22, 2, [0.5, 11]) == ""
    assert "for 2 epochs, since 0.5000 at step 11" in _reason(33, 3, [0.5, 11])
    assert "for 1 epoch, since" in _reason(22, 2, [0.5, 11], epochs=1)
    assert _reason(33, 3, [0.5, 12]) == ""  # an evaluation within the second epoch
    assert _reason(33, 3, [0.5, 11], epochs=0) == ""
    assert _reason(0, 0, None) == ""
    assert _reason(44, 4, [0.5, 11]) == ""  # that is its end anyway
    assert _reason(35, 3, [0.5, 11]) == ""  # resumed within an epoch


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped early: its workdir, state and summary."""
    workdir = tmp_path_factory.mktemp("stopped")
    return workdir, *run(workdir, early_stopping_epochs=2, **OPTIONS)


def test_it_stops_after_as_many_epochs_without_a_lower_validation_loss(stopped):
    workdir, state, summary = stopped
    losses = [line["validation_loss"] for line in read_lines(workdir) if "validation_loss" in line]
    assert 2 < len(losses) < 12
    assert min(losses[:-2]) <= min(losses[-2:])
    # Not earlier: before each epoch, one of the two before had the lowest loss so far.
    assert all(min(losses[:end]) < min([*losses[: end - 2], 9]) for end in range(2, len(losses)))
    assert state.step == summary["num_train_steps"] == 90 * len(losses) // 8
    assert summary["stopped_early"] == (
        f"early stopping: the validation loss has not improved for 2 epochs, since {min(losses):.4f} at step "
        f"{summary['best_step']}"
    )
    assert read_summary(workdir) == summary


@pytest.mark.parametrize(
    "epochs_before_the_end", [1, *(pytest.param(epochs, marks=pytest.mark.slow) for epochs in (0, 2))]
)
def test_a_resumed_run_stops_at_the_same_step(epochs_before_the_end, stopped, stop, tmp_path):
    workdir, state, summary = stopped
    step = summary["num_train_steps"] - 11 * epochs_before_the_end - 1
    options = OPTIONS | {"early_stopping_epochs": 2}
    stop(step, lambda signals: run(tmp_path, signals=signals, steps_per_dispatch=1, **options))
    resumed, other = run(tmp_path, **options)
    same(resumed, state)
    assert other["stopped_early"] == summary["stopped_early"]
    assert read_lines(tmp_path) == read_lines(workdir)
    # Killed after the last checkpoint, but before summary.json: it trains no further.
    (tmp_path / "summary.json").unlink()
    same(run(tmp_path, **options)[0], state)
    assert read_summary(tmp_path)["stopped_early"] == summary["stopped_early"]


@pytest.mark.slow
def test_without_it_the_run_goes_on_as_if_never_stopped(tmp_path):
    """The first part stops early; the second is resumed without early stopping."""
    _, first = run(tmp_path / "parts", early_stopping_epochs=1, **OPTIONS)
    assert first["num_train_steps"] < 90 * 12 // 8
    state, summary = run(tmp_path / "parts", **OPTIONS)
    same(state, run(tmp_path / "whole", **OPTIONS)[0])
    assert "stopped_early" not in summary
    assert "early_stopping_epochs" not in summary


@pytest.mark.slow
def test_the_command_needs_a_validation_split_and_knows_that_it_is_finished(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop.Loop, "draw", lambda _: None)

    def command(*args):
        return app.run(linear.EXPERIMENT, args, devices=jax.devices()[:1])

    args = ["--workdir=x", "--config.batch_size=256", "--config.num_epochs=9", "--config.early_stopping_epochs=1"]
    with pytest.raises(UserError, match=r"needs a validation split: hold one out with --config\.dataset\.validation"):
        command(*args)
    assert not (tmp_path / "x").exists()
    # Updates this large do not lower the loss for long.
    command(
        *args,
        "--config.dataset.validation_fraction=0.1",
        "--config.optimizer.learning_rate=20",
        "--config.optimizer.clip_norm=1",
    )
    assert "stopped at step" in capsys.readouterr().out
    step = read_summary(tmp_path / "x")["num_train_steps"]
    assert command("--workdir=x")["step"] == step
    assert "was stopped by early stopping: the validation loss has not improved for 1 epoch" in (
        out := capsys.readouterr().out
    )
    assert "a larger --config.early_stopping_epochs, or 0, trains it further" in out
    longer = command("--workdir=x", "--config.early_stopping_epochs=0")
    assert longer["num_train_steps"] > step


def test_sweeps_refuse_it():
    search = SweepOptions(search=("optimizer.learning_rate=log(1e-3,1)",))
    with pytest.raises(UserError, match=r"early_stopping_epochs: a sweep ends trials early by --pruner; leave it out"):
        check_search(linear.EXPERIMENT, search, Config(early_stopping_epochs=2))
